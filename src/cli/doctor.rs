//! `exflow doctor`: whether this machine is fit to be a rank, and what to do where it is not.

use super::failure::Failure;
use super::os;
use super::output::{self, Format};
use exflow::engine;
use exflow::report::byte_text;
use exflow::transport::identity::Identity;
use exflow::transport::{ByteClass, Communicator, RoundId, quic};
use serde::Serialize;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Checks driver, device, UDP, clock, ports and identities of this machine, and says what to do
#[derive(Debug, clap::Args)]
#[command(after_help = "Ends with 1 where something FAILED; what is only slow is a warning.\n\n\
                  Example:\n  exflow doctor --port 4433 --identity certs/rank-1 --peer gpu1.example.org:4433")]
pub(crate) struct Args {
    /// Adapter: part of its name, or its number in `exflow devices` [default: the best one]
    #[arg(long, value_name = "NAME|N")]
    adapter: Option<String>,
    /// UDP and TCP ports that are to be free
    #[arg(long, value_name = "PORT", num_args = 1..)]
    port: Vec<u16>,
    /// Folder of a rank's identity, as `exflow cert` makes it
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// Hosts whose names are to be known
    #[arg(long, value_name = "HOST:PORT", num_args = 1..)]
    peer: Vec<String>,
    /// How the result is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Failed,
}

/// One check with what was found and what to do.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warning, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Failed, found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut checks = device(args.adapter.as_deref());
    checks.push(buffers());
    checks.push(ranks_over_udp());
    checks.push(clock(SystemTime::now()));
    checks.extend(args.port.iter().map(|&port| free_port(port)));
    checks.push(ipv6());
    checks.extend(args.identity.iter().map(|folder| identity(folder)));
    checks.extend(args.peer.iter().map(|peer| known(peer)));
    match args.format {
        Format::Json => output::json(&serde_json::json!({ "checks": checks }))?,
        Format::Text => output::text(&checks.iter().map(line).collect::<String>())?,
    }
    match checks.iter().filter(|check| check.verdict == Verdict::Failed).count() {
        0 => Ok(()),
        failed => {
            Err(Failure::Run(format!("{failed} of {} checks failed; see above what to do", checks.len())))
        }
    }
}

fn line(check: &Check) -> String {
    let word = match check.verdict {
        Verdict::Ok => "ok",
        Verdict::Warning => "warning",
        Verdict::Failed => "FAILED",
    };
    let remedy = check.remedy.as_ref().map(|text| format!("\n{:<20}→ {text}", "")).unwrap_or_default();
    format!("{word:<8} {:<10} {}{remedy}\n", check.name, check.found)
}

/// What WebGPU promises everywhere. Experts lie in buffers of whole experts, of a few tens of megabytes each.
const SMALL_BINDING: u64 = 128 << 20;

fn device(wanted: Option<&str>) -> Vec<Check> {
    let devices = engine::devices();
    let Some(best) = devices.first() else {
        let remedy = "install a Vulkan driver, on Linux without a GPU: apt install mesa-vulkan-drivers";
        return vec![Check::failed("driver", "no adapter found", remedy)];
    };
    let mut checks = vec![Check::ok("driver", format!("{} ({}, {})", best.name, best.backend, best.driver))];
    checks.push(match engine::probe(wanted) {
        Ok(probe) => Check::ok(
            "device",
            format!(
                "{} opened in {:.0} ms, answers in {:.0} µs",
                probe.adapter, probe.open_ms, probe.round_trip_us
            ),
        ),
        Err(error) => {
            Check::failed("device", error.to_string(), "see `exflow devices` and `exflow selftest`")
        }
    });
    let bound = format!("largest binding {}", byte_text(best.max_binding_bytes as f64));
    checks.push(match best.max_binding_bytes < SMALL_BINDING {
        false => Check::ok("limits", bound),
        true => Check::warning("limits", bound, "update the driver: experts larger than this do not fit"),
    });
    if let Some(memory) = best.memory {
        let total = byte_text(memory.total_bytes as f64);
        checks.push(match memory.free_bytes {
            Some(free) if free < memory.total_bytes / 10 => Check::warning(
                "memory",
                format!("{} of {total} left", byte_text(free as f64)),
                "close other programs that use the adapter",
            ),
            Some(free) => Check::ok("memory", format!("{} of {total} left", byte_text(free as f64))),
            None => Check::ok("memory", format!("{total}; its driver does not tell how much is left")),
        });
    }
    checks
}

/// What one round between a few ranks may hold; see docs/TRANSPORT.md.
const BUFFER_BYTES: u64 = 2 << 20;

/// What a socket may be granted. Where the system does not tell, ranks say so when they join.
fn buffers() -> Check {
    let Some((receive, send)) = os::udp_buffers() else {
        return Check::ok("buffers", "this system does not tell its limits of UDP buffers");
    };
    let found = format!(
        "UDP buffers of at most {} to receive and {} to send",
        byte_text(receive as f64),
        byte_text(send as f64)
    );
    match receive.min(send) >= BUFFER_BYTES {
        true => Check::ok("buffers", found),
        false => Check::warning(
            "buffers",
            found,
            format!(
                "for more speed: sysctl -w net.core.rmem_max={0} net.core.wmem_max={0}",
                4 * BUFFER_BYTES
            ),
        ),
    }
}

/// Two ranks of this process, joined over real UDP with certificates that the clock must agree to.
fn ranks_over_udp() -> Check {
    let started = Instant::now();
    let remedy =
        "let UDP pass on the loopback interface, and set the clock: certificates are valid from yesterday on";
    let failed = |error: &dyn std::fmt::Display| {
        Check::failed("ranks", format!("two ranks cannot join: {error}"), remedy)
    };
    let ranks = match quic::loopback_world(2, quic::QuicOptions::loopback()) {
        Ok(ranks) => ranks,
        Err(error) => return failed(&error),
    };
    let joined = started.elapsed();
    let meet = |mut rank: quic::QuicCommunicator| {
        let round = RoundId { number: 0, class: ByteClass::Ids, layer: u16::MAX };
        let started = Instant::now();
        rank.all_gather(round, vec![7].into()).map(|_| started.elapsed())
    };
    let threads: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || meet(rank))).collect();
    let mut slowest = Duration::ZERO;
    for thread in threads {
        match thread.join() {
            Ok(Ok(time)) => slowest = slowest.max(time),
            Ok(Err(error)) => return failed(&error),
            Err(_) => return failed(&"a thread panicked"),
        }
    }
    let ms = |time: Duration| 1e3 * time.as_secs_f64();
    Check::ok(
        "ranks",
        format!("two ranks joined over UDP in {:.0} ms, met in {:.1} ms", ms(joined), ms(slowest)),
    )
}

/// 2025-01-01, before this program was first written: a clock that is earlier is wrong.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);

fn clock(now: SystemTime) -> Check {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let days = since.as_secs() / 86_400;
    if since < EARLIEST {
        let found = format!("the clock stands {days} days after 1970");
        return Check::failed("clock", found, "set it (timedatectl set-ntp true): certificates depend on it");
    }
    match os::clock_is_kept() {
        Some(true) => Check::ok("clock", "set, and kept in time"),
        Some(false) => {
            let remedy = "wait for the first answer of a time server, or see `timedatectl timesync-status`";
            Check::warning("clock", "set, but not kept in time", remedy)
        }
        None => Check::ok("clock", "set; nobody tells whether it is kept in time"),
    }
}

fn free_port(port: u16) -> Check {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let taken = UdpSocket::bind(any).map(drop).and_then(|()| TcpListener::bind(any).map(drop)).err();
    match taken {
        None => Check::ok("port", format!("{port} is free, UDP and TCP")),
        Some(error) => {
            Check::failed("port", format!("{port}: {error}"), "choose another, or end who holds it")
        }
    }
}

fn ipv6() -> Check {
    match UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(_) => Check::ok("ipv6", "there"),
        Err(error) => Check::ok("ipv6", format!("not there ({error}); IPv4 is enough")),
    }
}

fn identity(folder: &Path) -> Check {
    match Identity::load(folder) {
        Ok(_) => Check::ok("identity", format!("{} is whole", folder.display())),
        Err(error) => Check::failed("identity", error.to_string(), "make one with `exflow cert`"),
    }
}

fn known(peer: &str) -> Check {
    match peer.to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(address)) => Check::ok("peer", format!("{peer} is {address}")),
        Ok(None) => Check::failed("peer", format!("{peer} has no address"), "write it as HOST:PORT"),
        Err(error) => {
            Check::failed("peer", format!("{peer}: {error}"), "write it as HOST:PORT, or mend the names")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_never_set_is_found() {
        assert_eq!(clock(SystemTime::UNIX_EPOCH + Duration::from_secs(9)).verdict, Verdict::Failed);
        assert_ne!(clock(SystemTime::now()).verdict, Verdict::Failed);
    }

    #[test]
    fn a_port_that_is_taken_is_found() {
        let held = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        let port = held.local_addr().expect("an address").port();
        assert_eq!(free_port(port).verdict, Verdict::Failed);
        assert_eq!(known("no port").verdict, Verdict::Failed);
    }

    #[test]
    fn a_remedy_stands_below_what_was_found() {
        let text = line(&Check::warning("buffers", "small", "raise them"));
        assert_eq!(text.lines().count(), 2);
        assert!(text.starts_with("warning  buffers") && text.contains("→ raise them"), "{text}");
    }
}
