//! All-to-all-v rounds as seen by one rank.
//!
//! A rank starts its rounds in order, one number after the other, and may have a few open at once. A frame of a
//! peer may come before its round is started here, because that peer is faster; such early frames are kept, but
//! no more of them than [`RoundLimits`] allows. A frame that comes twice, or belongs to a round that is over, or
//! names another exchange than this rank's is a [`Violation`].

use crate::{ByteClass, LossCause, RoundId};
use bytes::Bytes;
use exflow_placement::Rank;
use std::collections::VecDeque;
use std::time::Duration;

pub use super::violation::Violation;

/// What bounds the memory that peers can make a rank hold.
#[derive(Debug, Clone, Copy)]
pub struct RoundLimits {
    /// Rounds that may be open (started and not finished) at once; the program's own mistake if exceeded.
    pub max_open: usize,
    /// Largest payload of one frame, bytes.
    pub max_frame_bytes: u32,
    /// Bytes of early frames kept per peer before its stream is no longer read; one frame is always kept.
    pub early_bytes: usize,
    /// How long a round may take from its start.
    pub timeout: Duration,
}

impl RoundLimits {
    /// Rounds from the oldest unfinished one on of which a correct peer can have sent frames: it has finished
    /// only what this rank has started, and is itself at most `max_open` further.
    pub fn window(&self) -> u64 {
        2 * self.max_open as u64
    }
}

/// Whether a frame whose header was read may be read further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Read it: its place is reserved.
    Take,
    /// Leave it on the stream and ask again when a round has been started.
    Hold,
}

/// Why a round cannot be finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoundFailure {
    /// A peer whose frame is missing is gone.
    Lost(Rank, LossCause),
    /// A peer broke the protocol.
    Broken(Rank, Violation),
    /// These ranks' frames were not there in time.
    Timeout {
        /// Ranks whose frame is missing.
        missing: Vec<Rank>,
        /// Time since the round was started.
        waited: Duration,
    },
    /// The round was never started, or is over.
    NotOpen,
}

/// Why a round cannot be started: the program's own mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says what it is")]
pub enum StartError {
    #[error("round {given} was started where {expected} is next")]
    OutOfOrder { given: u64, expected: u64 },
    #[error("{class} frames do not belong to rounds")]
    NotARound { class: ByteClass },
    #[error("{open} rounds are open; finish one first")]
    TooManyOpen { open: usize },
}

/// Result of looking at a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoundPoll {
    /// All payloads, by rank.
    Ready(Vec<Bytes>),
    /// Look again when a frame came, at the latest at this time.
    Pending {
        /// When the round times out.
        deadline: Duration,
    },
    /// It will not be finished.
    Failed(RoundFailure),
}

/// Result of looking at the single frames of a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FramesPoll {
    /// Frames of peers that had not been given out.
    Some(Arrivals),
    /// None have come since; look again when one has, at the latest at this time.
    Pending {
        /// When the round times out.
        deadline: Duration,
    },
    /// It will not be finished.
    Failed(RoundFailure),
}

/// Frames of a round that have come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Each peer's frame once, by rank among those given out together; this rank's own is not among them.
    pub frames: Vec<(Rank, Bytes)>,
    /// Whether every peer's frame has now been given out: the round is whole and over. Until then it may still fail, and
    /// nothing that was made from its frames may leave this rank.
    pub whole: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    class: ByteClass,
    layer: u16,
}

#[derive(Debug, Clone)]
enum Place {
    Empty,
    /// Of a rank that is not there in this epoch: nothing will come.
    Absent,
    Reserved(Tag),
    Full(Tag, Bytes),
    /// Had before the round was whole.
    Given(Tag),
}

#[derive(Debug)]
struct Slot {
    started: Option<(Tag, Duration)>,
    finished: bool,
    /// Whether its frames are asked for one by one.
    piecewise: bool,
    missing: usize,
    places: Vec<Place>,
}

#[derive(Debug, Clone)]
enum Fate {
    Alive,
    Lost(LossCause),
    Broken(Violation),
}

/// The rounds of one rank.
#[derive(Debug)]
pub struct Rounds {
    rank: Rank,
    world: usize,
    limits: RoundLimits,
    oldest: u64,
    next: u64,
    slots: VecDeque<Slot>,
    fates: Vec<Fate>,
    absent: Vec<bool>,
    early: Vec<usize>,
    /// Memory of rounds that are over, for the next ones.
    spare_places: Vec<Vec<Place>>,
    spare_payloads: Vec<Vec<Bytes>>,
}

impl Rounds {
    /// No round yet, in a world of `world` ranks of which this is `rank`.
    pub fn new(rank: Rank, world: usize, limits: RoundLimits) -> Self {
        Self {
            rank,
            world,
            limits,
            oldest: 0,
            next: 0,
            slots: VecDeque::new(),
            fates: vec![Fate::Alive; world],
            absent: vec![false; world],
            early: vec![0; world],
            spare_places: Vec::new(),
            spare_payloads: Vec::new(),
        }
    }

    /// Does without these ranks: what they would send counts as there, and empty. Call before the first round.
    pub fn set_absent(&mut self, ranks: &[Rank]) {
        ranks.iter().filter(|rank| **rank != self.rank).for_each(|rank| self.absent[rank.index()] = true);
    }

    /// Whether a rank is not there in this epoch.
    pub fn is_absent(&self, rank: Rank) -> bool {
        self.absent.get(rank.index()).copied().unwrap_or(false)
    }

    /// Number of the round that must be started next.
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// Bytes of early frames held for `peer`.
    pub fn early_bytes(&self, peer: Rank) -> usize {
        self.early[peer.index()]
    }

    /// Starts a round with this rank's payload for itself.
    pub fn start(&mut self, id: RoundId, own: Bytes, now: Duration) -> Result<(), StartError> {
        self.check_start(id)?;
        let tag = Tag { class: id.class, layer: id.layer };
        let index = self.slot(id.number);
        let slot = &mut self.slots[index];
        slot.started = Some((tag, now));
        slot.places[self.rank.index()] = Place::Full(tag, own);
        slot.missing -= 1;
        self.next += 1;
        for peer in 0..self.world {
            let (theirs, bytes) = match &self.slots[index].places[peer] {
                Place::Full(theirs, payload) if peer != self.rank.index() => (*theirs, payload.len()),
                Place::Reserved(theirs) => (*theirs, 0),
                _ => continue,
            };
            self.early[peer] -= bytes;
            if theirs != tag {
                let theirs = RoundId { number: id.number, class: theirs.class, layer: theirs.layer };
                self.break_peer(Rank::from(peer), Violation::RoundMismatch { ours: id, theirs });
            }
        }
        Ok(())
    }

    /// Whether [`Rounds::start`] would take this round.
    pub fn check_start(&self, id: RoundId) -> Result<(), StartError> {
        if !id.class.is_round() {
            return Err(StartError::NotARound { class: id.class });
        }
        if id.number != self.next {
            return Err(StartError::OutOfOrder { given: id.number, expected: self.next });
        }
        let open = self.slots.iter().filter(|slot| slot.started.is_some() && !slot.finished).count();
        if open >= self.limits.max_open {
            return Err(StartError::TooManyOpen { open });
        }
        Ok(())
    }

    /// Decides about a frame of `peer` by its header alone and, when it may come, reserves its place.
    pub fn admit(&mut self, peer: Rank, id: RoundId, length: u32) -> Result<Admission, Violation> {
        if peer.index() >= self.world || peer == self.rank {
            return Err(Violation::WrongSource { claimed: peer });
        }
        if length > self.limits.max_frame_bytes {
            return Err(Violation::Oversized { length, cap: self.limits.max_frame_bytes });
        }
        if !id.class.is_round() {
            return Err(Violation::WrongStream { class: id.class, stream: "rows" });
        }
        if id.number < self.oldest {
            return Err(Violation::Replayed { number: id.number });
        }
        let window = self.limits.window();
        if id.number - self.oldest >= window {
            return Err(Violation::TooFarAhead { number: id.number, oldest: self.oldest, window });
        }
        self.reserve(peer, id, length, self.limits.early_bytes)
    }

    /// Takes a frame of a peer of this process, whose payload is there already; true as in [`Rounds::deliver`].
    pub fn take_here(&mut self, peer: Rank, id: RoundId, payload: Bytes) -> Result<bool, Violation> {
        if id.number < self.oldest {
            return Err(Violation::Replayed { number: id.number });
        }
        self.reserve(peer, id, payload.len() as u32, usize::MAX)?;
        Ok(self.deliver(peer, id.number, payload))
    }

    fn reserve(
        &mut self,
        peer: Rank,
        id: RoundId,
        length: u32,
        early_bytes: usize,
    ) -> Result<Admission, Violation> {
        let index = self.slot(id.number);
        let tag = Tag { class: id.class, layer: id.layer };
        let slot = &mut self.slots[index];
        if slot.finished {
            return Err(Violation::Replayed { number: id.number });
        }
        if !matches!(slot.places[peer.index()], Place::Empty) {
            return Err(Violation::Duplicate { number: id.number });
        }
        match slot.started {
            Some((ours, _)) if ours != tag => {
                let ours = RoundId { number: id.number, class: ours.class, layer: ours.layer };
                return Err(Violation::RoundMismatch { ours, theirs: id });
            }
            Some(_) => {}
            None => {
                let held = self.early[peer.index()];
                if held > 0 && held.saturating_add(length as usize) > early_bytes {
                    return Ok(Admission::Hold);
                }
            }
        }
        slot.places[peer.index()] = Place::Reserved(tag);
        Ok(Admission::Take)
    }

    /// Puts the payload of an admitted frame in its place; true where somebody may wait for it: it completes a round
    /// that is open here, or one whose frames are asked for one by one.
    pub fn deliver(&mut self, peer: Rank, number: u64, payload: Bytes) -> bool {
        let Some(slot) = number.checked_sub(self.oldest).and_then(|at| self.slots.get_mut(at as usize))
        else {
            return false;
        };
        let Some(place) = slot.places.get_mut(peer.index()) else { return false };
        let Place::Reserved(tag) = *place else { return false };
        if slot.started.is_none() {
            self.early[peer.index()] += payload.len();
        }
        *place = Place::Full(tag, payload);
        slot.missing -= 1;
        (slot.missing == 0 || slot.piecewise) && slot.started.is_some()
    }

    /// Notes that nothing more will come from `peer`. The first reason given stays.
    pub fn lose_peer(&mut self, peer: Rank, cause: LossCause) {
        self.seal(peer, Fate::Lost(cause));
    }

    /// Notes that `peer` broke the protocol: nothing more of it is taken.
    pub fn break_peer(&mut self, peer: Rank, violation: Violation) {
        self.seal(peer, Fate::Broken(violation));
    }

    fn seal(&mut self, peer: Rank, fate: Fate) {
        if let Some(known @ Fate::Alive) = self.fates.get_mut(peer.index()) {
            *known = fate;
        }
    }

    /// The first peer, by rank, that is gone for another reason than that it left, with the reason.
    pub fn first_failure(&self) -> Option<RoundFailure> {
        self.fates.iter().enumerate().find_map(|(peer, fate)| match fate {
            Fate::Lost(LossCause::Left) | Fate::Alive => None,
            fate => failure_of(Rank::from(peer), fate),
        })
    }

    /// The first peer, by rank, that is gone for whatever reason. One that left in order, and of which something is
    /// still `coming` on another stream, is not gone yet.
    pub fn first_gone(&self, coming: impl Fn(Rank) -> bool) -> Option<RoundFailure> {
        self.fates.iter().enumerate().find_map(|(peer, fate)| match fate {
            Fate::Lost(LossCause::Left) if coming(Rank::from(peer)) => None,
            _ => failure_of(Rank::from(peer), fate),
        })
    }

    /// Gives a vector's memory to a round that will be given out.
    pub fn spare(&mut self, mut payloads: Vec<Bytes>) {
        if self.spare_payloads.len() < self.limits.max_open {
            payloads.clear();
            self.spare_payloads.push(payloads);
        }
    }

    /// Looks whether a started round is complete, lost or too late; a round that is given out is over. Frames that were
    /// had one by one come back empty.
    pub fn poll(&mut self, number: u64, now: Duration) -> RoundPoll {
        let (index, since) = match self.open(number) {
            Ok(open) => open,
            Err(failure) => return RoundPoll::Failed(failure),
        };
        if self.slots[index].missing == 0 {
            return RoundPoll::Ready(self.take(index));
        }
        match self.deadline(index, since, now) {
            Ok(deadline) => RoundPoll::Pending { deadline },
            Err(failure) => RoundPoll::Failed(failure),
        }
    }

    /// Looks for frames of a started round that have come and were not given out yet. The last of them end the round.
    pub fn poll_frames(&mut self, number: u64, now: Duration) -> FramesPoll {
        let (index, since) = match self.open(number) {
            Ok(open) => open,
            Err(failure) => return FramesPoll::Failed(failure),
        };
        let slot = &mut self.slots[index];
        slot.piecewise = true;
        let mut frames = Vec::new();
        for (peer, place) in slot.places.iter_mut().enumerate() {
            if let Place::Full(tag, payload) = place {
                let (tag, payload) = (*tag, std::mem::take(payload));
                *place = Place::Given(tag);
                if peer != self.rank.index() {
                    frames.push((Rank::from(peer), payload));
                }
            }
        }
        let whole = slot.missing == 0;
        if whole {
            let all = self.take(index);
            self.spare(all);
        }
        if whole || !frames.is_empty() {
            return FramesPoll::Some(Arrivals { frames, whole });
        }
        match self.deadline(index, since, now) {
            Ok(deadline) => FramesPoll::Pending { deadline },
            Err(failure) => FramesPoll::Failed(failure),
        }
    }

    /// Index and start of a round that is open and can still become whole.
    fn open(&self, number: u64) -> Result<(usize, Duration), RoundFailure> {
        let index = number.checked_sub(self.oldest).map(|at| at as usize);
        let slot = index.and_then(|index| self.slots.get(index)).filter(|slot| !slot.finished);
        let (Some(index), Some((_, since))) = (index, slot.and_then(|slot| slot.started)) else {
            return Err(RoundFailure::NotOpen);
        };
        // A frame of a wrong exchange makes the round wrong even where it is complete.
        match self.failure(index) {
            Some(failure) => Err(failure),
            None => Ok((index, since)),
        }
    }

    /// Until when an open round may be waited for.
    fn deadline(&self, index: usize, since: Duration, now: Duration) -> Result<Duration, RoundFailure> {
        let deadline = since + self.limits.timeout;
        match now < deadline {
            true => Ok(deadline),
            false => {
                let (missing, waited) = (self.missing(index), now.saturating_sub(since));
                Err(RoundFailure::Timeout { missing, waited })
            }
        }
    }

    fn failure(&self, index: usize) -> Option<RoundFailure> {
        let slot = &self.slots[index];
        (0..self.world).find_map(|peer| {
            let there = matches!(&slot.places[peer], Place::Full(tag, _) | Place::Given(tag) if slot.started.is_some_and(|s| s.0 == *tag));
            if there { None } else { failure_of(Rank::from(peer), &self.fates[peer]) }
        })
    }

    fn missing(&self, index: usize) -> Vec<Rank> {
        let places = self.slots[index].places.iter().enumerate();
        places
            .filter(|(_, place)| !matches!(place, Place::Full(..) | Place::Given(_) | Place::Absent))
            .map(|(peer, _)| Rank::from(peer))
            .collect()
    }

    fn take(&mut self, index: usize) -> Vec<Bytes> {
        let slot = &mut self.slots[index];
        slot.finished = true;
        let mut places = std::mem::take(&mut slot.places);
        let mut payloads = self.spare_payloads.pop().unwrap_or_default();
        let content = |place| if let Place::Full(_, payload) = place { payload } else { Bytes::new() };
        payloads.extend(places.drain(..).map(content));
        self.spare_places.push(places);
        while self.slots.front().is_some_and(|slot| slot.finished) {
            self.slots.pop_front();
            self.oldest += 1;
        }
        payloads
    }

    /// Index of the slot of `number`, which must not be older than the oldest; makes it if need be.
    fn slot(&mut self, number: u64) -> usize {
        let index = (number - self.oldest) as usize;
        while self.slots.len() <= index {
            let place = |absent: &bool| if *absent { Place::Absent } else { Place::Empty };
            let mut places = self.spare_places.pop().unwrap_or_default();
            places.extend(self.absent.iter().map(place));
            let missing = self.absent.iter().filter(|absent| !**absent).count();
            self.slots.push_back(Slot { started: None, finished: false, piecewise: false, missing, places });
        }
        index
    }
}

fn failure_of(peer: Rank, fate: &Fate) -> Option<RoundFailure> {
    match fate {
        Fate::Alive => None,
        Fate::Lost(cause) => Some(RoundFailure::Lost(peer, cause.clone())),
        Fate::Broken(violation) => Some(RoundFailure::Broken(peer, violation.clone())),
    }
}

#[cfg(test)]
#[path = "round_tests.rs"]
mod tests;
