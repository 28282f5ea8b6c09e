//! Processor time of this process.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
use std::time::Duration;

/// All of its threads' so far; `None` where the system is not asked.
pub(super) fn of_process() -> Option<Duration> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?))
    }
    #[cfg(not(unix))]
    None
}

/// A number that no other process has, on this or another host, but for an odd chance.
pub(super) fn process() -> u64 {
    static DRAWN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish() | 1);
    *DRAWN
}
