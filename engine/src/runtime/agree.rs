//! Before the first step: whether products are made of the same numbers on every rank.

use super::worker::Worker;
use crate::EngineError;
use crate::gpu::OnUnits;
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_transport::{ByteClass, RoundId};
use serde::{Deserialize, Serialize};

/// How a rank makes products.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Making {
    adapter: String,
    on_units: OnUnits,
    /// Why not, where its matrix units were to be used.
    fault: Option<String>,
}

/// Characters of a fault that others are told.
const FAULT: usize = 300;

impl Worker {
    /// Fails on every rank where not all make the same products on matrix units: on one of them those did not pass what they
    /// are tried by.
    pub(super) fn agree(&mut self) -> Result<(), EngineError> {
        let gpu = &self.decoder.gpu;
        if self.comm.world_size() == 1 {
            return Ok(());
        }
        let fault = gpu.units_fault().map(|fault| fault.chars().take(FAULT).collect());
        let mine = Making { adapter: gpu.name().to_owned(), on_units: gpu.on_units(), fault };
        let mine = postcard::to_stdvec(&mine)
            .map_err(|e| EngineError::Internal(format!("how products are made: {e}")))?;
        let round = RoundId { number: self.round, class: ByteClass::Ids, layer: u16::MAX };
        self.round += 1;
        let told = self.comm.all_gather(round, Bytes::from(mine))?;
        let mut all = Vec::new();
        for (rank, bytes) in told.iter().enumerate().map(|(rank, bytes)| (Rank::from(rank), bytes)) {
            if !self.comm.absent().contains(&rank) {
                let unreadable =
                    |e| EngineError::Internal(format!("rank {rank} sent what cannot be read: {e}"));
                all.push((rank, postcard::from_bytes::<Making>(bytes).map_err(unreadable)?));
            }
        }
        let agreed = agreement(&all);
        if agreed.is_err() {
            // Nobody leaves before all have heard what is wrong; how this ends says no more.
            let _ = self.wait_for_all();
        }
        agreed
    }
}

/// Names the first rank that makes other products on matrix units than those without a fault do.
fn agreement(all: &[(Rank, Making)]) -> Result<(), EngineError> {
    let sound = all.iter().find(|(_, making)| making.fault.is_none()).map(|(_, making)| making.on_units);
    let Some(expected) = sound else { return Ok(()) };
    let Some((rank, other)) = all.iter().find(|(_, making)| making.on_units != expected) else {
        return Ok(());
    };
    let plain = |text: &str| text.chars().filter(|c| !c.is_control()).take(FAULT).collect::<String>();
    let fault = other.fault.as_deref().unwrap_or("it was asked for others");
    let what = format!(
        "{}: --numerics fast: other products are made on its matrix units than on other ranks': {}",
        plain(&other.adapter),
        plain(fault)
    );
    Err(EngineError::gpu(what, "leave --numerics fast out, or run that rank on another adapter").at(*rank))
}

#[cfg(test)]
mod tests {
    use super::*;
    use exflow_shaders::Weights;

    fn making(forms: &[Weights], fault: Option<&str>) -> Making {
        let on_units = OnUnits::of(forms.iter().copied());
        Making { adapter: "An adapter".into(), on_units, fault: fault.map(str::to_owned) }
    }

    fn agreed(all: &[Making]) -> Result<(), String> {
        let all: Vec<_> = all.iter().enumerate().map(|(i, m)| (Rank::from(i), m.clone())).collect();
        agreement(&all).map_err(|e| {
            assert!(!e.is_loss(), "nobody goes on without the rank");
            e.to_string()
        })
    }

    #[test]
    fn a_rank_whose_units_failed_is_named_wherever_it_is() {
        let (on, off) = (making(&[Weights::F16], None), making(&[], Some("linear\nis off")));
        assert_eq!(agreed(&[on.clone(), on.clone()]), Ok(()));
        assert_eq!(agreed(&[off.clone(), off.clone()]), Ok(()), "all of them make the same on lanes");
        for (all, rank) in [([&off, &on, &on], 0), ([&on, &off, &on], 1), ([&on, &on, &off], 2)] {
            let said = agreed(&all.map(Clone::clone)).expect_err("they differ");
            assert!(said.starts_with(&format!("rank {rank}: ")) && said.contains("linearis off"), "{said}");
        }
    }
}
