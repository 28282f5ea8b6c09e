//! From kernel texts to plain WGSL: imports and variants by WESL, validation by naga. The only file that knows
//! how kernel text is put together.

use crate::Cache;
use crate::kernel::{Kernel, SHARED};
use crate::reflect::{self, Binding};
use crate::variant::{Activation, Columns, Cooperative, RowTile, Rows, Values, Variant, Weights};
use std::borrow::Cow;
use wesl::syntax::{ModulePath, PathOrigin};
use wesl::{CompileOptions, EscapeMangler, Feature, Features, VirtualResolver};

/// A composed kernel: plain WGSL with its interface.
#[derive(Debug, Clone)]
pub struct Module {
    /// Plain WGSL with one entry point, `main`.
    pub wgsl: String,
    /// Bindings of group 0, by number; binding 0 is the parameter block.
    pub bindings: Vec<Binding>,
    /// Size in bytes of the parameter block as naga lays it out.
    pub params_size: u32,
}

/// Why a kernel could not be composed; a defect of this crate, never of its user's input.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComposeError {
    /// WESL could not resolve imports or conditions.
    #[error("kernel {kernel}: {reason}")]
    Compose {
        /// The kernel's name.
        kernel: &'static str,
        /// What WESL said.
        reason: String,
    },
    /// naga refused the composed text.
    #[error("kernel {kernel}: {reason}")]
    Invalid {
        /// The kernel's name.
        kernel: &'static str,
        /// What naga said, with line and column of the composed text.
        reason: String,
    },
}

/// Composes, validates and reflects one variant of a kernel.
pub fn module(kernel: Kernel, variant: Variant) -> Result<Module, ComposeError> {
    let wgsl = compose(kernel, variant)?;
    let invalid = |reason: String| ComposeError::Invalid { kernel: kernel.name(), reason };
    let ir = naga::front::wgsl::parse_str(&wgsl).map_err(|e| invalid(e.emit_to_string(&wgsl)))?;
    // f16 in pairs, as WGSL itself has it (`unpack2x16float`): no device lacks it that wgpu runs on.
    let mut capabilities = naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let on_units = variant.matrix_side(kernel).is_some();
    capabilities.set(naga::valid::Capabilities::SUBGROUP, variant.subgroup || on_units);
    let units = naga::valid::Capabilities::COOPERATIVE_MATRIX | naga::valid::Capabilities::SHADER_FLOAT16;
    capabilities.set(units, on_units);
    naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
        .validate(&ir)
        .map_err(|e| invalid(e.emit_to_string(&wgsl)))?;
    let (bindings, params_size) = reflect::interface(&ir).map_err(invalid)?;
    Ok(Module { wgsl, bindings, params_size })
}

fn compose(kernel: Kernel, variant: Variant) -> Result<String, ComposeError> {
    let failed = |e: wesl::Error| ComposeError::Compose { kernel: kernel.name(), reason: e.to_string() };
    let mut resolver = VirtualResolver::new();
    for (name, text) in SHARED {
        resolver.add_module(path(&["shared", name]), Cow::Borrowed(text));
    }
    let root = path(&[kernel.name()]);
    resolver.add_module(root.clone(), Cow::Borrowed(kernel.source()));
    let options = CompileOptions {
        validate: false, // naga validates, and knows more built-ins
        keep_root: true, // parameter blocks and overrides stay as written
        features: Features {
            default: Feature::Error,
            flags: flags(variant).map(|(name, on)| (name.to_owned(), Feature::from(on))).into(),
        },
        ..Default::default()
    };
    let compiled = wesl::compile(&root, &resolver, &EscapeMangler, &options).map_err(failed)?;
    Ok(compiled.syntax.to_string())
}

fn flags(variant: Variant) -> [(&'static str, bool); 32] {
    [
        ("one", variant.tile == RowTile::One),
        ("tile2", variant.tile == RowTile::Two),
        ("tile4", variant.tile == RowTile::Four),
        ("tile8", variant.tile == RowTile::Eight),
        ("tile16", variant.tile == RowTile::Sixteen),
        ("tile32", variant.tile == RowTile::ThirtyTwo),
        ("tile64", variant.tile == RowTile::SixtyFour),
        ("three", variant.columns == Columns::Three),
        ("coop", variant.cooperative != Cooperative::No),
        ("coop16", variant.cooperative == Cooperative::Sixteen),
        ("turn2", variant.turn4() == 2),
        ("turn4", variant.turn4() == 4),
        ("turn8", variant.turn4() == 8),
        ("halves", 4 * variant.turn4() < variant.weights.per_unit()),
        ("image", variant.image),
        ("subgroup", variant.subgroup),
        ("dot", variant.rows != Rows::F32),
        ("floats", variant.rows == Rows::BytesAsF32),
        ("half", variant.weights == Weights::F16),
        ("q8", variant.weights == Weights::Q8),
        ("q4", variant.weights == Weights::Q4),
        ("mx4", variant.weights == Weights::Mx4),
        ("keeps", variant.keeps),
        ("split", variant.split),
        ("kv16", variant.cache == Cache::F16),
        ("kv8", variant.cache == Cache::Q8),
        ("slim", variant.values == Values::Slim),
        ("narrow", variant.values == Values::Narrow),
        ("usual", variant.values == Values::Usual),
        ("wide", variant.values == Values::Wide),
        ("swiglu", variant.activation == Activation::SwiGlu),
        ("clamped_glu", variant.activation == Activation::ClampedGlu),
    ]
}

fn path(parts: &[&str]) -> ModulePath {
    ModulePath::new(PathOrigin::Absolute, parts.iter().map(|&part| part.to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params;

    #[test]
    fn every_variant_of_every_kernel_is_valid() {
        for kernel in Kernel::ALL {
            for variant in kernel.variants() {
                let module = module(kernel, variant).unwrap_or_else(|e| panic!("{e}"));
                assert!(module.wgsl.contains("fn main"), "{}", kernel.name());
                assert_eq!(module.bindings[0].number, 0, "{}", kernel.name());
            }
        }
    }

    #[test]
    fn parameter_blocks_have_the_size_that_the_kernel_reads() {
        for kernel in Kernel::ALL {
            let module = module(kernel, Variant::default()).expect("composes");
            assert_eq!(module.params_size as usize, params::size_of(kernel), "{}", kernel.name());
        }
    }

    #[test]
    fn matrix_units_take_the_workgroup_memory_that_is_asked_for() {
        let bytes = |variant: Variant| {
            let text = module(Kernel::Linear, variant).expect("composes").wgsl;
            let ir = naga::front::wgsl::parse_str(&text).expect("parses");
            let mut layouter = naga::proc::Layouter::default();
            layouter.update(ir.to_ctx()).expect("lays out");
            let shared =
                ir.global_variables.iter().filter(|(_, of)| of.space == naga::AddressSpace::WorkGroup);
            shared.map(|(_, of)| layouter[of.ty].size).sum::<u32>()
        };
        let on_units = Kernel::Linear.variants().into_iter().filter(|of| of.cooperative != Cooperative::No);
        assert_eq!(on_units.map(bytes).max(), Some(crate::COOPERATIVE_BYTES));
    }

    #[test]
    fn tile_variants_differ_in_text() {
        let plain = module(Kernel::Linear, Variant::default()).expect("composes").wgsl;
        let tile = RowTile::Eight;
        let tiled = module(Kernel::Linear, Variant { tile, ..Variant::default() }).expect("composes").wgsl;
        assert_ne!(plain, tiled);
    }
}
