//! Which table a world starts with: as asked for, checked against memory, and without the ranks that are absent.

use super::numerics;
use super::plan::Plan;
use super::sizing::{Offer, Sizes};
use crate::EngineError;
use crate::gpu::OnUnits;
use crate::model::ModelSpec;
use crate::options::{ClusterOptions, Combine, Domain, KvWire, PlacementSource, Prefill};
use crate::stats::gib;
use exflow_placement::{PlacementTable, Rank};
use exflow_shaders::Cache;
use exflow_transport::proto::membership::Roster;

/// Why a world does not start.
pub(crate) enum Decline {
    /// With more ranks it could.
    TooFew(EngineError),
    /// It cannot.
    Never(EngineError),
}

impl Decline {
    pub(crate) fn into_error(self) -> EngineError {
        match self {
            Self::TooFew(error) | Self::Never(error) => error,
        }
    }
}

/// What the complete world began with, kept over epochs.
pub(crate) struct Base {
    table: PlacementTable,
    /// Blocks of cache, once they are decided.
    cache_blocks: Option<usize>,
    /// Of which matrices products are made on matrix units, once that is decided.
    on_units: Option<OnUnits>,
}

impl Base {
    /// Further epochs begin with another table of the complete world.
    pub(crate) fn place(&mut self, table: PlacementTable) {
        self.table = table;
    }
}

/// The plan of an epoch for those who are there. `base` is made by the first.
pub(crate) fn decide(
    options: &ClusterOptions,
    spec: &ModelSpec,
    roster: &Roster,
    offers: &[Offer],
    base: &mut Option<Base>,
) -> Result<Plan, Decline> {
    let ranks = roster.world_size();
    let base = match base {
        Some(base) => base,
        None => {
            check_ranks(ranks, spec).map_err(Decline::Never)?;
            let table = resolve(options, spec, ranks).map_err(Decline::Never)?;
            base.insert(Base { table, cache_blocks: None, on_units: None })
        }
    };
    let on_units = numerics::on_units(options, spec, (roster, offers), base.on_units);
    let on_units = *base.on_units.insert(on_units.map_err(Decline::Never)?);
    if options.kv_wire == KvWire::Hidden {
        check_alike(offers).map_err(Decline::Never)?;
    }
    let whole = base.table.clone();
    let sizes = Sizes::of(options, spec, base.cache_blocks);
    let room = sizes.room(roster, offers);
    let absent = roster.absent();
    let table = match absent.is_empty() {
        true => whole,
        false => whole.without(&absent, &room, options.affinity.as_deref()).map_err(|shortage| {
            let bytes = shortage.experts.len() as u64 * sizes.expert;
            let gone: Vec<_> = absent.iter().map(Rank::to_string).collect();
            Decline::TooFew(EngineError::Capacity {
                what: format!(
                    "without rank {} there is {shortage}; {} are missing",
                    gone.join(", "),
                    gib(bytes)
                ),
                remedy: "start the rank again, or give the others more --memory".into(),
            })
        })?,
    };
    let held = table.experts_per_rank();
    for (rank, &held) in held.iter().enumerate() {
        if held > room[rank] {
            return Err(Decline::Never(sizes.overfull(rank, held, room[rank])));
        }
    }
    let to_hold = if options.room_for_moves { with_moves(&table) } else { held };
    let cache_blocks = sizes.cache_blocks(roster, offers, &to_hold);
    base.cache_blocks.get_or_insert(cache_blocks);
    let groups = groups(options, roster);
    Ok(Plan {
        strategy: options.strategy,
        combine: options.combine,
        dtype: options.dtype,
        quant: options.quant,
        numerics: options.numerics,
        on_units,
        kv_dtype: options.kv_dtype,
        kv_wire: options.kv_wire,
        schedule: options.schedule,
        prefill: options.prefill,
        overlap: options.overlap,
        groups,
        cache_blocks,
        table,
    })
}

/// `[R]` experts that a rank holds at most while they move to another table that gives it as many, none of them the same,
/// and the layer that is put together at the time is there twice.
fn with_moves(table: &PlacementTable) -> Vec<usize> {
    let of_layer = |layer: usize, rank: usize| table.experts_of(layer.into(), Rank::from(rank)).len();
    let most = |rank| (0..table.layers).map(|layer| of_layer(layer, rank)).max().unwrap_or(0);
    let held = table.experts_per_rank().into_iter().enumerate();
    held.map(|(rank, held)| 2 * held + 2 * most(rank)).collect()
}

/// `[R]` the group that each rank's sequences are bounded to; empty: to none.
fn groups(options: &ClusterOptions, roster: &Roster) -> Vec<u16> {
    let processes = roster.members().iter().zip(0_u16..);
    match options.domain {
        Domain::World => Vec::new(),
        Domain::Pair => (0..roster.world_size() as u16).map(|rank| rank / 2).collect(),
        // What a shaped link lies between is no one host.
        Domain::Host if options.link.is_some() => (0..roster.world_size() as u16).collect(),
        Domain::Host => {
            processes.flat_map(|(member, host)| std::iter::repeat_n(host, member.ranks.into())).collect()
        }
    }
}

/// What cannot be had together.
pub(crate) fn check_options(options: &ClusterOptions) -> Result<(), EngineError> {
    match (options.prefill, options.combine) {
        // Each rank would sum in an order of its own, and hold a context of its own.
        (Prefill::Replicated, Combine::Sum) => Err(EngineError::usage(
            "prompts prefilled on every rank with partials summed at the source",
            "use --combine exact, or --prefill home",
        )),
        _ => Ok(()),
    }
}

/// Whether fewer bytes travel where a layer's input takes the place of keys and values.
pub(crate) fn check_kv_wire(options: &ClusterOptions, spec: &ModelSpec) -> Result<(), EngineError> {
    let words = Cache::from(options.kv_dtype).words(4 * spec.attention.cache4());
    if options.kv_wire == KvWire::Cache || spec.hidden < words {
        return Ok(());
    }
    Err(EngineError::usage(
        format!(
            "--kv-wire hidden would send {} bytes of each token and layer, and its keys and values take {}",
            4 * spec.hidden,
            4 * words
        ),
        "leave it out: it is for models whose every head has keys and values of its own, and a cache that is not narrower",
    ))
}

/// What is made anew has the same bits on equal adapters alone.
fn check_alike(offers: &[Offer]) -> Result<(), EngineError> {
    let mut all = offers.iter().enumerate().flat_map(|(process, offer)| {
        offer.adapters.iter().zip(&offer.drivers).map(move |adapter| (process, adapter))
    });
    let Some((first, (name, driver))) = all.next() else { return Ok(()) };
    match all.find(|(_, adapter)| *adapter != (name, driver)) {
        None => Ok(()),
        Some((process, (other, its))) => Err(EngineError::usage(
            format!(
                "--kv-wire hidden with different adapters: {name} ({driver}) in process {first}, {other} ({its}) in \
                 process {process}"
            ),
            "give every rank the same adapter and driver, or leave --kv-wire out",
        )),
    }
}

pub(crate) fn check_ranks(ranks: usize, spec: &ModelSpec) -> Result<(), EngineError> {
    let experts = spec.experts;
    if ranks == 0 {
        return Err(EngineError::usage("0 ranks", "use at least 1"));
    }
    if ranks > experts {
        let what = format!("{ranks} ranks for {experts} experts a layer");
        return Err(EngineError::usage(what, format!("use at most {experts} ranks")));
    }
    Ok(())
}

pub(crate) fn check_affinity(options: &ClusterOptions, spec: &ModelSpec) -> Result<(), EngineError> {
    let Some(affinity) = options.affinity.as_deref() else { return Ok(()) };
    affinity.check().map_err(|e| EngineError::usage(e.to_string(), PROFILE))?;
    let (of, model) = ((affinity.layers, affinity.experts), (spec.moe_layers(), spec.experts));
    if of == model {
        return Ok(());
    }
    let what = format!(
        "affinity of {} MoE layers with {} experts for a model of {} with {}",
        of.0, of.1, model.0, model.1
    );
    Err(EngineError::usage(what, PROFILE))
}

const PROFILE: &str = "make it for this model with `exflow profile --affinity`";

/// The table that was asked for, of `ranks` ranks.
fn resolve(options: &ClusterOptions, spec: &ModelSpec, ranks: usize) -> Result<PlacementTable, EngineError> {
    let (layers, experts) = (spec.moe_layers(), spec.experts);
    let fits = |table: &PlacementTable| table.check_fits(layers, experts, ranks, Some(&spec.digest));
    match &options.placement {
        PlacementSource::RoundRobin => Ok(PlacementTable::round_robin(layers, experts, ranks)),
        PlacementSource::Linear => Ok(PlacementTable::linear(layers, experts, ranks)),
        PlacementSource::Table(table) => {
            fits(table)?;
            Ok(table.clone())
        }
        PlacementSource::File(path) => {
            let table = read_table(path, experts, Some(ranks))?;
            fits(&table).map_err(|e| EngineError::file(path, e.to_string(), MAKE_ONE))?;
            Ok(table)
        }
    }
}

const MAKE_ONE: &str = "make one for this model and world size with `exflow place`";

pub(crate) fn read_table(
    path: &std::path::Path,
    experts: usize,
    ranks: Option<usize>,
) -> Result<PlacementTable, EngineError> {
    PlacementTable::read(path, Some(exflow_placement::TableShape { experts, ranks }))
        .map_err(|e| EngineError::file(path, format!("no placement table: {e}"), MAKE_ONE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_anew_is_made_on_equal_adapters() {
        let offer = |adapters: &[(&str, &str)]| Offer {
            adapters: adapters.iter().map(|a| a.0.to_owned()).collect(),
            drivers: adapters.iter().map(|a| a.1.to_owned()).collect(),
            ..Offer::default()
        };
        let (old, new) = (("A", "1.0"), ("A", "1.1"));
        assert!(check_alike(&[offer(&[old, old]), offer(&[old])]).is_ok());
        for unlike in [new, ("B", "1.0")] {
            let error = check_alike(&[offer(&[old]), offer(&[old, unlike])]).expect_err("it is refused");
            assert!(error.is_input() && error.to_string().contains("process 1"), "{error}");
        }
    }

    #[test]
    fn there_is_room_for_any_other_table_of_as_many_experts() {
        for (layers, experts, ranks) in [(3, 8, 2), (5, 16, 4), (2, 7, 3)] {
            let tables = [
                PlacementTable::round_robin(layers, experts, ranks),
                PlacementTable::linear(layers, experts, ranks),
            ];
            for (now, next) in [(&tables[0], &tables[1]), (&tables[1], &tables[0])] {
                let room = with_moves(now);
                for rank in 0..ranks {
                    let of =
                        |table: &PlacementTable, layer: usize| table.experts_of(layer.into(), rank.into());
                    let fresh = |layer| {
                        let held = of(now, layer);
                        of(next, layer).iter().filter(|expert| !held.contains(expert)).count()
                    };
                    let held: usize = (0..layers).map(|layer| of(now, layer).len()).sum();
                    let coming: usize = (0..layers).map(fresh).sum();
                    let twice = (0..layers).map(|layer| of(now, layer).len() + fresh(layer)).max();
                    assert!(coming > 0 && held + coming + twice.unwrap_or(0) <= room[rank], "{room:?}");
                }
            }
        }
    }

    #[test]
    fn groups_are_processes_pairs_or_none() {
        let roster = Roster::new([(2, None), (3, None)]);
        let groups = |domain, link: bool| {
            let link = link.then(exflow_transport::link::LinkSpec::lan);
            groups(&ClusterOptions { domain, link, ..ClusterOptions::new("unused") }, &roster)
        };
        assert!(groups(Domain::World, false).is_empty());
        assert_eq!(groups(Domain::Pair, false), [0, 0, 1, 1, 2]);
        assert_eq!(groups(Domain::Host, false), [0, 0, 1, 1, 1]);
        assert_eq!(groups(Domain::Host, true), [0, 1, 2, 3, 4]);
    }
}
