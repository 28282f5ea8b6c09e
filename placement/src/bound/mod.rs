//! Lower bounds: no placement within the capacity costs less.

mod rearrange;

pub(crate) use rearrange::rearrangement;
