//! `cargo bench -p exflow-placement`: every promise of the solver on one thread, kept or not.
//!
//! - no argument: all of it; `-- bars [NAME…]`, `-- load`, `-- heldout`: one part;
//! - `-- at SECONDS… NAME…`: any instances (see `instances.rs` for their names) at any times;
//! - `-- best SECONDS RUNS NAME…`: long independent runs, for `best_known.txt`;
//! - `-- history SECONDS NAME…`: how cost and bound come about;
//! - `-- export A.npz NAME`: an instance's counts, for other programs;
//! - `--seed N`; `--processor-time`: seconds of the thread's processor time (Linux), for machines that do other things too.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![allow(unreachable_pub, reason = "modules of a program")]

mod bars;
mod best;
mod clock;
mod held_out;
mod instances;
mod loads;

use bars::{BARS, Setting};

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let processor_time = take_flag(&mut arguments, "--processor-time");
    let seed = take_value(&mut arguments, "--seed").unwrap_or(1);
    let setting = Setting { seed, processor_time };
    let (numbers, words): (Vec<String>, Vec<String>) =
        arguments.into_iter().partition(|a| a.parse::<f64>().is_ok());
    let numbers: Vec<f64> = numbers.iter().filter_map(|n| n.parse().ok()).collect();
    let names: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
    let seconds = numbers.first().copied().unwrap_or(10.0);
    let [kept, made] = match words.first().map(String::as_str) {
        None => sum([
            kept_bars(&[], setting),
            loads::measure(10.0, processor_time),
            held_out::measure(10.0, processor_time),
        ]),
        Some("bars") => kept_bars(&names, setting),
        Some("load") => loads::measure(seconds, processor_time),
        Some("heldout") => held_out::measure(seconds, processor_time),
        Some("at") => {
            bars::head(setting);
            sum(names.iter().map(|name| bars::measure(name, &bars::at_times(&numbers), setting)))
        }
        Some("best") => {
            let runs = numbers.get(1).map_or(1, |&runs| runs as u64);
            names.iter().for_each(|name| best::search(name, seconds, runs, processor_time));
            return;
        }
        Some("history") => {
            names.iter().filter_map(|name| instances::build(name)).for_each(|instance| {
                let (table, ..) = bars::solved(&instance, seconds, setting);
                for m in &table.history {
                    println!(
                        "{} {:.3} s: cost {:.0}, bound {:.0}",
                        instance.name, m.seconds, m.cost, m.lower_bound
                    );
                }
            });
            return;
        }
        Some("export") => {
            let [path, name] = names[..] else { return println!("export A.npz NAME") };
            match instances::build(name).map(|instance| instance.affinity.save_npz(path.as_ref())) {
                Some(Ok(())) => println!("{name} written to {path}"),
                Some(Err(error)) => println!("{error}"),
                None => println!("{name}: no such instance"),
            }
            return;
        }
        Some(other) => return println!("{other}: say bars, load, heldout, at, best, history or export"),
    };
    println!("\n{kept} of {made} promises kept");
}

fn kept_bars(names: &[&str], setting: Setting) -> [usize; 2] {
    bars::head(setting);
    let wanted = BARS.iter().filter(|(name, _)| names.is_empty() || names.contains(name));
    sum(wanted.map(|(name, promises)| bars::measure(name, promises, setting)))
}

fn sum(parts: impl IntoIterator<Item = [usize; 2]>) -> [usize; 2] {
    parts.into_iter().fold([0, 0], |[a, b], [c, d]| [a + c, b + d])
}

fn take_flag(arguments: &mut Vec<String>, name: &str) -> bool {
    let before = arguments.len();
    arguments.retain(|a| a != name);
    arguments.len() < before
}

fn take_value(arguments: &mut Vec<String>, name: &str) -> Option<u64> {
    let at = arguments.iter().position(|a| a == name)?;
    arguments.remove(at);
    (at < arguments.len()).then(|| arguments.remove(at)).and_then(|value| value.parse().ok())
}
