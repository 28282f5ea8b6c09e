//! A kernel's interface as naga reads it.

/// How a kernel touches a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `var<uniform>`: the parameter block.
    Uniform,
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    ReadWrite,
    /// A storage texture.
    Image {
        /// 32-bit words of a texel.
        words: u32,
        /// Whether it is written; else it is read.
        written: bool,
    },
}

/// One binding of group 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Its number.
    pub number: u32,
    /// Its name in the kernel's text.
    pub name: String,
    /// How the kernel touches it.
    pub access: Access,
}

/// Bindings in order of their numbers, and the size in bytes of the parameter block.
pub(crate) fn interface(module: &naga::Module) -> Result<(Vec<Binding>, u32), String> {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).map_err(|e| e.to_string())?;
    let mut params_size = 0;
    let mut bindings = Vec::new();
    for (_, global) in module.global_variables.iter() {
        let Some(resource) = &global.binding else { continue };
        let access = match global.space {
            naga::AddressSpace::Uniform => Access::Uniform,
            naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => {
                Access::ReadWrite
            }
            naga::AddressSpace::Storage { .. } => Access::Read,
            naga::AddressSpace::Handle => texture(&module.types[global.ty].inner)?,
            other => return Err(format!("binding {} in address space {other:?}", resource.binding)),
        };
        if access == Access::Uniform {
            params_size = layouter[global.ty].size;
        }
        let name = global.name.clone().unwrap_or_default();
        bindings.push(Binding { number: resource.binding, name, access });
    }
    bindings.sort_by_key(|b| b.number);
    match bindings.iter().enumerate().find(|(i, b)| b.number as usize != *i) {
        Some((_, gap)) => Err(format!("binding {} ({}) leaves a gap before it", gap.number, gap.name)),
        None => Ok((bindings, params_size)),
    }
}

fn texture(ty: &naga::TypeInner) -> Result<Access, String> {
    let naga::TypeInner::Image { class: naga::ImageClass::Storage { format, access }, .. } = ty else {
        return Err(format!("{ty:?} is no storage texture"));
    };
    let words = match format {
        naga::StorageFormat::R32Uint => 1,
        naga::StorageFormat::Rg32Uint => 2,
        naga::StorageFormat::Rgba32Uint => 4,
        other => return Err(format!("texels of {other:?}")),
    };
    Ok(Access::Image { words, written: access.contains(naga::StorageAccess::STORE) })
}
