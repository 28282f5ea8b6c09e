//! What differs from one operating system to another. `portable` is what a system gets of which nothing better is known;
//! it is compiled and tested everywhere.

use memmap2::Mmap;

/// Bytes of this host's memory, all and what programs may still take; `None` where the system does not tell: Linux does,
/// in a file.
pub(crate) fn host_memory() -> Option<(u64, u64)> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// `MemTotal` and `MemAvailable` of Linux's `/proc/meminfo`, which counts in KiB.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((of("MemTotal")?, of("MemAvailable")?))
}

/// Gives the pages of a read-only map of a file that were read back to the system, which keeps the file's content as long
/// as it has room.
pub(crate) fn release(map: &Mmap) {
    #[cfg(unix)]
    unix::release(map);
    #[cfg(not(unix))]
    portable::release(map);
}

#[cfg(unix)]
mod unix {
    use memmap2::{Mmap, UncheckedAdvice};

    pub(super) fn release(map: &Mmap) {
        // SAFETY: the map is of a file and only read: what is given back is read anew when it is asked for again. A system
        // that refuses keeps the pages, which is no loss.
        let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

#[cfg(any(test, not(unix)))]
mod portable {
    use memmap2::Mmap;

    /// The system takes pages back by itself when it needs them.
    pub(super) fn release(_map: &Mmap) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24676304 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(parse_meminfo(text), Some((24_676_304 << 10, 20_000_000 << 10)));
        for wrong in
            ["", "MemTotal: 1 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB", "MemTotal: 1\nMemAvailable: 1"]
        {
            assert_eq!(parse_meminfo(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_was_given_back_can_be_read_again() {
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, &[7; 10_000]).expect("writes");
        // SAFETY: nobody else has the file.
        let map = unsafe { Mmap::map(&file) }.expect("a map");
        for release in [release, portable::release] {
            assert!(map.iter().all(|byte| *byte == 7));
            release(&map);
        }
        assert!(map.iter().all(|byte| *byte == 7));
    }
}
