//! The seats that rank 0 gives, and the gate of every other process.

use super::{Hello, Refusal, Roster, WorldName, check};
use exflow_placement::Rank;
use std::net::SocketAddr;
use std::time::Duration;

/// A seat that is taken.
#[derive(Debug, Clone)]
struct Seat {
    guest: u64,
    address: SocketAddr,
    ranks: u16,
    offer: Vec<u8>,
    max_frame_bytes: u32,
    epoch: u32,
}

/// Those with whom a world could start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// Every process; those that did not come are absent.
    pub roster: Roster,
    /// What each process offers, by its number; empty where it is absent.
    pub offers: Vec<Vec<u8>>,
    /// Agreed largest frame payload, bytes.
    pub max_frame_bytes: u32,
    /// The epoch of this life of the world.
    pub epoch: u32,
}

/// Result of looking at the lobby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LobbyPoll {
    /// Processes are missing; look again when one came, at the latest at this time.
    Waiting {
        /// When the waiting ends.
        deadline: Duration,
    },
    /// The world can start.
    Ready(Party),
    /// It took too long.
    Expired {
        /// Processes that did not come.
        missing: Vec<Rank>,
    },
}

/// What rank 0 knows of earlier lives of its world, and how long it waits.
#[derive(Debug, Clone, Default)]
pub struct LobbyTerms {
    /// When the waiting ends.
    pub deadline: Duration,
    /// From when on the world starts with those who are there; `None`: only with everybody.
    pub partial_after: Option<Duration>,
    /// Ranks of each process, where the world has been complete before.
    pub known: Option<Vec<u16>>,
}

/// Rank 0 while its world has not started. Guests are named by a number that the driver chooses.
#[derive(Debug)]
pub struct Lobby {
    own: Hello,
    seats: Vec<Option<Seat>>,
    terms: LobbyTerms,
    /// Those who are there are too few, said rank 0's program.
    too_few: bool,
}

impl Lobby {
    /// A lobby for the world that `own` (rank 0's hello) describes.
    pub fn new(own: Hello, terms: LobbyTerms) -> Self {
        let seats = vec![None; usize::from(own.world_size)];
        Self { own, seats, terms, too_few: false }
    }

    /// Gives a guest its seat, or says why not. `address` is where its packets come from.
    pub fn hear(&mut self, guest: u64, hello: &Hello, address: SocketAddr) -> Result<(), Refusal> {
        check(&self.own, hello)?;
        if hello.world.is_some() {
            return Err(Refusal::World);
        }
        let process = hello.rank.index();
        let known = self.terms.known.as_ref().and_then(|known| known.get(process).copied());
        if let Some(ours) = known.filter(|&ours| ours != hello.ranks) {
            return Err(Refusal::Ranks { ours, theirs: hello.ranks });
        }
        if self.seats[process].is_some() {
            return Err(Refusal::DuplicateRank { rank: hello.rank });
        }
        self.seats[process] = Some(Seat {
            guest,
            address: SocketAddr::new(address.ip(), hello.port),
            ranks: hello.ranks,
            offer: hello.offer.clone(),
            max_frame_bytes: hello.max_frame_bytes,
            epoch: hello.epoch,
        });
        self.too_few = false;
        Ok(())
    }

    /// Frees the seat of a guest that went away.
    pub fn leave(&mut self, guest: u64) {
        let of_guest = |seat: &&mut Option<Seat>| seat.as_ref().is_some_and(|seat| seat.guest == guest);
        self.seats.iter_mut().filter(of_guest).for_each(|seat| *seat = None);
    }

    /// Waits for more than are there: they are too few.
    pub fn wait_for_more(&mut self) {
        self.too_few = true;
    }

    /// Processes that have no seat yet.
    pub fn missing(&self) -> Vec<Rank> {
        let seats = self.seats.iter().enumerate().skip(1);
        seats.filter(|(_, seat)| seat.is_none()).map(|(rank, _)| Rank::from(rank)).collect()
    }

    /// Looks whether the world can start.
    pub fn poll(&self, now: Duration) -> LobbyPoll {
        let missing = self.missing();
        let partial = self.terms.partial_after.filter(|_| !self.too_few && self.terms.known.is_some());
        let deadline = self.terms.deadline;
        if missing.is_empty() || partial.is_some_and(|after| now >= after) {
            LobbyPoll::Ready(self.party())
        } else if now >= deadline {
            LobbyPoll::Expired { missing }
        } else {
            LobbyPoll::Waiting { deadline: partial.map_or(deadline, |after| after.min(deadline)) }
        }
    }

    fn party(&self) -> Party {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let host = |(process, seat): (usize, &Option<Seat>)| match (process, seat) {
            (0, _) => (self.own.ranks, Some(nowhere)),
            (_, Some(seat)) => (seat.ranks, Some(seat.address)),
            // Only a world that is known starts without one.
            (_, None) => (self.terms.known.as_ref().map_or(1, |known| known[process]), None),
        };
        let offer = |(process, seat): (usize, &Option<Seat>)| match (process, seat) {
            (0, _) => self.own.offer.clone(),
            (_, seat) => seat.as_ref().map(|seat| seat.offer.clone()).unwrap_or_default(),
        };
        let seated = || self.seats.iter().flatten();
        Party {
            roster: Roster::new(self.seats.iter().enumerate().map(host)),
            offers: self.seats.iter().enumerate().map(offer).collect(),
            max_frame_bytes: seated()
                .map(|seat| seat.max_frame_bytes)
                .fold(self.own.max_frame_bytes, u32::min),
            epoch: seated().map(|seat| seat.epoch).fold(self.own.epoch, u32::max),
        }
    }
}

/// A process that has been welcomed and waits for the higher ones.
#[derive(Debug)]
pub struct Gate {
    own: Hello,
    world: WorldName,
    /// Who may still come in, by process.
    expected: Vec<bool>,
}

impl Gate {
    /// A gate of process `own.rank` in `world`, for the higher ones that are there.
    pub fn new(own: Hello, world: WorldName, roster: &Roster) -> Self {
        let expected = (0..usize::from(own.world_size))
            .map(|process| process > own.rank.index() && roster.is_present(process))
            .collect();
        Self { own, world, expected }
    }

    /// Lets a higher process of the same world in, once.
    pub fn hear(&mut self, hello: &Hello) -> Result<(), Refusal> {
        check(&self.own, hello)?;
        match hello.world {
            Some(world) if world == self.world => {}
            Some(world) if world.id == self.world.id => {
                return Err(Refusal::Epoch { ours: self.world.epoch, theirs: world.epoch });
            }
            _ => return Err(Refusal::World),
        }
        let expected = &mut self.expected[hello.rank.index()];
        if !std::mem::take(expected) {
            return Err(Refusal::DuplicateRank { rank: hello.rank });
        }
        Ok(())
    }

    /// Higher processes that are not in yet.
    pub fn missing(&self) -> Vec<Rank> {
        let expected = self.expected.iter().enumerate();
        expected.filter(|(_, expected)| **expected).map(|(rank, _)| Rank::from(rank)).collect()
    }
}
