//! What a hop sends in [flow](super), when it comes, and what handling messages takes of whom.

use super::super::FRAME_BYTES;
use super::{Event, Item, Play};
use crate::runtime::{BULK_BYTES, BULK_HOPS};

/// Keys and values that wait for more before they are handed over together, as the engine's do.
#[derive(Default)]
pub(super) struct Bulk {
    hops: u32,
    bytes: f64,
    /// To whom.
    pub(super) to: Vec<usize>,
}

impl Bulk {
    fn is_due(&self) -> bool {
        self.hops >= BULK_HOPS || self.bytes >= BULK_BYTES as f64
    }
}

/// What a hop sends, by rank that it goes to.
pub(super) struct Post {
    pub(super) rows: Vec<Vec<Item>>,
    pub(super) partials: Vec<Vec<usize>>,
    pub(super) kv: Vec<Vec<(usize, usize)>>,
    /// Whether tokens came out, of which every rank is told.
    pub(super) sampled: bool,
}

impl Post {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            rows: vec![Vec::new(); ranks],
            partials: vec![Vec::new(); ranks],
            kv: vec![Vec::new(); ranks],
            sampled: false,
        }
    }
}

impl Play<'_> {
    /// Which share of what other threads do takes of the time of a rank: nothing while a core is left beside those that work,
    /// and so many more.
    pub(super) fn short_of_cores(&self, rank: usize, more: f64) -> f64 {
        (self.working() + more + 1.0 - self.of.measured.lanes(rank)).clamp(0.0, 1.0)
    }

    /// Sends what a hop yields, a frame to each peer and class; the rank is free when all is handed over.
    pub(super) fn deliver(&mut self, rank: usize, post: Post) {
        // Whom rows or partials wake, and who hears of something behind whatever it does.
        let (mut told, mut behind): (Vec<usize>, Vec<usize>) = Default::default();
        for to in 0..self.ranks.len() {
            if to == rank {
                post.partials[to]
                    .iter()
                    .for_each(|&sequence| self.at(self.now, Event::Partial { sequence, to }));
                continue;
            }
            if !post.rows[to].is_empty() {
                self.dispatch(rank, to, &post.rows[to]);
                told.push(to);
            }
            if !post.partials[to].is_empty() {
                self.combine(rank, to, &post.partials[to]);
                told.push(to);
            }
            if !post.kv[to].is_empty() {
                self.spread(rank, to, &post.kv[to]);
            }
        }
        let bulk = &mut self.ranks[rank].bulk;
        bulk.hops += u32::from(post.kv.iter().any(|kv| !kv.is_empty()));
        if bulk.is_due() {
            behind.append(&mut std::mem::take(bulk).to);
        }
        if post.sampled {
            behind.extend((0..self.ranks.len()).filter(|to| *to != rank));
        }
        // What goes to a peer at once goes together.
        for peers in [&mut told, &mut behind] {
            peers.sort_unstable();
            peers.dedup();
        }
        behind.retain(|to| !told.contains(to));
        self.hand_over(rank, &told, &behind);
    }

    /// Charges the messages of a hop to those that they keep from working, and lets the rank go on.
    fn hand_over(&mut self, rank: usize, told: &[usize], behind: &[usize]) {
        self.ranks[rank].busy = false;
        // Other threads handle messages, also those of a rank that rests, and who goes on has the fewer cores meanwhile.
        let goes_on = self.ranks[rank].board.iter().any(|item| item.ready <= self.now);
        let of = |to: &usize| self.of.measured.link(rank, *to).message_s;
        let resting = behind.iter().filter(|to| goes_on && !self.ranks[**to].busy);
        let handled: f64 = told.iter().chain(behind).chain(resting).map(of).sum();
        let handling = handled * self.short_of_cores(rank, f64::from(u8::from(goes_on)));
        told.iter().for_each(|&to| self.owes(rank, to));
        behind.iter().for_each(|&to| self.tells(rank, to));
        if handling > 0.0 {
            self.ranks[rank].busy = true;
            return self.at(self.now + handling, Event::Done { rank, picked: Vec::new() });
        }
        self.ranks[rank].rests = self.now;
        self.pick(rank);
    }

    /// Rows, in a frame of theirs.
    fn dispatch(&mut self, rank: usize, to: usize, rows: &[Item]) {
        let bytes: f64 = rows.iter().map(|item| self.of.shape.row_bytes(item.choices)).sum();
        let bytes = bytes + 2.0 + FRAME_BYTES;
        let time = self.now + self.of.measured.link(rank, to).seconds(bytes);
        self.sums.dispatch += bytes;
        self.sums.crossings += rows.len() as f64;
        for &item in rows {
            self.sums.travel += if item.token { time - self.now } else { 0.0 };
            self.at(time, Event::Row { to, item });
        }
    }

    /// Partial sums of these sequences, in a frame of theirs.
    fn combine(&mut self, rank: usize, to: usize, partials: &[usize]) {
        let bytes = 2.0 + FRAME_BYTES + partials.len() as f64 * self.of.shape.partial_bytes();
        let time = self.now + self.of.measured.link(rank, to).seconds(bytes);
        self.sums.combine += bytes;
        self.sums.crossings += partials.len() as f64;
        partials.iter().for_each(|&sequence| self.at(time, Event::Partial { sequence, to }));
    }

    /// A message from a rank takes of the time of the one that gets it.
    fn owes(&mut self, rank: usize, to: usize) {
        self.ranks[to].owed += self.of.measured.link(rank, to).message_s;
    }

    /// A rank that rests handles a message that does not wake it while it rests.
    pub(super) fn tells(&mut self, rank: usize, to: usize) {
        if self.ranks[to].busy {
            self.owes(rank, to);
        }
    }

    /// Keys and values, one after the other over the rank's link.
    fn spread(&mut self, rank: usize, to: usize, made: &[(usize, usize)]) {
        let link = self.of.measured.link(rank, to);
        let bytes = FRAME_BYTES + made.len() as f64 * self.of.shape.kv_bytes;
        self.sums.kv += bytes;
        let (state, uplink) = (&mut self.ranks[rank], self.of.measured.uplink(rank));
        state.bulk_free = state.bulk_free.max(self.now) + bytes / uplink;
        let time = state.bulk_free + link.latency_s;
        state.bulk.bytes += bytes;
        if !state.bulk.to.contains(&to) {
            state.bulk.to.push(to);
        }
        for &(sequence, layer) in made {
            let at = self.context(sequence, layer, to);
            self.contexts[at] = self.contexts[at].max(time);
        }
    }
}
