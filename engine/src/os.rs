//! What differs from one operating system to another.

/// Bytes of this host's memory, all and what programs may still take; `None` where this build cannot tell.
#[cfg(target_os = "linux")]
pub(crate) fn host_memory() -> Option<(u64, u64)> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// Bytes of this host's memory, all and what programs may still take; `None` where this build cannot tell.
#[cfg(not(target_os = "linux"))]
pub(crate) fn host_memory() -> Option<(u64, u64)> {
    None
}

/// `MemTotal` and `MemAvailable` of Linux's `/proc/meminfo`, which counts in KiB.
#[cfg(any(test, target_os = "linux"))]
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((of("MemTotal")?, of("MemAvailable")?))
}

#[cfg(test)]
mod tests {
    use super::parse_meminfo;

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
}
