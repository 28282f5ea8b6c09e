//! What a planner measured, as a topology file for the solver.

use super::Planner;
use crate::study::grid::median;
use std::fmt::Write;

impl Planner {
    /// What was measured, as a topology file: costs in microseconds per row; `hosts` of each rank.
    pub fn topology(&self, hosts: &[String]) -> String {
        let (measured, row) = (&self.measured, self.shape.hidden_bytes);
        let speed = |rank: usize| measured.ranks[rank].hop.coherent.at(4);
        let fastest = (0..measured.world_size()).map(speed).fold(f64::INFINITY, f64::min);
        let mut text = String::from(
            "# Measured by `exflow plan`: microseconds for a row of this model, from rank to rank.\n",
        );
        let _ = writeln!(text, "row_bytes = {row}\nranks = [");
        for (rank, host) in hosts.iter().enumerate() {
            let speed = if speed(rank) > 0.0 { fastest / speed(rank) } else { 1.0 };
            let _ = writeln!(text, "    {{ host = {host:?}, speed = {speed:.3} }},");
        }
        text += "]\ncost = [\n";
        for (from, links) in measured.links.iter().enumerate() {
            let cost = |(to, link): (usize, &exflow_engine::plan::LinkTime)| match to == from {
                true => "0".to_owned(),
                false => format!("{:.1}", 1e6 * link.seconds(row)),
            };
            let costs: Vec<String> = links.iter().enumerate().map(cost).collect();
            let _ = writeln!(text, "    [{}],", costs.join(", "));
        }
        text += "]\n";
        for (class, same) in [("host", true), ("network", false)] {
            let pairs = measured.links.iter().enumerate().flat_map(|(from, links)| {
                links.iter().enumerate().filter(move |(to, _)| *to != from).map(move |(to, l)| (from, to, l))
            });
            let of_class = pairs.filter(|(from, to, _)| (hosts[*from] == hosts[*to]) == same);
            let (mut latencies, mut rates): (Vec<f64>, Vec<f64>) =
                of_class.map(|(_, _, link)| (1e6 * link.latency_s, 8e-9 * link.bytes_per_s)).unzip();
            if !latencies.is_empty() {
                let (latency, rate) = (median(&mut latencies), median(&mut rates));
                let _ = writeln!(text, "[link.{class}]\nlatency_us = {latency:.1}\ngbit_per_s = {rate:.6}");
            }
        }
        text
    }
}
