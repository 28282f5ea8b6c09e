//! Which matrices have their products made on matrix units.

use exflow_shaders::Weights;
use serde::{Deserialize, Serialize};

/// Forms of matrices whose products are made on matrix units; by default none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OnUnits(u8);

impl OnUnits {
    /// These forms.
    pub(crate) fn of(forms: impl IntoIterator<Item = Weights>) -> Self {
        Self(forms.into_iter().fold(0, |all, form| all | 1 << form as u8))
    }

    /// Whether matrices in this form are among them.
    pub(crate) fn has(self, form: Weights) -> bool {
        self.0 & 1 << form as u8 != 0
    }

    /// Those of both.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether there are none.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_told_apart() {
        for form in Weights::ALL {
            let alone = OnUnits::of([form]);
            assert!(Weights::ALL.into_iter().all(|other| alone.has(other) == (other == form)));
            let others = OnUnits::of(Weights::ALL.into_iter().filter(|other| *other != form));
            assert!(alone.and(others).is_empty() && !alone.is_empty());
        }
    }
}
