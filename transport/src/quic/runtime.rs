//! Who drives sockets, timers and heartbeats: a thread of its own, so that no GPU work can make a rank look dead,
//! and, while a rank waits for its peers anyway, that rank's thread, which saves two changes of thread per exchange.

use std::future::Future;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Notify;

/// How long the thread leaves the driving to a rank that has just driven and will probably do so again.
const GRACE: Duration = Duration::from_micros(500);
/// The same where ranks have driven ever again: what is still to be acknowledged then waits this long at most.
const PATIENCE: Duration = Duration::from_millis(2);
/// Turns of all tasks before the thread ends.
const LAST_TURNS: usize = 4;

/// A single-threaded runtime and its thread; ends when the last owner lets go.
#[derive(Debug)]
pub(crate) struct RuntimeThread {
    runtime: Arc<Runtime>,
    turns: Arc<Turns>,
    thread: Option<JoinHandle<()>>,
}

/// Whose turn it is to drive.
#[derive(Debug, Default)]
struct Turns {
    state: Mutex<State>,
    changed: Condvar,
    /// Tells the thread to stop driving.
    release: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Ranks that drive, or wait while another one does.
    callers: usize,
    /// Whether the thread drives.
    driving: bool,
    /// Until when the thread leaves it to the ranks.
    reserved: Option<Instant>,
    stop: bool,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the thread is to drive; false when it is to end.
    fn wait(&self) -> bool {
        let mut state = self.lock();
        let (mut patience, mut seen) = (GRACE / 2, None);
        loop {
            if state.stop {
                return false;
            }
            let now = Instant::now();
            let left = match state.reserved {
                // Callers do not tell when they leave: that would cost a change of thread per exchange. While they come
                // again and again this thread looks less often, as each look takes a processor from somebody.
                reserved if state.callers > 0 || (reserved > Some(now) && reserved != seen) => {
                    (patience, seen) = ((patience * 2).min(PATIENCE), reserved);
                    patience
                }
                Some(until) if until > now => until - now,
                _ => break,
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.driving = true;
        true
    }
}

impl RuntimeThread {
    pub(crate) fn start(name: String) -> io::Result<Arc<Self>> {
        let runtime = Arc::new(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
        let turns = Arc::new(Turns::default());
        let (driven, its_turns) = (Arc::clone(&runtime), Arc::clone(&turns));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            while its_turns.wait() {
                driven.block_on(async {
                    its_turns.release.notified().await;
                    // What a rank has handed over leaves before nobody drives for a while.
                    tokio::task::yield_now().await;
                });
                its_turns.lock().driving = false;
            }
            // What was said last still leaves: peers hear that a connection is closed, and need not wait until it is silent.
            driven.block_on(async {
                for _ in 0..LAST_TURNS {
                    tokio::task::yield_now().await;
                }
            });
        })?;
        Ok(Arc::new(Self { runtime, turns, thread: Some(thread) }))
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Starts `future` on the thread; its result can be received, or is missing if the thread died.
    pub(crate) fn launch<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.handle().spawn(async move {
            // The receiver may have stopped waiting.
            let _ = sender.send(future.await);
        });
        receiver
    }

    /// Whether a caller may drive without waiting for the thread to let go.
    pub(crate) fn is_free(&self) -> bool {
        // A runtime within a runtime is refused by tokio; such a caller waits for the thread instead.
        !self.turns.lock().driving && Handle::try_current().is_err()
    }

    /// Drives on the calling thread until `future` is done.
    pub(crate) fn drive<T>(&self, future: impl Future<Output = T>) -> T {
        self.turns.lock().callers += 1;
        let _leaves = Leaves(&self.turns);
        self.runtime.block_on(future)
    }

    /// Leaves the next turn to the caller, who is likely to drive within [`GRACE`].
    pub(crate) fn reserve(&self) {
        let mut state = self.turns.lock();
        state.reserved = Some(Instant::now() + GRACE);
        let driving = state.driving;
        drop(state);
        if driving {
            self.turns.release.notify_one();
        }
    }

    /// Makes sure that what was handed over is worked on now.
    pub(crate) fn wake(&self) {
        let mut state = self.turns.lock();
        let idle = state.callers == 0 && !state.driving;
        state.reserved = None;
        drop(state);
        if idle {
            self.turns.changed.notify_one();
        }
    }
}

/// Notes that a caller no longer drives, also where it panics: else nobody would.
struct Leaves<'a>(&'a Turns);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.callers -= 1;
        state.reserved = Some(Instant::now() + GRACE);
    }
}

impl Drop for RuntimeThread {
    fn drop(&mut self) {
        self.turns.lock().stop = true;
        self.turns.changed.notify_one();
        self.turns.release.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}
