//! The requests that are open, with what was told of them: enough to run them again from the start to the same tokens.
//!
//! A replayed request has the same prompt, and the tokens told so far as forced ones, which pass through decode as they
//! did before and are not told again: so every bit is the same, and what follows is what would have followed.

use crate::runtime::{Admission, Event};
use exflow_placement::Rank;
use std::collections::{BTreeMap, BTreeSet};

/// What the driver still waits for.
#[derive(Default)]
pub(crate) struct Journal {
    /// By request.
    open: BTreeMap<u32, Entry>,
    next_request: u32,
    /// Tokens told of all requests.
    tokens: u64,
    /// Ranks whose counts were asked for.
    reports: BTreeSet<Rank>,
}

struct Entry {
    admission: Admission,
    told: Vec<u32>,
}

impl Journal {
    /// Takes a request up and numbers it.
    pub(crate) fn open(&mut self, admission: Admission) -> Admission {
        let admission = Admission { request: self.next_request, ..admission };
        self.next_request += 1;
        self.open.insert(admission.request, Entry { admission: admission.clone(), told: Vec::new() });
        admission
    }

    /// Nobody waits for a request any more.
    pub(crate) fn close(&mut self, request: u32) {
        self.open.remove(&request);
    }

    /// The counts of these ranks were asked for.
    pub(crate) fn ask_reports(&mut self, ranks: impl Iterator<Item = Rank>) {
        self.reports.extend(ranks);
    }

    /// Takes note of what the driver is told.
    pub(crate) fn note(&mut self, event: &Event) {
        match event {
            Event::Token { request, token, finish, .. } => {
                self.tokens += 1;
                if finish.is_some() {
                    self.open.remove(request);
                } else if let Some(entry) = self.open.get_mut(request) {
                    entry.told.push(*token);
                }
            }
            Event::Report(rank, _) => drop(self.reports.remove(rank)),
            _ => {}
        }
    }

    /// Every open request anew, for the next epoch.
    pub(crate) fn replay(&self) -> Vec<Admission> {
        let again = |entry: &Entry| {
            let mut admission = entry.admission.clone();
            // What was forced from the start is among what was told.
            let rest = admission.forced.split_off(entry.told.len().min(admission.forced.len()));
            admission.forced = entry.told.iter().copied().chain(rest).collect();
            admission.told = entry.told.len() as u32;
            admission
        };
        self.open.values().map(again).collect()
    }

    /// Ranks whose counts were asked for and will not come any more.
    pub(crate) fn take_reports(&mut self) -> BTreeSet<Rank> {
        std::mem::take(&mut self.reports)
    }

    /// Tokens told so far: grows where a world gets on.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::FinishReason;

    fn tell(journal: &mut Journal, request: u32, token: u32, finish: Option<FinishReason>) {
        journal.note(&Event::Token { request, token, logprobs: None, finish });
    }

    #[test]
    fn what_was_told_is_forced_and_marked_as_told() {
        let mut journal = Journal::default();
        let forced = |forced: &[u32]| Admission { forced: forced.to_vec(), ..Admission::default() };
        let (a, b, c) =
            (journal.open(forced(&[])), journal.open(forced(&[5, 6, 7])), journal.open(forced(&[])));
        tell(&mut journal, a.request, 4, None);
        tell(&mut journal, b.request, 5, None);
        tell(&mut journal, c.request, 9, Some(FinishReason::Stop));
        let again = journal.replay();
        let forced: Vec<_> = again.iter().map(|a| (a.request, a.forced.clone(), a.told)).collect();
        assert_eq!(forced, [(a.request, vec![4], 1), (b.request, vec![5, 6, 7], 1)], "c has ended");
        tell(&mut journal, a.request, 8, None);
        journal.close(b.request);
        assert_eq!(journal.replay().iter().map(|a| a.forced.clone()).collect::<Vec<_>>(), [vec![4, 8]]);
        assert_eq!(journal.tokens(), 4);
    }
}
