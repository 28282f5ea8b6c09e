//! Newtypes for things that must not be mixed.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The id as an index into a per-id array.
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl From<usize> for $name {
            /// Ids are counted from 0 and far below their type's limit; larger values saturate.
            fn from(index: usize) -> Self {
                Self(<$inner>::try_from(index).unwrap_or(<$inner>::MAX))
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// One wgpu device with its share of the experts, counted from 0 to world size - 1.
    Rank(u16)
}
id! {
    /// A machine; ranks of one host share memory.
    HostId(u16)
}
id! {
    /// A Mixture-of-Experts layer, counted over the MoE layers only.
    LayerId(u16)
}
id! {
    /// A logical expert of one layer, as the router numbers it.
    ExpertId(u16)
}
