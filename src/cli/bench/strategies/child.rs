//! Processes that do a part of the grid each: drivers may keep something of every device that a process ever had, and
//! what one part does to its process is no other part's loss.

use super::super::super::failure::Failure;
use super::super::super::os;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Ctrl-C reaches the part that runs as well: it may be gone before this process has heard of the wish.
const SAME_TIME: Duration = Duration::from_millis(300);

/// What is heard while a part runs.
enum Heard {
    /// A line of its stdout.
    Line(String),
    /// Its stdout is closed: it is at its end.
    Closed,
    /// The user or the system wants the grid to end.
    Stop,
}

/// How a part ended.
pub(super) enum End {
    Done,
    /// It failed; unless something killed it, it has told why on stderr.
    Failed(ExitStatus),
    /// It, or what is to come, was not wanted any more.
    Stopped,
}

/// Runs parts one after the other, until it is asked to stop.
pub(super) struct Parts {
    heard: Receiver<Heard>,
    tell: Sender<Heard>,
}

impl Parts {
    /// From here on Ctrl-C does not end this process but makes [`Self::run`] stop.
    pub(super) fn new() -> Result<Self, Failure> {
        let (tell, heard) = channel();
        let stop = tell.clone();
        os::when_asked_to_end(move || drop(stop.send(Heard::Stop)))
            .map_err(|e| Failure::Run(format!("cannot listen for Ctrl-C: {e}")))?;
        Ok(Self { heard, tell })
    }

    /// Runs a part to its end and hands out each line of its stdout as it comes; stderr is shared.
    pub(super) fn run(&self, mut part: Command, line: &mut dyn FnMut(&str)) -> Result<End, Failure> {
        if matches!(self.heard.try_recv(), Ok(Heard::Stop)) {
            return Ok(End::Stopped);
        }
        let failed = |what: &str, e| Failure::Run(format!("a part of the grid {what}: {e}"));
        part.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = part.spawn().map_err(|e| failed("did not start", e))?;
        self.listen(&mut child).map_err(|e| failed("cannot be listened to", e))?;
        let mut stopped = false;
        loop {
            // It holds a sender itself, so there is always one.
            match self.heard.recv().unwrap_or(Heard::Closed) {
                Heard::Line(text) => line(&text),
                Heard::Closed => break,
                Heard::Stop => {
                    stopped = true;
                    let _ = child.kill(); // it may have ended by itself
                }
            }
        }
        let status = child.wait().map_err(|e| failed("cannot be waited for", e))?;
        if status.success() && !stopped {
            return Ok(End::Done);
        }
        let stopped = stopped || matches!(self.heard.recv_timeout(SAME_TIME), Ok(Heard::Stop));
        Ok(if stopped { End::Stopped } else { End::Failed(status) })
    }

    /// Lines of a part's stdout, from a thread that ends with it.
    fn listen(&self, child: &mut Child) -> std::io::Result<()> {
        let (stdout, tell) = (child.stdout.take(), self.tell.clone());
        let listen = move || {
            for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
                let _ = tell.send(Heard::Line(line));
            }
            let _ = tell.send(Heard::Closed);
        };
        std::thread::Builder::new().name("part".into()).spawn(listen).map(drop)
    }
}
