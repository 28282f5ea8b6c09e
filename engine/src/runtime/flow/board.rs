//! What a rank knows of tokens under way, without device, wire or clock: which it can work on now, which still wait for
//! partials, and what came before its time.
//!
//! A token between two layers is a member of a [`Unit`] on exactly one rank, its residence. Ranks that only serve some
//! of its experts hold a [`Serve`] each. Nothing here is ordered between peers: a partial may come before its row, and
//! either before rank 0's word that the sequence exists, or after the word that it ended.

pub(crate) use super::items::{Lack, Picked, Ready, Serve, Spent, Token, Unit};

use super::super::frames::{PartialFrame, RowFrame};
use exflow_placement::Rank;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// A frame of a sequence that rank 0 has not announced here yet.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Early<K> {
    Row {
        layer: u16,
        prefill: bool,
        frame: RowFrame,
    },
    Partial {
        layer: u16,
        frame: PartialFrame,
    },
    /// Something else of the sequence, which the board hands back.
    Other(K),
}

/// How a sequence stands at this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Rank 0's word of it has not come yet.
    Unheard,
    Running,
    Ended,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Board<K> {
    me: Rank,
    /// By first token.
    units: BTreeMap<(u32, u32), Unit>,
    /// The first position of the unit that a position is in, where units have several.
    chunks: HashMap<(u32, u32), u32>,
    serves: Vec<Serve>,
    /// Partials that overtook their row, by (sequence, position, layer).
    orphans: HashMap<(u32, u32, u16), Vec<PartialFrame>>,
    early: HashMap<u32, Vec<Early<K>>>,
    running: BTreeSet<u32>,
    /// Ids below are known, and so are those above.
    known_below: u32,
    known: BTreeSet<u32>,
    /// Frames of sequences that had ended.
    pub(crate) dropped: u64,
    picks: u64,
    was_prefill: bool,
    /// Whether what is ready is held back at the moment.
    holds: bool,
    /// As the caller told it last.
    now: Duration,
    /// Whether experts of prompts run apart from their tokens.
    apart: bool,
}

/// Who has waited for so many picks goes next, wherever it is in the model.
pub(crate) const PATIENCE: u64 = 16;
/// Rows of one pick, unless a single unit has more.
const MOST_ROWS: usize = 256;

impl<K> Board<K> {
    pub(crate) fn new(me: Rank) -> Self {
        Self {
            me,
            units: BTreeMap::new(),
            chunks: HashMap::new(),
            serves: Vec::new(),
            orphans: HashMap::new(),
            early: HashMap::new(),
            running: BTreeSet::new(),
            known_below: 0,
            known: BTreeSet::new(),
            dropped: 0,
            picks: 0,
            was_prefill: false,
            holds: false,
            now: Duration::ZERO,
            apart: false,
        }
    }

    /// Has experts of prompts run apart from their tokens in any case: other ranks need what they make.
    pub(crate) fn apart(self, apart: bool) -> Self {
        Self { apart, ..self }
    }

    /// Tells the time, by which waits are accounted for.
    pub(crate) fn tick(&mut self, now: Duration) {
        self.now = now;
    }

    /// How a sequence stands here.
    pub(crate) fn standing(&self, sequence: u32) -> Standing {
        match self.running.contains(&sequence) {
            true => Standing::Running,
            false if sequence < self.known_below || self.known.contains(&sequence) => Standing::Ended,
            false => Standing::Unheard,
        }
    }

    /// Rank 0 announced a sequence: takes in the frames of it that came before, and hands back the others.
    pub(crate) fn admit(&mut self, sequence: u32) -> Vec<K> {
        self.running.insert(sequence);
        self.known.insert(sequence);
        while self.known.remove(&self.known_below) {
            self.known_below += 1;
        }
        let mut others = Vec::new();
        for early in self.early.remove(&sequence).unwrap_or_default() {
            match early {
                Early::Row { layer, prefill, frame } => self.row(layer, prefill, frame),
                Early::Partial { layer, frame } => self.partial(layer, frame),
                Early::Other(other) => others.push(other),
            }
        }
        others
    }

    /// Rank 0 ended a sequence: what there is of it goes, what comes of it from now on is dropped.
    pub(crate) fn end(&mut self, sequence: u32) {
        self.running.remove(&sequence);
        self.units.retain(|(id, _), _| *id != sequence);
        self.chunks.retain(|(id, _), _| *id != sequence);
        self.serves.retain(|serve| serve.frame.sequence != sequence);
        self.orphans.retain(|(id, _, _), _| *id != sequence);
        self.early.remove(&sequence);
    }

    /// Keeps something of a sequence that is not known yet, counts it where the sequence ended, and hands it back where
    /// it runs.
    pub(crate) fn other(&mut self, sequence: u32, other: K) -> Option<K> {
        match self.standing(sequence) {
            Standing::Running => return Some(other),
            Standing::Unheard => self.early.entry(sequence).or_default().push(Early::Other(other)),
            Standing::Ended => self.dropped += 1,
        }
        None
    }

    /// A token begins here.
    pub(crate) fn start(&mut self, prefill: bool, tokens: Vec<Token>) {
        self.put(Unit { since: self.picks, ..Unit::new(0, prefill, tokens) });
    }

    fn put(&mut self, mut unit: Unit) {
        (unit.spent, unit.until) = (Spent::default(), self.now);
        let (sequence, first) = unit.key();
        if unit.tokens.len() > 1 {
            self.chunks.extend(unit.tokens.iter().map(|token| ((sequence, token.position), first)));
        }
        self.units.insert((sequence, first), unit);
    }

    /// A row came, for experts of `layer`.
    pub(crate) fn row(&mut self, layer: u16, prefill: bool, frame: RowFrame) {
        match self.standing(frame.sequence) {
            Standing::Running => {}
            Standing::Ended => return self.dropped += 1,
            Standing::Unheard => {
                let early = Early::Row { layer, prefill, frame };
                return self.early.entry(early.sequence()).or_default().push(early);
            }
        }
        let stage = usize::from(layer) + 1;
        if frame.next != self.me {
            self.serves.push(Serve::at(stage, prefill, frame, self.picks, self.now));
            return;
        }
        let mut token = Token {
            sequence: frame.sequence,
            position: frame.position,
            id: 0,
            edition: frame.edition,
            main: Some(frame.main),
            residual: frame.residual,
            choices: frame.choices,
            partials: Vec::new(),
            missing: frame.expects,
        };
        self.split(stage, prefill, &mut token);
        for orphan in self.orphans.remove(&(token.sequence, token.position, layer)).unwrap_or_default() {
            token.add(orphan);
        }
        self.put(Unit { since: self.picks, ..Unit::new(stage, prefill, vec![token]) });
    }

    /// Experts that are here run at once also where a token waits for other ranks' partials.
    fn split(&mut self, stage: usize, prefill: bool, token: &mut Token) {
        let apart = prefill && self.apart;
        if token.choices.is_empty() || (token.missing == 0 && !apart) {
            return;
        }
        token.missing += token.choices.len() as u16;
        let frame = RowFrame {
            sequence: token.sequence,
            position: token.position,
            edition: token.edition,
            next: self.me,
            main: token.main.unwrap_or(self.me),
            expects: 0,
            choices: std::mem::take(&mut token.choices),
            residual: token.residual.clone(),
        };
        self.serves.push(Serve::at(stage, prefill, frame, self.picks, self.now));
    }

    /// A partial of an expert of `layer` came.
    pub(crate) fn partial(&mut self, layer: u16, frame: PartialFrame) {
        let (sequence, position) = (frame.sequence, frame.position);
        match self.standing(sequence) {
            Standing::Running => {}
            Standing::Ended => return self.dropped += 1,
            Standing::Unheard => {
                return self.early.entry(sequence).or_default().push(Early::Partial { layer, frame });
            }
        }
        let first = self.chunks.get(&(sequence, position)).copied().unwrap_or(position);
        let (picks, now) = (self.picks, self.now);
        match self.units.get_mut(&(sequence, first)).filter(|unit| unit.stage == usize::from(layer) + 1) {
            Some(unit) => {
                unit.tokens[(position - first) as usize].add(frame);
                unit.since = picks;
                unit.account(now, |spent| &mut spent.partials);
            }
            None => self.orphans.entry((sequence, position, layer)).or_default().push(frame),
        }
    }

    /// A unit that was picked goes on to its next layer, its tokens with what their routes say of this rank.
    pub(crate) fn go_on(&mut self, mut unit: Unit) {
        unit.stage += 1;
        unit.since = self.picks;
        let (stage, prefill) = (unit.stage, unit.prefill);
        for token in &mut unit.tokens {
            self.split(stage, prefill, token);
            // In the exact order of coming, a partial can be here before this rank has taken note of the row.
            let key = (token.sequence, token.position, stage as u16 - 1);
            for orphan in self.orphans.remove(&key).unwrap_or_default() {
                token.add(orphan);
            }
        }
        self.put(unit);
    }

    /// Takes off the board what is to be done next: all that is ready at one layer.
    #[cfg(test)]
    pub(crate) fn pick(&mut self, lacks: impl Fn(&Unit) -> Lack) -> Option<Picked> {
        let ready = self.ready(lacks)?;
        Some(self.take(ready))
    }

    /// What is to be done next: all that is ready at one layer. `lacks` says what a unit that has all its partials still
    /// needs.
    ///
    /// The earliest layer goes first, so that those behind catch up and share launches; but nobody waits for more than
    /// a bounded number of picks, and prompts and decoded tokens take turns.
    pub(crate) fn ready(&mut self, lacks: impl Fn(&Unit) -> Lack) -> Option<Ready> {
        let (now, held_back) = (self.now, self.holds);
        let cause: fn(&mut Spent) -> &mut Duration =
            if held_back { |spent| &mut spent.linger } else { |spent| &mut spent.queue };
        let mut held = Duration::ZERO;
        let mut all = Vec::new();
        let mut units = Vec::new();
        for (key, unit) in self.units.iter_mut().filter(|(_, unit)| unit.is_whole()) {
            match lacks(unit) {
                Lack::Nothing => {
                    unit.account(now, cause);
                    held = held.max(unit.spent.linger);
                    units.push((*key, unit.stage, unit.prefill));
                    all.push((unit.stage, unit.prefill, unit.since, unit.tokens.len()));
                }
                Lack::Context => unit.account(now, |spent| &mut spent.context),
                Lack::Ids => unit.account(now, |spent| &mut spent.ids),
            }
        }
        for serve in &mut self.serves {
            let passed = now.saturating_sub(std::mem::replace(&mut serve.until, now));
            serve.held += if held_back { passed } else { Duration::ZERO };
            held = held.max(serve.held);
            all.push((serve.stage, serve.prefill, serve.since, 1));
        }
        let Some(oldest) = all.iter().min_by_key(|(_, _, since, _)| *since) else {
            self.holds = false;
            return None;
        };
        let (stage, prefill) = match self.picks - oldest.2 >= PATIENCE {
            true => (oldest.0, oldest.1),
            false => {
                let turn = !self.was_prefill;
                let first = all.iter().min_by_key(|(stage, prefill, ..)| (*prefill != turn, *stage))?;
                (first.0, first.1)
            }
        };
        let chosen = |at: (usize, bool)| at == (stage, prefill);
        Some(Ready {
            stage,
            prefill,
            rows: all.iter().filter(|(s, p, ..)| chosen((*s, *p))).map(|(.., rows)| rows).sum(),
            all: all.iter().map(|(.., rows)| rows).sum(),
            held,
            units: units.into_iter().filter(|(_, s, p)| chosen((*s, *p))).map(|(key, ..)| key).collect(),
        })
    }

    /// What is ready is not taken yet: from now until it is, its waiting is this rank's own choice.
    pub(crate) fn hold(&mut self) {
        self.holds = true;
    }

    /// Takes what is ready off the board.
    pub(crate) fn take(&mut self, ready: Ready) -> Picked {
        let Ready { stage, prefill, units, .. } = ready;
        self.picks += 1;
        (self.was_prefill, self.holds) = (prefill, false);
        let mut picked = Picked { stage, prefill, ..Picked::default() };
        for key in units {
            if picked.rows() > 0 && picked.rows() >= MOST_ROWS {
                break;
            }
            if let Some(unit) = self.units.remove(&key) {
                if unit.tokens.len() > 1 {
                    for token in &unit.tokens {
                        self.chunks.remove(&(key.0, token.position));
                    }
                }
                picked.units.push(unit);
            }
        }
        let mut left = MOST_ROWS.saturating_sub(picked.rows()).max(usize::from(picked.units.is_empty()));
        let mut rest = Vec::new();
        for serve in self.serves.drain(..) {
            match (serve.stage, serve.prefill) == (stage, prefill) && left > 0 {
                true => {
                    left -= 1;
                    picked.serves.push(serve);
                }
                false => rest.push(serve),
            }
        }
        self.serves = rest;
        picked
    }

    /// Whether tokens of a sequence are being prefilled here.
    pub(crate) fn prefills(&self, sequence: u32) -> bool {
        self.units.range((sequence, 0)..=(sequence, u32::MAX)).any(|(_, unit)| unit.prefill)
    }

    /// Whether nothing is under way here.
    pub(crate) fn is_empty(&self) -> bool {
        self.units.is_empty() && self.serves.is_empty()
    }

    /// A token that waits, for an error that says so: (sequence, position, the layer that it is to enter, partials
    /// that it misses).
    pub(crate) fn waiting(&self) -> Option<(u32, u32, usize, u16)> {
        let unit = self.units.values().min_by_key(|unit| unit.since)?;
        let token = unit.tokens.iter().find(|t| t.missing > 0).unwrap_or(&unit.tokens[0]);
        Some((token.sequence, token.position, unit.stage, token.missing))
    }
}

impl<K> Early<K> {
    fn sequence(&self) -> u32 {
        match self {
            Self::Row { frame, .. } => frame.sequence,
            Self::Partial { frame, .. } => frame.sequence,
            Self::Other(_) => u32::MAX,
        }
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
pub(super) mod tests;
