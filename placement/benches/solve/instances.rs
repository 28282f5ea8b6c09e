//! The benchmark's instances, by name: `LxExR[kK][+wrap][@hosts|@mixed][#model]`, each made by the seeded generator.

use exflow_placement::{Affinity, Generator, Topology};

/// Tokens that are drawn for every expert of a layer: enough that counts are more signal than noise.
const TOKENS_PER_EXPERT: usize = 1200;
/// A top-8 token has 64 pairs a layer: fewer of them say as much.
const TOKENS_PER_EXPERT_TOP8: usize = 24;

/// Counts and ranks, with the name that they were made from.
pub struct Instance {
    pub name: String,
    pub affinity: Affinity,
    pub topology: Topology,
}

/// What a name says.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape<'n> {
    sizes: [usize; 3],
    k: usize,
    wrap: bool,
    links: &'n str,
    model: u64,
}

/// The instance of this name; none where the name is not of the form.
pub fn build(name: &str) -> Option<Instance> {
    let Shape { sizes: [layers, experts, ranks], k, wrap, links, model } = parse(name)?;
    let topology = match links {
        "" => Topology::uniform(ranks),
        "mixed" if ranks == 6 => mixed(experts),
        hosts => {
            let hosts: usize = hosts.parse().ok().filter(|&n| n > 0 && ranks % n == 0)?;
            Topology::hosts(hosts, ranks / hosts, 1.0, 4.0)
        }
    };
    let each = if k < 8 { TOKENS_PER_EXPERT } else { TOKENS_PER_EXPERT_TOP8 };
    let trace = Generator::new(layers, experts, k).trace(each * experts, model, 11);
    let mut affinity = Affinity::from_trace(&trace, experts).ok()?;
    if !wrap {
        affinity.wrap = None;
    }
    Some(Instance { name: name.to_owned(), affinity, topology })
}

fn parse(name: &str) -> Option<Shape<'_>> {
    let (name, model) = match name.split_once('#') {
        Some((name, model)) => (name, model.parse().ok()?),
        None => (name, 7),
    };
    let (name, links) = name.split_once('@').unwrap_or((name, ""));
    let (name, wrap) = name.strip_suffix("+wrap").map_or((name, false), |name| (name, true));
    let (name, k) = match name.split_once('k') {
        Some((name, k)) => (name, k.parse().ok().filter(|&k| k > 0)?),
        None => (name, 1),
    };
    let sizes: Vec<usize> = name.split('x').map(str::parse).collect::<Result<_, _>>().ok()?;
    let sizes: [usize; 3] = sizes.try_into().ok().filter(|s: &[usize; 3]| s.iter().all(|&n| n > 0))?;
    Some(Shape { sizes, k, wrap, links, model })
}

/// Six ranks on three hosts with unlike slots and links: 1 within a host, 2.5 between two of them, 9 to the third.
fn mixed(experts: usize) -> Topology {
    const CLASS: [usize; 6] = [0, 0, 1, 1, 2, 2];
    const SHARE: [usize; 6] = [8, 6, 6, 4, 4, 4];
    let mut topology = Topology::hosts(3, 2, 1.0, 1.0);
    for (rank, share) in topology.ranks.iter_mut().zip(SHARE) {
        rank.slots = Some((share * experts).div_ceil(SHARE.iter().sum()));
    }
    for (at, cost) in topology.cost.iter_mut().enumerate() {
        let (a, b) = (at / 6, at % 6);
        *cost = match (CLASS[a], CLASS[b]) {
            _ if a == b => 0.0,
            (x, y) if x == y => 1.0,
            (2, _) | (_, 2) => 9.0,
            _ => 2.5,
        };
    }
    topology
}
