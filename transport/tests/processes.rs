//! Ranks in processes of their own: killed, stopped and continued.

mod support;

use exflow_placement::Rank;
use exflow_transport::identity::{ClusterAuthority, DEFAULT_VALIDITY, Identity};
use exflow_transport::quic::{self, Listener, QuicCommunicator, QuicOptions};
use exflow_transport::{LossCause, TransportError};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{bounded, local_rank, quick, run_rounds};

/// `LEADER IDENTITY_DIRECTORY` for a process that is to be rank 1.
const CHILD: &str = "EXFLOW_TEST_CHILD";

fn options() -> QuicOptions {
    QuicOptions { idle_timeout: Duration::from_millis(1500), ..quick() }
}

/// Rank 1 when started by another test, nothing otherwise.
#[test]
fn child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let (leader, directory) = order.split_once(' ').expect("leader and directory");
    let identity = Identity::load(Path::new(directory)).expect("identity");
    let mut options = local_rank(1, 2, identity, options());
    options.leader = Some(leader.to_owned());
    let mut comm = quic::join(options).expect("join");
    // Until the parent leaves or kills this process.
    let _ = run_rounds(&mut comm, 0, u64::MAX, 50);
}

/// Ends the process with the test, whatever happens.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn with_child(test: impl FnOnce(QuicCommunicator, Guard)) {
    let directory = tempfile::tempdir().expect("directory");
    let authority = ClusterAuthority::init(directory.path()).expect("authority");
    let issue = |rank: u16| -> PathBuf {
        authority.issue_into(directory.path(), Rank(rank), DEFAULT_VALIDITY).expect("identity")
    };
    let own = Identity::load(&issue(0)).expect("identity");
    let leader = Listener::bind(local_rank(0, 2, own, options())).expect("bind");
    let order = format!("{} {}", leader.local_address(), issue(1).display());
    let child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, order)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("child");
    let child = Guard(child);
    test(leader.join().expect("rank 0"), child);
}

#[test]
fn a_killed_process_is_named_within_the_idle_timeout() {
    bounded(|| {
        with_child(|mut comm, mut child| {
            run_rounds(&mut comm, 0, 10, 50).expect("both live");
            child.0.kill().expect("kill");
            let began = Instant::now();
            let error = run_rounds(&mut comm, 10, u64::MAX, 50).expect_err("rank 1 was killed");
            let TransportError::PeerLost { peer: Rank(1), cause, round: Some(_), .. } = &error else {
                panic!("{error}")
            };
            assert!(matches!(cause, LossCause::Silent { .. }), "{error}");
            assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        });
    });
}

#[cfg(unix)]
#[test]
fn a_process_that_is_stopped_for_a_while_is_waited_for() {
    bounded(|| {
        with_child(|mut comm, child| {
            run_rounds(&mut comm, 0, 10, 50).expect("both live");
            let signal = |name: &str| {
                let sent = Command::new("sh").args(["-c", &format!("kill {name} {}", child.0.id())]).status();
                assert!(sent.expect("kill").success());
            };
            signal("-STOP");
            std::thread::scope(|scope| {
                let rounds = scope.spawn(|| run_rounds(&mut comm, 10, 500, 50));
                std::thread::sleep(Duration::from_millis(500));
                signal("-CONT");
                rounds.join().expect("thread").expect("slow is not dead");
            });
        });
    });
}
