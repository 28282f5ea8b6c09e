//! Which products a world makes on matrix units: decided from what every rank offers, the same for all of them.

use super::sizing::{Offer, present};
use crate::EngineError;
use crate::gpu::{DeviceReport, OnUnits};
use crate::model::ModelSpec;
use crate::options::{ClusterOptions, Numerics};
use crate::weights::form_of;
use exflow_placement::Rank;
use exflow_shaders::Weights;
use exflow_transport::proto::membership::Roster;
use std::net::{Ipv4Addr, SocketAddr};

/// In which forms a model's matrices lie, the one that was asked for first.
pub(crate) fn forms(options: &ClusterOptions, spec: &ModelSpec) -> Vec<Weights> {
    let mut forms = vec![form_of(options.dtype, options.quant)];
    if spec.packed_experts && options.quant.is_none() {
        forms.push(Weights::Mx4);
    }
    forms
}

/// Whether there are products that fast numerics form in another way than exact ones: of matrices with scales, or those on
/// matrix units.
pub(crate) fn is_fast(forms: &[Weights], on_units: OnUnits) -> bool {
    !on_units.is_empty() || forms.iter().any(|form| form.has_scales())
}

/// The forms of matrices whose products all ranks that are there make on matrix units. `begun`: what the world has begun
/// with; it stays with that.
///
/// # Errors
/// Where fast numerics would change nothing, and where a rank comes that cannot do what the world has begun with.
pub(crate) fn on_units(
    options: &ClusterOptions,
    spec: &ModelSpec,
    (roster, offers): (&Roster, &[Offer]),
    begun: Option<OnUnits>,
) -> Result<OnUnits, EngineError> {
    if options.numerics == Numerics::Exact {
        return Ok(OnUnits::default());
    }
    let forms = forms(options, spec);
    let able: Vec<Able<'_>> = able(roster, offers).collect();
    if let Some(begun) = begun {
        return match able.iter().find(|rank| rank.on_units.and(begun) != begun) {
            None => Ok(begun),
            Some(lacking) => Err(EngineError::usage(
                format!(
                    "products of --numerics fast are made on matrix units in this world, and {lacking} does not offer them"
                ),
                "start that rank on an adapter like the others', or the group anew",
            )),
        };
    }
    // A head may be the embedding, which is f32 in any case.
    let wanted = OnUnits::of(forms.iter().copied().chain([Weights::F32]));
    let common = able.iter().fold(wanted, |common, rank| common.and(rank.on_units));
    let agreed = if forms.iter().any(|form| common.has(*form)) { common } else { OnUnits::default() };
    if is_fast(&forms, agreed) {
        return Ok(agreed);
    }
    let lacking = able.iter().find(|rank| forms.iter().any(|form| !rank.on_units.has(*form)));
    Err(EngineError::usage(
        format!(
            "--numerics fast changes nothing about matrices in {} on {}, which offers no matrix units",
            options.dtype,
            lacking.map(ToString::to_string).unwrap_or_default()
        ),
        "add --quant q8_0 or q4_0, whose blocks it multiplies as bytes, or leave it out",
    ))
}

/// The same of a world that has this process's ranks alone.
///
/// # Errors
/// Where fast numerics would change nothing.
pub(crate) fn of_this_process(options: &ClusterOptions, spec: &ModelSpec) -> Result<OnUnits, EngineError> {
    let here = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let roster = Roster::new([(options.ranks as u16, here)]);
    on_units(options, spec, (&roster, &[Offer::with_names(options)?]), None)
}

/// What a rank on this adapter offers to make on its matrix units: as it says itself, or as options have it of scales.
pub(crate) fn offered(options: &ClusterOptions, adapter: &DeviceReport) -> OnUnits {
    let own = adapter.on_units();
    match options.scales_on_units {
        Some(on) if adapter.matrix_side.is_some() => {
            let offers = |form: &Weights| if form.has_scales() { on } else { own.has(*form) };
            OnUnits::of(Weights::ALL.into_iter().filter(offers))
        }
        _ => own,
    }
}

/// What a rank makes on its matrix units.
struct Able<'a> {
    rank: Rank,
    adapter: &'a str,
    on_units: OnUnits,
}

impl std::fmt::Display for Able<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} ({})", self.rank, self.adapter)
    }
}

fn able<'a>(roster: &'a Roster, offers: &'a [Offer]) -> impl Iterator<Item = Able<'a>> {
    let locals = roster.members().iter().flat_map(|member| 0..usize::from(member.ranks));
    present(roster, offers).zip(locals).enumerate().filter_map(|(rank, (offer, local))| {
        let offer = offer?;
        let adapter = offer.adapters.get(local).map_or("", String::as_str);
        let on_units = offer.on_units.get(local).copied().unwrap_or_default();
        Some(Able { rank: Rank::from(rank), adapter, on_units })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Dtype, Quant};

    const WHOLE: [Weights; 2] = [Weights::F32, Weights::F16];

    fn offer(adapters: &[(&str, &[Weights])]) -> Offer {
        Offer {
            adapters: adapters.iter().map(|of| of.0.to_owned()).collect(),
            on_units: adapters.iter().map(|of| OnUnits::of(of.1.iter().copied())).collect(),
            ..Offer::default()
        }
    }

    /// Two processes, of one rank and of two.
    fn decided(
        change: impl FnOnce(&mut ClusterOptions, &mut ModelSpec),
        offers: &[Offer],
        begun: Option<OnUnits>,
    ) -> Result<OnUnits, String> {
        let mut options = ClusterOptions { numerics: Numerics::Fast, ..ClusterOptions::new("unused") };
        let config = br#"{"model_type":"gpt_moe","vocab_size":32,"n_positions":64,"n_embd":8,"n_layer":2,
            "n_head":2,"n_inner":16,"num_experts":4,"top_k":2,"layer_norm_epsilon":1e-5}"#;
        let mut spec = ModelSpec::parse(std::path::Path::new("config.json"), config).expect("a config");
        change(&mut options, &mut spec);
        let here = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let roster = Roster::new(offers.iter().map(|offer| (offer.adapters.len() as u16, here)));
        on_units(&options, &spec, (&roster, offers), begun).map_err(|e| {
            assert!(e.is_input());
            e.to_string()
        })
    }

    #[test]
    fn all_ranks_make_products_on_matrix_units_or_none_does() {
        let (with, mixed) = (("A", &WHOLE[..]), ("B", &[][..]));
        let f16 = |options: &mut ClusterOptions, _: &mut ModelSpec| options.dtype = Dtype::F16;
        let all = [offer(&[with]), offer(&[with, with])];
        assert_eq!(decided(f16, &all, None), Ok(OnUnits::of(WHOLE)));
        assert_eq!(decided(|_, _| (), &all, None), Ok(OnUnits::of([Weights::F32])));
        let lacking = [offer(&[with]), offer(&[with, mixed])];
        let said = decided(f16, &lacking, None).expect_err("it is refused");
        assert!(said.contains("--numerics fast changes nothing") && said.contains("rank 2 (B)"), "{said}");
        // What has scales is fast in any case: as bytes.
        let packed = |_: &mut ClusterOptions, spec: &mut ModelSpec| spec.packed_experts = true;
        assert_eq!(decided(packed, &all, None), Ok(OnUnits::of([Weights::F32])));
        assert_eq!(decided(packed, &lacking, None), Ok(OnUnits::default()));
        let quant = |options: &mut ClusterOptions, _: &mut ModelSpec| options.quant = Some(Quant::Q8_0);
        assert_eq!(decided(quant, &all, None), Ok(OnUnits::default()));
        // They may be on matrix units too, where all ranks gain by it.
        let scaled = ("C", &[Weights::F32, Weights::F16, Weights::Q8, Weights::Mx4][..]);
        assert_eq!(decided(quant, &[offer(&[scaled])], None), Ok(OnUnits::of([Weights::F32, Weights::Q8])));
        assert_eq!(decided(quant, &[offer(&[scaled, with])], None), Ok(OnUnits::default()));
        assert_eq!(decided(packed, &[offer(&[scaled])], None), Ok(OnUnits::of([Weights::F32, Weights::Mx4])));
        assert_eq!(decided(packed, &[offer(&[scaled, with])], None), Ok(OnUnits::of([Weights::F32])));
        let exact = |options: &mut ClusterOptions, _: &mut ModelSpec| options.numerics = Numerics::Exact;
        assert_eq!(decided(exact, &lacking, None), Ok(OnUnits::default()));
    }

    #[test]
    fn a_world_stays_with_what_it_has_begun_with() {
        let (with, without) = (("A", &WHOLE[..]), ("B", &[][..]));
        let begun = Some(OnUnits::of([Weights::F32]));
        assert_eq!(decided(|_, _| (), &[offer(&[with])], begun), Ok(OnUnits::of([Weights::F32])));
        let said = decided(|_, _| (), &[offer(&[with]), offer(&[without])], begun).expect_err("refused");
        assert!(said.contains("rank 1 (B)"), "{said}");
        let none = Some(OnUnits::default());
        let quant = |options: &mut ClusterOptions, _: &mut ModelSpec| options.quant = Some(Quant::Q8_0);
        assert_eq!(decided(quant, &[offer(&[with])], none), Ok(OnUnits::default()));
    }

    #[test]
    fn numerics_are_fast_where_some_product_is() {
        assert!(!is_fast(&[Weights::F16], OnUnits::default()));
        assert!(is_fast(&[Weights::F16], OnUnits::of([Weights::F32])));
        assert!(is_fast(&[Weights::F32, Weights::Mx4], OnUnits::default()));
    }
}
