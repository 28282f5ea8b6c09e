//! How the ranks of a world meet: in this process alone, or with other processes over QUIC, epoch by epoch.

use super::numerics;
use super::placing::{self, Base, Decline};
use super::plan::{Plan, table_digest};
use super::sizing::Offer;
use crate::EngineError;
use crate::model::ModelSpec;
use crate::options::{ClusterOptions, GroupOptions, Numerics, PlacementSource, TransportKind};
use exflow_placement::{Affinity, PlacementTable, Rank};
use exflow_transport::identity::Identity;
use exflow_transport::proto::membership::{Digest, Party, Roster};
use exflow_transport::quic::{self, JoinEvent, JoinOptions, Life, Listener, QuicOptions, Ruling, Suspects};
use exflow_transport::{Communicator, TransportError};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Nothing heard for this long: a rank is lost. With [`CONTACT`] it keeps the promise that the loss of rank 0 ends
/// every process within 2 s.
const SILENCE: Duration = Duration::from_millis(1100);
/// How long a rank that lost its group tries to reach rank 0.
pub(crate) const CONTACT: Duration = Duration::from_millis(400);
/// How long the ranks of the last epoch are waited for before those who are there go on: longer than a silence takes
/// to be noticed on the other side of a path that broke.
const REGROUP: Duration = Duration::from_millis(1500);
/// The same where all ranks are in one process, which lives or dies as a whole: one that was stopped for a while, or
/// is on a machine that was, goes on. Its ranks need no heartbeats either.
const TOGETHER: Duration = Duration::from_secs(600);
/// A round waits for its slowest rank this long; loading has its own patience.
const ROUND: Duration = Duration::from_secs(60);

/// A world in one epoch, as this process sees it.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) roster: Roster,
    pub(crate) epoch: u32,
    /// This process's ranks, in order.
    pub(crate) comms: Vec<Box<dyn Communicator>>,
    /// Adapter of each rank, empty where it is absent.
    pub(crate) adapters: Vec<String>,
}

/// How rank 0's process makes worlds.
pub(crate) enum Group {
    /// All ranks are here. The offer is what they found before anything was loaded.
    Alone(TransportKind, Offer),
    /// Other processes have ranks too.
    Led(Box<Leader>),
}

/// Rank 0's end of a group of processes.
pub(crate) struct Leader {
    listener: Listener,
    verdict: Arc<Mutex<Decision>>,
    known: Option<(u64, Vec<u16>)>,
}

/// What was decided about those who came: between the driver's thread and ours.
#[derive(Default)]
struct Decision {
    /// What rank 0 asks for.
    options: Option<ClusterOptions>,
    base: Option<Base>,
    plan: Option<Result<Plan, EngineError>>,
    adapters: Vec<String>,
}

impl Group {
    pub(crate) fn new(options: &ClusterOptions, spec: &ModelSpec) -> Result<Self, EngineError> {
        placing::check_affinity(options, spec)?;
        placing::check_options(options)?;
        placing::check_kv_wire(options, spec)?;
        if options.numerics == Numerics::Fast {
            // What this process's own ranks lack is told before others are waited for.
            numerics::of_this_process(options, spec)?;
        }
        let Some(group) = &options.group else {
            placing::check_ranks(options.ranks, spec)?;
            return Ok(Self::Alone(options.transport, Offer::of(options)?));
        };
        if group.process != 0 {
            return Err(EngineError::usage(
                format!("process {} of {} does not lead", group.process, group.processes),
                "start it with `exflow worker`",
            ));
        }
        let asked = Decision { options: Some(options.clone()), ..Decision::default() };
        let verdict = Arc::new(Mutex::new(asked));
        let mut join = join_options(options, group, spec)?;
        let (spec, shared) = (spec.clone(), Arc::clone(&verdict));
        join.decide = Some(Arc::new(move |party| rule(&spec, &shared, party)));
        Ok(Self::Led(Box::new(Leader { listener: Listener::bind(join)?, verdict, known: None })))
    }

    /// Makes the world of the epoch `epoch` or a later one.
    pub(crate) fn form(
        &mut self,
        options: &ClusterOptions,
        spec: &ModelSpec,
        epoch: u32,
    ) -> Result<World, EngineError> {
        match self {
            Self::Alone(kind, offer) => alone(*kind, offer, options, spec),
            Self::Led(leader) => leader.form(epoch),
        }
    }

    /// Has further worlds run as these options ask.
    pub(crate) fn change(&self, options: &ClusterOptions) {
        if let Self::Led(leader) = self {
            let mut decision = leader.decision();
            (decision.options, decision.base) = (Some(options.clone()), None);
        }
    }

    /// Has further worlds begin with another table.
    pub(crate) fn place(&self, table: &PlacementTable) {
        if let Self::Led(leader) = self
            && let Some(base) = leader.decision().base.as_mut()
        {
            base.place(table.clone());
        }
    }

    /// Has experts of ranks that are lost placed by these counts.
    pub(crate) fn learn(&self, affinity: Affinity) {
        if let Self::Led(leader) = self
            && let Some(options) = leader.decision().options.as_mut()
        {
            options.affinity = Some(Arc::new(affinity));
        }
    }

    /// The ranks of other processes that are suspect now.
    pub(crate) fn suspects(&self) -> Suspects {
        match self {
            Self::Alone(..) => Suspects::default(),
            Self::Led(leader) => leader.listener.suspects(),
        }
    }

    /// Whether a world can be made again after ranks were lost.
    pub(crate) fn goes_on(&self) -> bool {
        matches!(self, Self::Led(_))
    }
}

fn alone(
    kind: TransportKind,
    offer: &Offer,
    options: &ClusterOptions,
    spec: &ModelSpec,
) -> Result<World, EngineError> {
    fn boxed<C: Communicator + 'static>(comms: Vec<C>) -> Vec<Box<dyn Communicator>> {
        comms.into_iter().map(|c| Box::new(c) as Box<dyn Communicator>).collect()
    }
    let here = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let roster = Roster::new([(options.ranks as u16, here)]);
    let plan = placing::decide(options, spec, &roster, std::slice::from_ref(offer), &mut None);
    let plan = plan.map_err(Decline::into_error)?;
    let comms = match kind {
        TransportKind::Local => boxed(exflow_transport::local::world(options.ranks)),
        TransportKind::Quic => boxed(quic::loopback_world(
            options.ranks,
            QuicOptions {
                link: options.link,
                idle_timeout: TOGETHER,
                heartbeats: false,
                ..QuicOptions::loopback()
            },
        )?),
    };
    Ok(World { plan, roster, epoch: 0, comms, adapters: Vec::new() })
}

impl Leader {
    fn decision(&self) -> MutexGuard<'_, Decision> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn form(&mut self, epoch: u32) -> Result<World, EngineError> {
        self.decision().plan = None;
        let life = Life { epoch, known: self.known.clone(), partial_after: REGROUP, contact: None };
        let formed = self.listener.form(life);
        let plan = self.decision().plan.take();
        let comms = match (formed, plan) {
            // What was decided says more than that nobody came in time.
            (
                Err(TransportError::NotStarted { .. } | TransportError::JoinTimeout { .. }),
                Some(Err(error)),
            ) => {
                return Err(error);
            }
            (formed, _) if formed.is_err() => formed?,
            (formed, Some(plan)) => (formed?, plan?).0,
            (_, None) => return Err(EngineError::Internal("a world without a plan".into())),
        };
        let Some(comm) = comms.first() else {
            return Err(EngineError::Internal("a process without ranks".into()));
        };
        let (roster, world) = (comm.roster().clone(), comm.world());
        let plan = Plan::decode(comm.settings())?;
        self.known = Some((world.id, roster.members().iter().map(|member| member.ranks).collect()));
        let adapters = self.decision().adapters.clone();
        let comms = comms.into_iter().map(|c| Box::new(c) as Box<dyn Communicator>).collect();
        Ok(World { plan, roster, epoch: world.epoch, comms, adapters })
    }
}

/// Decides about a party on behalf of rank 0.
fn rule(spec: &ModelSpec, shared: &Mutex<Decision>, party: &Party) -> Ruling {
    let mut decision = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(options) = decision.options.clone() else {
        return Ruling::Never("nothing was asked for".into());
    };
    let offers: Vec<Offer> = party.offers.iter().map(|bytes| Offer::decode(bytes)).collect();
    let members = party.roster.members();
    let adapters_of = |(process, offer): (usize, &Offer)| {
        (0..members[process].ranks.into())
            .map(|local: usize| offer.adapters.get(local).cloned().unwrap_or_default())
            .collect::<Vec<_>>()
    };
    decision.adapters = offers.iter().enumerate().flat_map(adapters_of).collect();
    let decided = placing::decide(&options, spec, &party.roster, &offers, &mut decision.base);
    let encoded = match decided {
        Ok(plan) => plan.encode().map(|bytes| (plan, bytes)).map_err(Decline::Never),
        Err(decline) => Err(decline),
    };
    let (ruling, plan) = match encoded {
        Ok((plan, bytes)) => (Ruling::Start(bytes), Ok(plan)),
        Err(Decline::TooFew(error)) => (Ruling::Wait(error.to_string()), Err(error)),
        Err(Decline::Never(error)) => (Ruling::Never(error.to_string()), Err(error)),
    };
    decision.plan = Some(plan);
    ruling
}

/// What a process of a group joins with.
pub(crate) fn join_options(
    options: &ClusterOptions,
    group: &GroupOptions,
    spec: &ModelSpec,
) -> Result<JoinOptions, EngineError> {
    let rank = u16::try_from(group.process).map(Rank);
    let rank = rank.map_err(|_| EngineError::usage(format!("process {}", group.process), "count from 0"))?;
    let identity = identity_of(group)?;
    let listen = match group.listen {
        Some(listen) => listen,
        None => SocketAddr::from((
            Ipv4Addr::UNSPECIFIED,
            if rank == Rank(0) { port_of(&group.leader)? } else { 0 },
        )),
    };
    let table = match &options.placement {
        PlacementSource::File(path) => Some(table_digest(&placing::read_table(path, spec.experts, None)?)),
        _ => None,
    };
    let offer = Offer::with_names(options)?;
    let observer = group.observer.clone();
    let mut join = JoinOptions::new(rank, group.processes, identity);
    join.ranks = options.ranks;
    join.offer = offer.encode();
    join.listen = listen;
    join.leader = (rank != Rank(0)).then(|| group.leader.clone());
    join.model = digest_bytes(&spec.digest)?;
    join.table = table;
    join.quic = QuicOptions {
        idle_timeout: SILENCE,
        round_timeout: ROUND,
        join_timeout: group.join_timeout,
        link: options.link,
        ..QuicOptions::default()
    };
    join.observer = Some(Arc::new(move |event| observer.tell(&words(event))));
    Ok(join)
}

fn words(event: &JoinEvent) -> String {
    match event {
        JoinEvent::Listening { address } => format!("listening on UDP {address}"),
        JoinEvent::Joined { rank, address } => format!("rank {rank} joined from {address}"),
        JoinEvent::Suspect { ranks } => format!("nothing was heard from {} for 1 s", of_ranks(ranks)),
        JoinEvent::Heard { ranks } => format!("{} heard again", of_ranks(ranks)),
        JoinEvent::Failed { what } => what.clone(),
        other => format!("{other:?}"),
    }
}

fn of_ranks(ranks: &[Rank]) -> String {
    let numbers: Vec<_> = ranks.iter().map(Rank::to_string).collect();
    format!("rank{} {}", if ranks.len() > 1 { "s" } else { "" }, numbers.join(", "))
}

/// The identity of this process: in the folder itself, or, as an authority issues them, in `rank-N` of it.
fn identity_of(group: &GroupOptions) -> Result<Identity, EngineError> {
    let own = group.identity.join(format!("rank-{}", group.process));
    let folder = if own.is_dir() { &own } else { &group.identity };
    Ok(Identity::load(folder)?)
}

fn port_of(leader: &str) -> Result<u16, EngineError> {
    let port = leader.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    port.ok_or_else(|| {
        EngineError::usage(
            format!("leader {leader:?} names no port"),
            "give it as HOST:PORT, as in node0:7447",
        )
    })
}

fn digest_bytes(hex: &str) -> Result<Digest, EngineError> {
    let byte = |at: usize| hex.get(2 * at..2 * at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let mut digest = Digest::default();
    for (at, place) in digest.iter_mut().enumerate() {
        *place = byte(at).ok_or_else(|| EngineError::Internal(format!("the model digest {hex:?}")))?;
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_of_rank_0_is_known_in_time() {
        // What is left of the 2 s is for the last words of a process.
        assert!(SILENCE + CONTACT <= Duration::from_millis(1600));
        assert!(exflow_transport::proto::pulse::SUSPECT_AFTER < SILENCE, "suspect before lost");
        assert!(SILENCE < REGROUP);
    }
}
