//! What is particular to an operating system: signals, limits of sockets, whether the clock is kept. Each has a
//! fallback for every other system, which is compiled and tested everywhere.

use std::path::Path;

/// Comes back when the user or the system asks this process to end: Ctrl-C anywhere, SIGTERM too on Unix.
pub(crate) async fn asked_to_end() {
    tokio::select! {
        () = interrupted() => {}
        () = terminated() => {}
    }
}

/// Calls `then`, from a thread of its own, when the user or the system asks this process to end; nothing else ends it by
/// such a wish any more.
///
/// # Errors
/// Of making the thread, or what waits for signals.
pub(crate) fn when_asked_to_end(then: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let wait = move || {
        runtime.block_on(asked_to_end());
        then();
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop)
}

async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await; // a system that has no such thing
    }
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signals) => drop(signals.recv().await),
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}

/// Most bytes of a UDP socket's receive and send buffers, where the system tells: Linux does, in files.
pub(crate) fn udp_buffers() -> Option<(u64, u64)> {
    udp_buffers_in(Path::new("/proc/sys/net/core"))
}

fn udp_buffers_in(folder: &Path) -> Option<(u64, u64)> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok();
    Some((read("rmem_max")?, read("wmem_max")?))
}

/// Whether somebody keeps the clock in time, where the system tells: systemd does, by a file.
pub(crate) fn clock_is_kept() -> Option<bool> {
    Path::new("/run/systemd/timesync")
        .is_dir()
        .then(|| Path::new("/run/systemd/timesync/synchronized").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_that_does_not_tell_is_no_error() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(udp_buffers_in(folder.path()), None);
        std::fs::write(folder.path().join("rmem_max"), "212992\n").expect("writes");
        assert_eq!(udp_buffers_in(folder.path()), None);
        std::fs::write(folder.path().join("wmem_max"), "100\n").expect("writes");
        assert_eq!(udp_buffers_in(folder.path()), Some((212_992, 100)));
    }
}
