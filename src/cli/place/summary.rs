//! What `exflow place` says of a table: scores on tokens that were not profiled, cost and bound, copies, layers left off.

use super::super::failure::Failure;
use exflow::placement::{Affinity, Balance, LayerId, PlacementTable, Score, Topology, score_affinity};
use exflow::study::{BalanceScore, HeldOut};
use serde_json::{Value, json};
use std::fmt::Write;

pub(super) struct Summary<'s> {
    table: &'s PlacementTable,
    unseen: &'s HeldOut,
    balances: &'s [BalanceScore],
    /// On the profiled tokens.
    profiled: Score,
    balance: Balance,
    hosts: usize,
    affinity: &'s Affinity,
    topology: &'s Topology,
}

impl<'s> Summary<'s> {
    pub(super) fn new(
        table: &'s PlacementTable,
        affinity: &'s Affinity,
        topology: &'s Topology,
        unseen: &'s HeldOut,
        balances: &'s [BalanceScore],
        balance: Balance,
    ) -> Result<Self, Failure> {
        table.check_fits(affinity.layers, affinity.experts, topology.len(), None)?;
        let profiled = score_affinity(table, affinity, topology);
        Ok(Self {
            table,
            unseen,
            balances,
            profiled,
            balance,
            hosts: topology.hosts.len(),
            affinity,
            topology,
        })
    }

    pub(super) fn json(&self) -> Value {
        let table = self.table;
        let (l, e, r) = (table.layers, table.experts, table.ranks);
        let score = |table: &PlacementTable| score_affinity(table, self.affinity, self.topology);
        let unseen: serde_json::Map<String, Value> =
            self.unseen.rows.iter().map(|(name, score)| (name.replace(' ', "_"), json!(score))).collect();
        json!({
            "layers": l,
            "experts": e,
            "ranks": r,
            "cost": table.cost,
            "lower_bound": table.lower_bound,
            "gap": table.gap,
            "baselines": table.baselines,
            "replicas": table.replicas.len(),
            "cost_with_replicas": table.cost_with_replicas,
            "score": self.profiled,
            "round_robin": score(&PlacementTable::round_robin(l, e, r)),
            "linear": score(&PlacementTable::linear(l, e, r)),
            "balances": self.balances.iter().map(|b| json!({
                "balance": b.balance,
                "crossings_per_token": b.score.map(|score| score.crossings_per_token),
                "stay_rate": b.score.map(|score| score.stay_rate),
                "ranks_per_layer": b.ranks_per_layer,
            })).collect::<Vec<_>>(),
            "held_out": {
                "tokens": self.unseen.tokens,
                "in_sample_crossings_per_token": self.unseen.in_sample,
                "excess": self.unseen.excess(),
                "wanted_tokens": self.unseen.wanted_tokens,
                "scores": unseen,
            },
        })
    }

    pub(super) fn text(&self, out: &str) -> String {
        let table = self.table;
        let mut text = format!(
            "{} MoE layers × {} experts on {} ranks, scored on {:.0} tokens that were not profiled:\n",
            table.layers, table.experts, table.ranks, self.unseen.tokens
        );
        let host = if self.hosts > 1 { format!(" {:>13}", "on its host") } else { String::new() };
        let _ = writeln!(
            text,
            "{:<13} {:>10}{host} {:>19} {:>26}",
            "", "stay rate", "crossings a token", "busiest rank ÷ mean, worst"
        );
        for (name, score) in &self.unseen.rows {
            let host = if self.hosts > 1 {
                format!(" {:>11.1} %", 100.0 * score.host_stay_rate)
            } else {
                String::new()
            };
            let _ = writeln!(
                text,
                "{name:<13} {:>8.1} %{host} {:>19.3} {:>26.2}",
                100.0 * score.stay_rate,
                score.crossings_per_token,
                score.worst_load
            );
        }
        self.remarks(&mut text);
        let _ = writeln!(text, "written to {out}");
        text
    }

    fn remarks(&self, text: &mut String) {
        let table = self.table;
        let _ = writeln!(
            text,
            "on the profiled tokens: stay rate {:.1} %, {:.3} crossings a token",
            100.0 * self.profiled.stay_rate,
            self.profiled.crossings_per_token
        );
        if let (Some(cost), Some(bound), Some(gap)) = (table.cost, table.lower_bound, table.gap) {
            let _ = writeln!(
                text,
                "cost {cost:.0}, proven lower bound {bound:.0}, gap {:.1} %{}",
                100.0 * gap,
                if gap == 0.0 { ": optimal" } else { "" }
            );
        }
        if let (Some(with), Some(cost)) = (table.cost_with_replicas, table.cost) {
            let saved = 100.0 * (1.0 - with / cost.max(f64::MIN_POSITIVE));
            let _ = writeln!(
                text,
                "{} copies in spare slots, predicted to save {saved:.1} % of the cost",
                table.replicas.len()
            );
        }
        if self.balance == Balance::Total {
            let ranks: Vec<usize> =
                (0..table.layers).map(|layer| table.ranks_of(LayerId::from(layer)).len()).collect();
            let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
            let _ = writeln!(text, "ranks that hold each layer: {}", list.join(" "));
        }
        let ways: Vec<String> = self.balances.iter().map(balance_text).collect();
        if !ways.is_empty() {
            let _ = writeln!(text, "crossings a token on unseen tokens, by --balance: {}", ways.join("; "));
        }
        if let Some(tokens) = self.unseen.wanted_tokens {
            let _ = writeln!(
                text,
                "warning: the profile is too small: unseen tokens cross {:.0} % more often than those solved on; about {tokens:.0} tokens would do",
                100.0 * self.unseen.excess()
            );
        }
    }
}

/// `layer 5.213 (4.0 ranks a layer)`.
fn balance_text(way: &BalanceScore) -> String {
    let name = match way.balance {
        Balance::Slots => "slots",
        Balance::Layer => "layer",
        Balance::Total => "total",
    };
    match way.score {
        Some(score) => {
            format!("{name} {:.3} (a layer on {:.1} ranks)", score.crossings_per_token, way.ranks_per_layer)
        }
        None => format!("{name} impossible (the ranks cannot hold the experts so)"),
    }
}
