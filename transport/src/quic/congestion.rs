//! A congestion controller for links that belong to the cluster: a bounded window per peer, no slow start.
//!
//! All ranks send at the same moment, and the queues on the way are short. What helps there is that no sender
//! ever has more in flight than the queue (or the receiver's socket buffer) takes; probing for more only
//! causes the loss that it then reacts to.

use quinn::congestion::{Controller, ControllerFactory};
use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

/// Share of the window that stays after a loss.
const DECREASE: f64 = 0.85;
/// A batch of acknowledgements gives back this fraction of the window (one over it).
const GROWTH: u64 = 64;
/// The window is never below this, so that a burst of loss cannot stall the link.
const FLOOR_BYTES: u64 = 32 * 1024;
/// Nor below so many packets: a receiver acknowledges every ninth.
const FLOOR_PACKETS: u64 = 10;

/// Builds [`BoundedWindow`]s.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BoundedWindowConfig {
    pub(crate) window_bytes: u64,
}

impl ControllerFactory for BoundedWindowConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let floor = FLOOR_BYTES.min(self.window_bytes).max(FLOOR_PACKETS * u64::from(mtu));
        let bound = self.window_bytes.max(floor);
        Box::new(BoundedWindow { bound, floor, window: bound, reacted: now })
    }
}

/// A fixed window that yields a little on loss and grows back to its bound within a few round trips.
#[derive(Debug, Clone)]
struct BoundedWindow {
    bound: u64,
    floor: u64,
    window: u64,
    /// When the window was last made smaller; packets sent before that say nothing new.
    reacted: Instant,
}

impl Controller for BoundedWindow {
    fn on_end_acks(&mut self, _now: Instant, _in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        // Batches of acknowledgements come about once a millisecond under load.
        self.window = (self.window + self.window / GROWTH).min(self.bound);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        if lost_bytes == 0 || sent <= self.reacted {
            return;
        }
        self.reacted = now;
        self.window = if persistent { self.floor } else { (self.window as f64 * DECREASE) as u64 };
        self.window = self.window.max(self.floor);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.floor = self.floor.max(FLOOR_PACKETS * u64::from(new_mtu));
        self.bound = self.bound.max(self.floor);
        self.window = self.window.max(self.floor);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.bound
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
