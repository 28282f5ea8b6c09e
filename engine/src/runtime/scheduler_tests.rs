//! The policy without a device: a world of ranks whose "model" is a hash of a request's tokens, and whose cache
//! remembers which token of which request was written into each slot.

use super::*;
use crate::runtime::sequence::{Counted, FinishReason};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};

const EOS: u32 = 0;
const VOCAB: u32 = 50;
const CONTEXT: usize = 400;

/// One request and when it comes and goes, in steps.
#[derive(Debug, Clone)]
struct Wanted {
    prompt: usize,
    max_tokens: u32,
    arrives: usize,
    cancelled: Option<usize>,
}

/// The token after `tokens`: any function of them will do, as long as it depends on all.
fn next(request: u32, tokens: &[u32]) -> u32 {
    let mix = |hash: u64, token: &u32| {
        (hash ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    };
    (tokens.iter().fold(u64::from(request) + 1, mix) >> 40) as u32 % VOCAB
}

fn prompt(request: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| 1 + (request * 31 + i * 7) % (VOCAB - 1)).collect()
}

/// What a request says when nothing else runs.
fn alone(request: u32, wanted: &Wanted) -> (Vec<u32>, FinishReason) {
    let mut tokens = prompt(request, wanted.prompt);
    let mut said = Vec::new();
    loop {
        let token = next(request, &tokens);
        said.push(token);
        if token == EOS {
            return (said, FinishReason::Stop);
        }
        tokens.push(token);
        if said.len() == wanted.max_tokens as usize || tokens.len() > CONTEXT {
            return (said, FinishReason::Length);
        }
    }
}

/// Ranks in step, as the loop in rounds runs them: what a step samples is heard of during the next one, and what is
/// ordered after a step is carried out after the next one, unless there is nothing to step for.
struct World {
    scheduler: Scheduler,
    ranks: Vec<Sequences>,
    /// (request, position, token) by slot; the same on all ranks.
    cache: HashMap<u32, (u32, u32, u32)>,
    told: HashMap<u32, Vec<Counted>>,
    /// Sequences that decode next: token and position, known to the rank that sampled it.
    residents: BTreeMap<u32, (u32, u32)>,
    unheard: Vec<(u32, u32)>,
    held: Vec<Order>,
    /// Steps since a sequence that could decode last did.
    waited: usize,
    preemptions: usize,
    /// Chunks and steps of decoding, in order.
    kinds: Vec<bool>,
}

impl World {
    fn new(ranks: usize, blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new((0..ranks).map(Rank::from).collect(), VOCAB as usize),
            ranks: vec![Sequences::new(blocks, CONTEXT, vec![EOS]); ranks],
            cache: HashMap::new(),
            told: HashMap::new(),
            residents: BTreeMap::new(),
            unheard: Vec::new(),
            held: Vec::new(),
            waited: 0,
            preemptions: 0,
            kinds: Vec::new(),
        }
    }

    fn submit(&mut self, request: u32, wanted: &Wanted) {
        let prompt = prompt(request, wanted.prompt);
        let (max_tokens, known) = (wanted.max_tokens, prompt.len() as u32);
        self.scheduler.submit(Admission { request, prompt, max_tokens, known, ..Admission::default() });
    }

    /// Writes a token's slot and reads its context back.
    fn attend(&mut self, sequence: &Sequence, position: u32) {
        let text: Vec<u32> = sequence.start.prompt.iter().chain(&sequence.output).copied().collect();
        let request = sequence.start.request;
        let slot =
            |p: u32| sequence.slot(p).unwrap_or_else(|| panic!("{request}: no block for position {p}"));
        self.cache.insert(slot(position), (request, position, text[position as usize]));
        for p in 0..=position {
            let found = self.cache.get(&slot(p));
            assert_eq!(
                found,
                Some(&(request, p, text[p as usize])),
                "the context of {request} is not its own"
            );
        }
    }

    /// One step, and the plan that is made after it.
    fn step(&mut self) {
        if self.ranks[0].chunks().next().is_none() && self.ranks[0].decodable() == 0 {
            self.hear();
            self.carry_out();
        }
        let now = self.ranks[0].clone();
        let chunks: Vec<&Sequence> = now.chunks().collect();
        let decodable = !self.residents.is_empty();
        assert!(self.residents.len() <= now.decodable(), "room is made for fewer rows than there are");
        self.waited = if decodable && !chunks.is_empty() { self.waited + 1 } else { 0 };
        assert!(self.waited <= 1, "a prompt stalls those that decode");
        let mut sampled = Vec::new();
        let mut tokens = 0;
        for sequence in &chunks {
            tokens += sequence.chunk().len();
            sequence.chunk().for_each(|position| self.attend(sequence, position));
            if sequence.ordered as usize == sequence.start.prompt.len() {
                sampled.push((sequence.start.id, next(sequence.start.request, &sequence.start.prompt)));
            }
        }
        assert!(tokens <= if decodable { CHUNK_BESIDE_DECODE } else { CHUNK });
        let decodes = chunks.is_empty();
        self.hear();
        if decodes {
            for (id, (token, position)) in std::mem::take(&mut self.residents) {
                let sequence = self.ranks[0].running[&id].clone();
                assert_eq!(sequence.next_token(), Some((token, position)), "what is fed is what was sampled");
                self.attend(&sequence, position);
                let text = [&sequence.start.prompt[..], &sequence.output].concat();
                sampled.push((id, next(sequence.start.request, &text)));
            }
        }
        if !decodes || decodable {
            self.kinds.push(!decodes);
        }
        for &(id, token) in &sampled {
            self.residents.extend(self.ranks[0].successor(id, token).map(|next| (id, next)));
        }
        self.ranks.iter_mut().for_each(|rank| rank.stepped(decodes));
        self.carry_out();
        (self.unheard, self.held) = (sampled, self.scheduler.plan(&self.ranks[0]));
    }

    fn hear(&mut self) {
        for (id, token) in std::mem::take(&mut self.unheard) {
            let counted: Vec<_> = self.ranks.iter_mut().map(|rank| rank.sampled(id, token)).collect();
            if let Some(counted) = counted[0].filter(|c| c.new) {
                self.told.entry(counted.request).or_default().push(counted);
            }
        }
    }

    fn carry_out(&mut self) {
        let oldest = self.ranks[0].running.values().map(|s| s.start.request).min();
        let orders = std::mem::take(&mut self.held);
        for rank in 0..self.ranks.len() {
            for order in &orders {
                let gone = self.ranks[rank].apply(order.clone()).expect("rank 0 has ruled it out");
                self.ranks[rank].check();
                if let (0, Order::Preempt(_), Some(gone)) = (rank, order, gone) {
                    let gives_way = !gone.stale && Some(gone.start.request) == oldest;
                    assert!(!gives_way, "the oldest never gives way");
                    self.preemptions += 1;
                    self.scheduler.put_back(gone);
                }
            }
        }
        assert!(self.ranks.windows(2).all(|two| two[0] == two[1]), "ranks disagree");
        let running = &self.ranks[0].running;
        self.residents.retain(|id, _| running.contains_key(id));
    }

    fn is_done(&self) -> bool {
        self.scheduler.is_idle() && self.held.is_empty() && self.ranks[0].running.is_empty()
    }
}

/// Runs all requests to their ends; each says what it says alone, once.
fn run(ranks: usize, blocks: usize, requests: &[Wanted]) -> World {
    let mut world = World::new(ranks, blocks);
    let last = requests.iter().map(|w| w.arrives.max(w.cancelled.unwrap_or(0))).max().unwrap_or(0);
    // Every request alone, replayed as often as there are others, is more than it may take.
    let work: usize = requests.iter().map(|w| 4 + 2 * w.prompt + 2 * w.max_tokens as usize).sum();
    let patience = last + work * (1 + requests.len());
    for step in 0.. {
        for (request, wanted) in requests.iter().enumerate() {
            if wanted.arrives == step {
                world.submit(request as u32, wanted);
            }
            if wanted.cancelled == Some(step) {
                world.scheduler.cancel(request as u32);
            }
        }
        world.step();
        if step > last && world.is_done() {
            break;
        }
        assert!(step < patience, "it does not end");
    }
    assert_eq!(world.ranks[0].free(), blocks, "all blocks came back");
    for (request, wanted) in requests.iter().enumerate() {
        let (expected, finish) = alone(request as u32, wanted);
        let told = world.told.remove(&(request as u32)).unwrap_or_default();
        let tokens: Vec<u32> = told.iter().map(|c| c.token).collect();
        if wanted.cancelled.is_some() {
            assert!(expected.starts_with(&tokens), "{request} said other things until it was cancelled");
        } else {
            assert_eq!(tokens, expected, "{request}");
            assert_eq!(told.last().and_then(|c| c.finish), Some(finish), "{request}");
        }
    }
    world
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let cancelled = prop_oneof![4 => Just(None), 1 => (0usize..60).prop_map(Some)];
    (1usize..200, 1u32..60, 0usize..40, cancelled).prop_map(|(prompt, max_tokens, arrives, cancelled)| {
        Wanted { prompt, max_tokens, arrives, cancelled: cancelled.map(|after| arrives + after) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// However scarce blocks are, and whoever comes and goes: every request says what it says alone.
    #[test]
    fn every_request_says_what_it_says_alone(
        requests in prop::collection::vec(wanted(), 1..12),
        ranks in 1usize..4,
        spare in 0usize..30,
    ) {
        // Each must fit alone: that is checked when it is submitted.
        let longest = requests.iter().map(|w| w.prompt + w.max_tokens as usize).max().unwrap_or(1);
        run(ranks, longest.min(CONTEXT).div_ceil(BLOCK) + spare, &requests);
    }
}

fn request(prompt: usize, max_tokens: u32, arrives: usize) -> Wanted {
    Wanted { prompt, max_tokens, arrives, cancelled: None }
}

#[test]
fn scarce_blocks_preempt_the_youngest() {
    let requests: Vec<Wanted> = (0..16).map(|i| request(40, 60, i)).collect();
    let ample = run(2, 100, &requests);
    assert_eq!(ample.preemptions, 0, "there is room for all");
    let scarce = run(2, 9, &requests);
    assert!(scarce.preemptions > 0, "texts of up to seven blocks share nine");
}

#[test]
fn a_long_prompt_is_prefilled_beside_those_that_decode() {
    // A cache of many contexts; the second prompt takes several chunks.
    let mut world = World::new(1, 400);
    let long = request(CONTEXT - 20, 5, 0);
    world.submit(0, &request(5, 60, 0));
    (0..4).for_each(|_| world.step());
    for i in 1..8 {
        world.submit(i, &long);
    }
    (0..40).for_each(|_| world.step());
    let chunks: Vec<usize> = (0..world.kinds.len()).filter(|&i| world.kinds[i]).collect();
    assert!(chunks.len() > 8, "{:?}", world.kinds);
    assert!(chunks.windows(2).all(|two| two[1] > two[0] + 1), "they take turns: {:?}", world.kinds);
}

#[test]
fn a_text_that_outgrows_its_keys_is_replayed_once() {
    let requests: Vec<Wanted> = [(20, 30), (39, 9), (41, 30), (40, 30), (10, 5)]
        .iter()
        .map(|&(prompt, max_tokens)| request(prompt, max_tokens, 0))
        .collect();
    let mut world = World::new(2, 60);
    world.ranks.iter_mut().for_each(|rank| *rank = rank.clone().remade_beyond(Some(40)));
    requests.iter().zip(0..).for_each(|(wanted, request)| world.submit(request, wanted));
    let mut known = HashMap::new();
    while !world.is_done() {
        world.step();
        for sequence in world.ranks[0].running.values() {
            assert!(
                sequence.tokens() <= 40
                    || sequence.stale
                    || sequence.start.known > 40
                    || sequence.finished.is_some()
            );
            known.insert(sequence.start.request, sequence.start.known);
        }
    }
    for (request, wanted) in requests.iter().enumerate() {
        let request = request as u32;
        let said: Vec<u32> = world.told[&request].iter().map(|c| c.token).collect();
        assert_eq!(said, alone(request, wanted).0, "told once, and the same");
        let grew = wanted.prompt <= 40 && wanted.prompt + said.len() > 41;
        let expected = if grew { 41 } else { wanted.prompt as u32 };
        assert_eq!(known[&request], expected, "{request}");
    }
    assert!(world.preemptions > 0);
}

#[test]
fn many_start_together_and_leave_one_by_one() {
    let requests: Vec<Wanted> = (0..20).map(|i| request(10, 5 + i, 0)).collect();
    let world = run(1, 200, &requests);
    // One chunk for all of them, and as many steps as the longest takes.
    assert_eq!(world.kinds.iter().filter(|chunk| **chunk).count(), 1);
    assert!(world.kinds.len() <= 1 + 25, "{}", world.kinds.len());
}
