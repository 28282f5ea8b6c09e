//! What every rank of a world must know and share before it loads: rank 0 decides it and sends it in its welcome.

use crate::EngineError;
use crate::gpu::OnUnits;
use crate::options::{
    ClusterOptions, Combine, Dtype, KvDtype, KvWire, Numerics, Overlap, Prefill, Quant, Schedule,
};
use exflow_placement::{PlacementTable, Strategy};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The same on every rank for one epoch. An option that all ranks must share is a field here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) strategy: Strategy,
    pub(crate) combine: Combine,
    pub(crate) dtype: Dtype,
    pub(crate) quant: Option<Quant>,
    pub(crate) numerics: Numerics,
    /// Of which matrices products are made on matrix units.
    pub(crate) on_units: OnUnits,
    pub(crate) kv_dtype: KvDtype,
    pub(crate) kv_wire: KvWire,
    pub(crate) schedule: Schedule,
    pub(crate) prefill: Prefill,
    pub(crate) overlap: Overlap,
    /// `[R]` the group that each rank's sequences are bounded to; empty: to none.
    pub(crate) groups: Vec<u16>,
    /// Blocks of KV cache on every rank.
    pub(crate) cache_blocks: usize,
    /// Where each expert is in this epoch.
    pub(crate) table: PlacementTable,
}

impl Plan {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, EngineError> {
        serde_json::to_vec(self).map_err(|e| EngineError::Internal(format!("the plan: {e}")))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, EngineError> {
        let unreadable = |what: String| {
            let what = format!("rank 0's plan cannot be read: {what}");
            EngineError::usage(what, "run the same exflow everywhere")
        };
        let plan: Self = serde_json::from_slice(bytes).map_err(|e| unreadable(e.to_string()))?;
        plan.table.check().map_err(|e| unreadable(e.to_string()))?;
        Ok(plan)
    }

    /// Takes rank 0's choices over into this process's options.
    pub(crate) fn apply(&self, options: &mut ClusterOptions) {
        options.strategy = self.strategy;
        options.combine = self.combine;
        options.dtype = self.dtype;
        options.quant = self.quant;
        options.numerics = self.numerics;
        options.kv_dtype = self.kv_dtype;
        options.kv_wire = self.kv_wire;
        options.schedule = self.schedule;
        options.prefill = self.prefill;
        options.overlap = self.overlap;
    }
}

/// SHA-256 of who holds what, whatever else a table's file says.
pub(crate) fn table_digest(table: &PlacementTable) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut add = |number: usize| hash.update((number as u64).to_le_bytes());
    [table.layers, table.experts, table.ranks].into_iter().for_each(&mut add);
    table.assignment.iter().flatten().for_each(|rank| add(rank.index()));
    for copy in &table.replicas {
        [copy.layer.index(), copy.expert.index(), copy.rank.index()].into_iter().for_each(&mut add);
    }
    hash.finalize().into()
}
