//! Prints what an all-to-all costs on this machine: `cargo run --release -p exflow-transport --example alltoall`.
//! Arguments: ranks (4), `shared` (one driver thread) or `per-rank`, largest UDP payload. `exflow bench alltoall` has more.

#![allow(clippy::print_stdout, reason = "a table for people")]

use exflow_transport::bench::{self, Order};
use exflow_transport::quic::DriverThreads;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ranks = arguments.first().map_or(Ok(4), |text| text.parse())?;
    let mut order = Order::default();
    if arguments.get(1).is_some_and(|text| text == "per-rank") {
        order.quic.threads = DriverThreads::PerRank;
    }
    if let Some(payload) = arguments.get(2) {
        order.quic.max_udp_payload = payload.parse()?;
    }
    print!("{}", bench::table(&bench::loopback(ranks, &order)?));
    Ok(())
}
