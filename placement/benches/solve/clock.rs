//! Clocks for measurements: the wall's, or on a busy machine the processor time of the one thread that solves.

use exflow_placement::{Clock, StdClock};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Processor time is asked for at most so often: the kernel counts it in ticks of a few milliseconds anyway.
const EVERY: Duration = Duration::from_millis(1);

/// The wall's clock, or where `processor` says so (Linux) the calling thread's processor time.
pub fn clock(processor: bool) -> Arc<dyn Clock> {
    match (processor, processor_time()) {
        (true, Some(time)) => Arc::new(ProcessorClock(Mutex::new((Instant::now(), time)))),
        _ => Arc::new(StdClock::start()),
    }
}

struct ProcessorClock(Mutex<(Instant, Duration)>);

impl Clock for ProcessorClock {
    fn elapsed(&self) -> Duration {
        let mut last = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.0.elapsed() >= EVERY {
            *last = (Instant::now(), processor_time().unwrap_or(last.1));
        }
        last.1
    }
}

/// Time that this thread has run, from its line in /proc.
fn processor_time() -> Option<Duration> {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    line.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}
