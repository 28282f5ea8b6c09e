//! What worlds without devices are made of: a model whose sums are exact, so that nobody's tokens are right by chance, and a
//! network that delivers in any order that keeps each link's.

use super::board::{Serve, Token};
use crate::runtime::frames::Choice;
use exflow_placement::{ExpertId, LayerId, PlacementTable, Rank, Route, Strategy};
use std::collections::{BTreeMap, VecDeque};

pub(super) const LAYERS: usize = 4;
pub(super) const EXPERTS: usize = 6;
pub(super) const PROMPT: u32 = 3;

pub(super) fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9, |h, p| {
        let h = (h ^ p).wrapping_mul(0xd134_2543_de82_ef95);
        h ^ (h >> 29)
    })
}

/// Whole numbers, so that no order of adding changes a sum; what is tested is that nothing is added twice or not.
fn whole(parts: &[u64]) -> f32 {
    (mix(parts) % 1000) as f32
}

pub(super) fn embed(id: u32, position: u32) -> f32 {
    whole(&[1, u64::from(id), u64::from(position)])
}

pub(super) fn attend(layer: usize, x: f32, context: f32) -> f32 {
    (x + whole(&[2, layer as u64]) + context) % 4096.0
}

pub(super) fn made(layer: usize, x: f32) -> f32 {
    whole(&[3, layer as u64, x as u64])
}

pub(super) fn choose(layer: usize, x: f32, top_k: usize) -> Vec<Choice> {
    let first = mix(&[4, layer as u64, x as u64]) as usize % EXPERTS;
    let choice =
        |k| Choice { k: k as u16, expert: ((first + k * 2) % EXPERTS) as u16, weight: (top_k - k) as f32 };
    (0..top_k).map(choice).collect()
}

pub(super) fn serve(layer: usize, choice: &Choice, x: f32) -> f32 {
    choice.weight * whole(&[5, layer as u64, u64::from(choice.expert), x as u64])
}

pub(super) fn sample(x: f32) -> u32 {
    mix(&[6, x as u64]) as u32 % 64
}

/// What one rank says.
pub(super) fn alone(sequence: u32, tokens: usize, top_k: usize) -> Vec<u32> {
    let mut kv = [0.0; LAYERS];
    let mut out = Vec::new();
    for position in 0..PROMPT + tokens as u32 - 1 {
        let id = out.last().copied().filter(|_| position >= PROMPT).unwrap_or(sequence * 7 + position);
        let mut x = embed(id, position);
        for (layer, kv) in kv.iter_mut().enumerate() {
            x = attend(layer, x, *kv % 64.0);
            *kv += made(layer, x);
            x += choose(layer, x, top_k).iter().map(|c| serve(layer, c, x)).sum::<f32>();
        }
        if position + 1 >= PROMPT {
            out.push(sample(x));
        }
    }
    out
}

/// The residual stream of a token that enters `stage`: as embedded, or with what each of its experts made, which all have to
/// be there, once.
pub(super) fn entering(token: &Token, stage: usize, top_k: usize) -> f32 {
    let Some(layer) = stage.checked_sub(1) else { return embed(token.id, token.position) };
    let x = token.residual[0];
    let own: f32 = token.choices.iter().map(|c| serve(layer, c, x)).sum();
    assert_eq!(token.choices.len() + token.partials.len(), top_k, "each expert once");
    x + own + token.partials.iter().map(|p| p.1[0]).sum::<f32>()
}

/// What a layer's experts make of rows that came for them.
pub(super) fn served_values(layer: usize, serves: &[Serve]) -> Vec<f32> {
    let of = |s: &Serve| {
        let x = s.frame.residual[0];
        s.frame.choices.iter().map(|c| serve(layer, c, x)).collect::<Vec<_>>()
    };
    serves.iter().flat_map(of).collect()
}

/// The choices of a row on rank `me`, and its route by `table`.
pub(super) fn routed(
    table: &PlacementTable,
    (strategy, top_k): (Strategy, usize),
    (layer, me): (usize, Rank),
    x: f32,
) -> (Vec<Choice>, Route) {
    let choices = choose(layer, x, top_k);
    let experts: Vec<_> = choices.iter().map(|c| ExpertId(c.expert)).collect();
    let weights: Vec<_> = choices.iter().map(|c| c.weight).collect();
    let route = table.route(strategy, LayerId::from(layer), me, &experts, &weights);
    (choices, route)
}

/// From a rank to another.
pub(super) type Link = (usize, usize);

/// What is on its way: rows and whatever else goes with them, and keys and values beside.
pub(super) struct Net<Wire, Kv> {
    pub(super) rows: BTreeMap<Link, VecDeque<Wire>>,
    pub(super) bulk: BTreeMap<Link, VecDeque<Kv>>,
    random: u64,
    /// Keys and values go only where nothing else can.
    starve: bool,
}

/// What may happen.
#[derive(Clone, Copy)]
pub(super) enum Next {
    /// The first message of a link comes.
    Row(Link),
    /// The first keys and values of a link come.
    Kv(Link),
    /// A rank looks whether it has work.
    Work(usize),
}

impl<Wire, Kv> Net<Wire, Kv> {
    pub(super) fn new(seed: u64, starve: bool) -> Self {
        Self { rows: BTreeMap::new(), bulk: BTreeMap::new(), random: seed, starve }
    }

    pub(super) fn tell(&mut self, from: usize, to: usize, wire: Wire) {
        self.rows.entry((from, to)).or_default().push_back(wire);
    }

    /// Keys and values to all others of `ranks`.
    pub(super) fn spread(&mut self, from: usize, ranks: usize, kv: Kv)
    where
        Kv: Clone,
    {
        for to in (0..ranks).filter(|to| *to != from) {
            self.bulk.entry((from, to)).or_default().push_back(kv.clone());
        }
    }

    /// All that may happen now, from a random one on.
    pub(super) fn next(&mut self, ranks: usize) -> Vec<Next> {
        fn full<T>(of: &BTreeMap<Link, VecDeque<T>>) -> impl Iterator<Item = Link> {
            of.iter().filter(|(_, queue)| !queue.is_empty()).map(|(link, _)| *link)
        }
        let mut all: Vec<Next> = full(&self.rows).map(Next::Row).collect();
        let bulk: Vec<Next> = full(&self.bulk).map(Next::Kv).collect();
        all.extend((0..ranks).map(Next::Work));
        if !self.starve {
            all.extend(&bulk);
        }
        self.random = mix(&[self.random, 17]);
        let first = (self.random >> 7) as usize % all.len();
        all.rotate_left(first);
        if self.starve {
            all.extend(&bulk);
        }
        all
    }

    pub(super) fn row(&mut self, link: Link) -> Wire {
        self.rows.get_mut(&link).and_then(VecDeque::pop_front).expect("it is on its way")
    }

    pub(super) fn kv(&mut self, link: Link) -> Kv {
        self.bulk.get_mut(&link).and_then(VecDeque::pop_front).expect("it is on its way")
    }
}
