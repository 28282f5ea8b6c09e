//! Rank 0's door: who says hello, also while the world runs.

use super::endpoint::Bound;
use super::join::{Arrival, Guest, receive, refuse};
use super::options::{JoinEvent, JoinOptions, Life};
use crate::proto::membership::{Hello, Roster, WorldName, check};
use crate::{LossCause, Refusal};
use exflow_placement::Rank;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex as AsyncMutex, mpsc};

/// A claim to the seat of a rank that is there is refused this long after its silence would have been noticed.
const MARGIN: Duration = Duration::from_millis(500);

/// Everybody who says hello at an endpoint, for as long as it lives.
pub(crate) struct Door {
    /// Taken by whoever listens now: a lobby, a gate, or the doorman of a running world.
    pub(crate) arrivals: AsyncMutex<mpsc::Receiver<Arrival>>,
    /// Guests who came while the world ran, for its next life; one per process.
    waiting: Mutex<Vec<Waiting>>,
}

struct Waiting {
    guest: Box<Guest>,
    /// Refused then, where the seat is still taken.
    until: Option<Instant>,
}

/// Told which process is lost to the running world, and why.
pub(crate) type Lose = Box<dyn Fn(usize, LossCause) + Send + Sync>;

/// A running world, as its doorman sees it.
pub(crate) struct Watch {
    pub(crate) options: Arc<JoinOptions>,
    pub(crate) world: WorldName,
    pub(crate) roster: Roster,
    pub(crate) lose: Lose,
}

impl Door {
    /// Begins to take connections. Must be called within the runtime.
    pub(crate) fn open(bound: &Bound, options: Arc<JoinOptions>) -> Self {
        Self { arrivals: AsyncMutex::new(receive(bound, options)), waiting: Mutex::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Guests who came while the world ran.
    pub(crate) fn take_waiting(&self) -> Vec<Guest> {
        std::mem::take(&mut *self.waiting()).into_iter().map(|waiting| *waiting.guest).collect()
    }

    /// Keeps the door while a world runs, until aborted. A guest whose seat is free, or who has left this epoch, ends
    /// the epoch and waits for the next one; one whose seat is taken waits until its holder is lost or proves alive.
    pub(crate) async fn keep(self: Arc<Self>, watch: Watch) {
        let mut arrivals = self.arrivals.lock().await;
        let own = watch.options.hello(0, &Life::default());
        loop {
            let next = self.waiting().iter().filter_map(|waiting| waiting.until).min();
            let arrival = tokio::select! {
                arrival = arrivals.recv() => arrival,
                () = sleep_until(next) => { self.turn_away(&watch.options); continue }
            };
            match arrival {
                Some(Arrival::Guest(guest)) => self.hear(&watch, &own, guest),
                Some(Arrival::Failed(what)) => watch.options.tell(&JoinEvent::Failed { what }),
                Some(Arrival::Gone(_)) => {}
                None => return,
            }
        }
    }

    fn hear(&self, watch: &Watch, own: &Hello, guest: Box<Guest>) {
        let process = guest.hello.rank.index();
        let fits = match (own.rank, guest.hello.world) {
            (Rank(0), None) => check(own, &guest.hello),
            _ => Err(Refusal::World),
        };
        if let Err(refusal) = fits {
            return dismiss(&watch.options, guest, refusal);
        }
        let gone = !watch.roster.is_present(process) || guest.hello.epoch > watch.world.epoch;
        let until = (!gone).then(|| Instant::now() + watch.options.quic.idle_timeout + MARGIN);
        let mut waiting = self.waiting();
        if until.is_some() && waiting.iter().any(|other| other.guest.hello.rank == guest.hello.rank) {
            let refusal = Refusal::DuplicateRank { rank: guest.hello.rank };
            return dismiss(&watch.options, guest, refusal);
        }
        waiting.retain(|other| other.guest.hello.rank != guest.hello.rank);
        waiting.push(Waiting { guest, until });
        drop(waiting);
        if gone {
            (watch.lose)(process, LossCause::Rejoins);
        }
    }

    /// Refuses those whose seat's holder has had time enough to fall silent and has not.
    fn turn_away(&self, options: &JoinOptions) {
        let now = Instant::now();
        let late = |waiting: &mut Waiting| waiting.until.is_some_and(|until| until <= now);
        let late: Vec<_> = self.waiting().extract_if(.., late).collect();
        for Waiting { guest, .. } in late {
            let refusal = Refusal::DuplicateRank { rank: guest.hello.rank };
            dismiss(options, guest, refusal);
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}

fn dismiss(options: &JoinOptions, mut guest: Box<Guest>, refusal: Refusal) {
    let (rank, address) = (guest.hello.rank, guest.connection.remote_address());
    options.tell(&JoinEvent::Failed { what: format!("refused rank {rank} at {address}: {refusal}") });
    let own = options.rank;
    tokio::spawn(async move { refuse(&guest.connection, &mut guest.control, own, refusal).await });
}
