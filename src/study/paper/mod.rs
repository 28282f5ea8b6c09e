//! Checks from the paper (arXiv 2401.08383): each claim, our figure, and whether it holds on the routes and runs given.
//!
//! Nothing here runs a model. Routes come from traces, affinity files or the routing history beside a model; runs come
//! from the JSON of `exflow bench` and `exflow bench strategies`. What was not given is reported as not measured.

mod evidence;
mod history;
mod placing;
mod routes;
mod running;

pub use evidence::{Evidence, StudyOptions};
pub use history::RoutingHistory;

use super::Gathered;
use crate::report::CheckFacts;
use exflow_placement::SolveError;

/// All checks, in the order of the paper.
///
/// # Errors
/// Where no placement can be solved for the ranks asked for.
pub fn paper_checks(
    found: &Gathered,
    history: Option<&RoutingHistory>,
    options: &StudyOptions,
) -> Result<Vec<CheckFacts>, SolveError> {
    let mut checks = vec![running::lossless(found), running::one_exchange(found)];
    let evidence = Evidence::new(found, history, options)?;
    match &evidence {
        Some(evidence) => {
            checks.push(running::volume_law(found, evidence));
            checks.push(routes::affinity(evidence));
            checks.push(placing::stay_rate(evidence)?);
            checks.push(placing::experts_per_rank(evidence)?);
            checks.push(placing::two_levels(evidence)?);
            checks.push(running::latency(evidence));
        }
        None => {
            let names = [
                "volume law",
                "affinity is real",
                "stay rate",
                "experts per rank",
                "two levels",
                "latency of the exchange",
            ];
            checks.extend(
                names.map(|name| {
                    open(name, "", "give a trace, affinity, or a model with its routing history")
                }),
            );
        }
    }
    checks.push(running::throughput(found));
    if let Some(evidence) = &evidence {
        checks.push(routes::profile_size(evidence)?);
        checks.push(routes::another_domain(evidence)?);
    }
    checks.push(routes::training(history));
    if let Some(evidence) = &evidence {
        checks.push(placing::solve_time(evidence));
        checks.push(placing::contexts(evidence)?);
        checks.push(placing::load_balance(evidence)?);
    }
    Ok(checks)
}

/// A check with a figure.
fn done(name: &str, claim: &str, pass: bool, figure: String) -> CheckFacts {
    CheckFacts { name: name.into(), claim: claim.into(), figure, pass: Some(pass), values: Vec::new() }
}

/// A check without its data.
fn open(name: &str, claim: &str, wanted: &str) -> CheckFacts {
    let figure = format!("not measured: {wanted}");
    CheckFacts { name: name.into(), claim: claim.into(), figure, ..CheckFacts::default() }
}

#[cfg(test)]
mod tests;
