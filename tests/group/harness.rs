//! Processes of one group on this machine, which end with their test.

use crate::common::{prepare, tokens};
use exflow::engine::{
    Cluster, ClusterOptions, GroupOptions, NoProgress, Observer, Rank, Request, TransportKind,
};
use exflow::transport::identity::{ClusterAuthority, DEFAULT_VALIDITY};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Certificates, a port and a model for one group of processes on this machine.
pub(crate) struct Group {
    pub(crate) certificates: tempfile::TempDir,
    pub(crate) leader: String,
    pub(crate) processes: usize,
    pub(crate) model: PathBuf,
    pub(crate) said: Arc<Mutex<Vec<String>>>,
}

/// A worker that ends with the test, whatever happens.
pub(crate) struct Worker(pub(crate) Option<Child>);

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Worker {
    pub(crate) fn signal(&self, name: &str) {
        let id = self.0.as_ref().expect("it runs").id();
        // The shell's own: a small system has no program of that name.
        let sent = Command::new("sh").args(["-c", &format!("kill {name} {id}")]).status();
        assert!(sent.expect("a shell").success());
    }

    /// Waits for its end; a worker that does not end in a minute fails the test.
    pub(crate) fn end(mut self) -> Output {
        let mut child = self.0.take().expect("it runs");
        let began = Instant::now();
        while child.try_wait().expect("wait").is_none() {
            if began.elapsed() > Duration::from_secs(60) {
                let _ = child.kill();
                panic!("a worker does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().expect("output")
    }
}

pub(crate) fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl Group {
    pub(crate) fn new(processes: usize, model: &Path) -> Self {
        let certificates = tempfile::tempdir().expect("a folder");
        let authority = ClusterAuthority::init(certificates.path()).expect("authority");
        for rank in (0..processes).map(Rank::from) {
            authority.issue_into(certificates.path(), rank, DEFAULT_VALIDITY).expect("identity");
        }
        // Free a moment ago: rank 0 takes it at once.
        let port = UdpSocket::bind("127.0.0.1:0").expect("a port").local_addr().expect("address").port();
        let leader = format!("127.0.0.1:{port}");
        Self { certificates, leader, processes, model: model.to_owned(), said: Arc::default() }
    }

    pub(crate) fn options(&self) -> ClusterOptions {
        prepare();
        let mut group = GroupOptions::new(0, self.processes, &self.leader, self.certificates.path());
        group.join_timeout = Duration::from_secs(40);
        let said = Arc::clone(&self.said);
        group.observer = Observer::new(move |what| said.lock().expect("words").push(what.to_owned()));
        let mut options = ClusterOptions::new(&self.model);
        options.transport = TransportKind::Quic;
        options.group = Some(group);
        options
    }

    pub(crate) fn start(&self, options: ClusterOptions) -> JoinHandle<Cluster> {
        std::thread::spawn(move || Cluster::start(options, &NoProgress).expect("rank 0 starts"))
    }

    /// All processes, joined.
    pub(crate) fn run(&self) -> (Cluster, Vec<Worker>) {
        let workers: Vec<_> = (1..self.processes).map(|rank| self.worker(rank, &[])).collect();
        (self.start(self.options()).join().expect("thread"), workers)
    }

    pub(crate) fn said(&self) -> String {
        self.said.lock().expect("words").join("\n")
    }

    /// Runs the requests, to the same tokens each time, until no rank is absent.
    pub(crate) fn until_all_are_back(
        &self,
        cluster: &mut Cluster,
        requests: &[Request],
        expected: &[Vec<u32>],
    ) {
        let began = Instant::now();
        while !cluster.absent().is_empty() {
            assert!(began.elapsed() < Duration::from_secs(60), "{}", self.said());
            let run =
                cluster.generate(requests, &mut |_| {}).unwrap_or_else(|e| panic!("{e}\n{}", self.said()));
            assert_eq!(tokens(&run), expected, "with or without those who are absent");
        }
    }

    /// The command of a process; `more` may say a flag once more than the usual ones.
    pub(crate) fn command(&self, verb: &str, rank: usize, more: &[&str]) -> Command {
        let (rank, size) = (rank.to_string(), self.processes.to_string());
        let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
        command.arg(verb).args(more);
        if !more.contains(&"-m") {
            command.arg("-m").arg(&self.model);
        }
        for (flag, value) in [("--rank", rank.as_str()), ("--world-size", &size), ("--leader", &self.leader)]
        {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        if !more.contains(&"--identity") {
            command.arg("--identity").arg(self.certificates.path());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn worker(&self, rank: usize, more: &[&str]) -> Worker {
        let more = [more, &["--listen", "127.0.0.1:0"]].concat();
        Worker(Some(self.command("worker", rank, &more).spawn().expect("a worker")))
    }
}
