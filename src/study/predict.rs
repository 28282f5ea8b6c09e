//! What a setting will do on a link, from what it did where ranks share memory: steps take as long as there, and on
//! top of it every exchange (in flow: every crossing that a token waits for) costs the link's latency and its bytes.

use super::GridRow;
use exflow_transport::link::LinkSpec;

/// Tokens per second over all sequences, predicted from the same setting's row on `local` links.
///
/// Rounds: `t = t_local + x·L·α + α + bytes/β`, with x exchanges per layer and one more latency for the sampled ids.
///
/// Flow: `t = x·L·α + bytes/β + h·(L+1)·(1 + ρ/(2(1-ρ)))`, with x latencies that a token waits for per layer, h the time of
/// a hop where nobody competes for cores, and ρ the share of the time that a rank works (M/D/1 waiting); never under
/// what the ranks can work off at all.
pub fn predict(local: &GridRow, link: &LinkSpec, layers: usize, cores: usize) -> Option<f64> {
    let (n, ranks) = (local.sequences as f64, local.ranks as f64);
    let latency = link.latency.as_secs_f64();
    let travel = latency * local.exchanges_per_layer * layers as f64;
    let bytes = (local.bytes_per_token.dispatch + local.bytes_per_token.combine) * 8.0;
    let wire = |tokens: f64| if link.rate_bits == 0 { 0.0 } else { tokens * bytes / link.rate_bits as f64 };
    if local.tokens_per_s <= 0.0 {
        return None;
    }
    let local_s = n / local.tokens_per_s;
    if local.schedule == "rounds" {
        return Some(n / (local_s + travel + latency + wire(n / ranks)));
    }
    let lanes = ranks.min(cores as f64);
    let crowded = (local.busy_share * ranks / lanes).max(1.0);
    let hop = local.hop_ms / 1e3 / crowded;
    let hops = (layers + 1) as f64;
    let mut token_s = travel + wire(1.0) + hop * hops;
    for _ in 0..50 {
        let load = (n * hops * hop / (ranks * token_s)).min(0.95);
        token_s = travel + wire(1.0) + hop * hops * (1.0 + load / (2.0 * (1.0 - load)));
    }
    Some(n / token_s.max(local_s.min(n * hops * hop / lanes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::ClassBytes;

    fn row(schedule: &str, exchanges_per_layer: f64) -> GridRow {
        GridRow {
            model: "m".into(),
            ranks: 4,
            sequences: 1,
            link: "local".into(),
            strategy: "coherent".into(),
            schedule: schedule.into(),
            table: "affinity".into(),
            tokens_per_s: 100.0,
            tokens_per_s_range: (100.0, 100.0),
            predicted_tokens_per_s: None,
            ttft_ms: 0.0,
            second_token_ms: 0.0,
            tpot_p50_ms: 10.0,
            tpot_p99_ms: 10.0,
            exchanges_per_layer,
            crossings_per_token: 4.0,
            stay_rate: 0.5,
            bytes_per_token: ClassBytes::default(),
            floor_tokens_per_s: None,
            hop_ms: 1.0,
            rows_per_hop: 1.0,
            busy_share: 0.25,
        }
    }

    #[test]
    fn latencies_add_up_by_hand() {
        let link: LinkSpec = "latency=10ms".parse().expect("a link");
        // 10 ms of work, 8 exchanges and the ids.
        let rounds = predict(&row("rounds", 1.0), &link, 8, 4).expect("a figure");
        assert!((rounds - 1.0 / 0.100).abs() < 1e-6, "{rounds}");
        // 4 crossings and 9 hops of 1 ms, a little of which is waiting for each other.
        let flow = predict(&row("flow", 0.5), &link, 8, 4).expect("a figure");
        assert!((1.0 / 0.050..1.0 / 0.049).contains(&flow), "{flow}");
    }
}
