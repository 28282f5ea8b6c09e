//! Prints what an all-to-all costs on this machine: `cargo run --release -p exflow-transport --example alltoall`.
//! Arguments: ranks (4), `shared` (one driver thread) or `per-rank`, largest UDP payload (8952).

#![allow(clippy::print_stdout, reason = "a table for people")]

use exflow_transport::bench;
use exflow_transport::quic::{DriverThreads, QuicOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ranks = arguments.first().map_or(Ok(4), |text| text.parse())?;
    let mut options = QuicOptions::loopback();
    if arguments.get(1).is_some_and(|text| text == "per-rank") {
        options.threads = DriverThreads::PerRank;
    }
    if let Some(payload) = arguments.get(2) {
        options.max_udp_payload = payload.parse()?;
    }
    print!("{}", bench::table(&bench::alltoall_loopback(ranks, &bench::SIZES, &options)?));
    Ok(())
}
