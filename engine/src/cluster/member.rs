//! A process whose ranks serve rank 0 of another process, through every epoch until rank 0 says stop.

use super::group::{CONTACT, join_options};
use super::host::{Host, News};
use super::plan::Plan;
use crate::EngineError;
use crate::options::{ClusterOptions, Progress};
use exflow_transport::quic::{Life, Listener};
use exflow_transport::{Communicator, TransportError};

/// Runs this process's ranks for rank 0 until it says stop.
///
/// What was lost is left to rank 0: this process drops its links, keeps its weights and asks to join the next epoch.
///
/// # Errors
/// Bad options or a model that cannot be read: [`EngineError::is_input`] holds. Refused, rank 0 out of reach, or a
/// failure of this process's own: others.
pub fn work(options: ClusterOptions, progress: &dyn Progress) -> Result<(), EngineError> {
    let Some(group) = options.group.clone() else {
        return Err(EngineError::usage(
            "a worker without a group",
            "give it --rank, --world-size and --leader",
        ));
    };
    if group.process == 0 {
        let what = "rank 0 leads and does not work for others";
        return Err(EngineError::usage(
            what,
            "start it with `exflow generate` or another verb that runs a model",
        ));
    }
    let mut host = Host::new(options)?;
    let listener = Listener::bind(join_options(&host.options, &group, &host.spec)?)?;
    let mut life = Life::default();
    let mut lost: Option<EngineError> = None;
    loop {
        let comms = listener.form(life.clone()).map_err(|error| gone(error, lost.take()))?;
        let Some(comm) = comms.first() else {
            return Err(EngineError::Internal("a process without ranks".into()));
        };
        let (epoch, first, plan) = (comm.world().epoch, comm.rank(), Plan::decode(comm.settings())?);
        group.observer.tell(&format!("rank {first} is in epoch {epoch}, {} ranks", plan.table.ranks));
        let loaded = host.load(&plan, first, progress)?;
        if epoch > 0 {
            group.observer.tell(&format!("process {}: {loaded}", group.process));
        }
        let comms = comms.into_iter().map(|c| Box::new(c) as Box<dyn Communicator>).collect();
        let running = host.start(comms, &plan, &News::Away, None)?;
        match running.finish(&mut host) {
            Ok(false) => return Ok(()),
            // Rank 0 changes how the ranks run and takes its time.
            Ok(true) => {
                life = Life { epoch: epoch + 1, ..Life::default() };
                continue;
            }
            Err(error) if !error.is_loss() => return Err(error),
            Err(error) => {
                group.observer.tell(&format!("epoch {epoch} is over: {error}"));
                lost = Some(error);
            }
        }
        life = Life { epoch: epoch + 1, contact: Some(CONTACT), ..Life::default() };
    }
}

/// Rank 0 that cannot be reached any more is lost, with what was seen of it last.
fn gone(error: TransportError, lost: Option<EngineError>) -> EngineError {
    match (error, lost) {
        (TransportError::JoinTimeout { .. } | TransportError::PeerLost { .. }, Some(lost)) => {
            EngineError::LeaderLost { source: Box::new(lost) }
        }
        (error, _) => error.into(),
    }
}
