//! Congestion controllers for links that belong to the cluster: a bounded window per peer, no slow start.
//!
//! All ranks send at the same moment, and the queues on the way are short. What helps there is that no sender
//! ever has more in flight than the queue (or the receiver's socket buffer) takes; probing for more only
//! causes the loss that it then reacts to. Where the links are not known, the round trip tells how full the queues are:
//! [`ShortQueue`] keeps them at about a millisecond, so that a small message never waits long behind bulk.

use super::endpoint::{ACK_THRESHOLD, ACK_THRESHOLD_LARGE};
use quinn::congestion::{Controller, ControllerFactory};
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Share of the window that stays after a loss.
const DECREASE: f64 = 0.85;
/// A batch of acknowledgements gives back this fraction of the window (one over it).
const GROWTH: u64 = 64;
/// The window is never below this, so that a burst of loss cannot stall the link.
const FLOOR_BYTES: u64 = 32 * 1024;
/// Nor below so many packets: a receiver acknowledges every ninth.
const FLOOR_PACKETS: u64 = ACK_THRESHOLD_LARGE as u64 + 2;

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

/// Time that a packet may spend in queues, all on the way together.
const QUEUE: Duration = Duration::from_millis(1);
/// A long way may have longer queues: this fraction (one over it) of the shortest round trip.
const QUEUE_SHARE: u32 = 4;
/// The window when a connection begins: what a short queue takes from a few senders at once.
const FIRST_BYTES: u64 = 64 * 1024;
/// A round trip with room in the queues gives the window so much of itself (one over it).
const GROWTH_PER_TRIP: u64 = 8;
/// The shortest round trip is found anew after so long: a path may change.
const FORGET: Duration = Duration::from_secs(30);
/// Packets whose times are kept.
const MOST_SENT: usize = 4096;
/// Packets in flight that keep acknowledgements coming.
const LEAST_PACKETS: u64 = ACK_THRESHOLD as u64 + 2;

/// Builds [`ShortQueue`]s.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShortQueueConfig {
    /// The window is never above this: a share of the receiver's socket buffer.
    pub(crate) most_bytes: u64,
}

impl ControllerFactory for ShortQueueConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(ShortQueue::new(self.most_bytes, now, mtu))
    }
}

/// A window that follows the round trip: smaller while packets wait in queues, larger while they do not.
#[derive(Debug, Clone)]
struct ShortQueue {
    most: u64,
    floor: u64,
    window: u64,
    /// The shortest round trip and when it was seen.
    shortest: Option<(Duration, Instant)>,
    /// The shortest one of packets sent since `trip_began`: one that waited for its acknowledgement says little.
    trip: Option<Duration>,
    trip_began: Instant,
    /// Whether the window was the limit in this trip.
    limited: bool,
    reacted: Instant,
    /// When packets were sent of which nothing is known yet, by number.
    sent: VecDeque<(u64, Instant)>,
}

impl ShortQueue {
    fn new(most: u64, now: Instant, mtu: u16) -> Self {
        let floor = LEAST_PACKETS * u64::from(mtu);
        let most = most.max(floor);
        let window = FIRST_BYTES.clamp(floor, most);
        Self {
            most,
            floor,
            window,
            shortest: None,
            trip: None,
            trip_began: now,
            limited: false,
            reacted: now,
            sent: VecDeque::new(),
        }
    }

    /// Takes the round trip of one packet; at the end of a trip, adapts.
    fn sample(&mut self, now: Instant, sent: Instant, app_limited: bool) {
        let rtt = now.saturating_duration_since(sent);
        if self.shortest.is_none_or(|(least, seen)| rtt <= least || now - seen > FORGET) {
            self.shortest = Some((rtt, now));
        }
        self.limited |= !app_limited;
        if sent < self.trip_began {
            return;
        }
        let trip = self.trip.map_or(rtt, |trip| trip.min(rtt));
        self.trip = Some(trip);
        if now - self.trip_began >= trip {
            self.adapt(trip);
            (self.trip, self.trip_began, self.limited) = (None, now, false);
        }
    }

    fn adapt(&mut self, trip: Duration) {
        let shortest = self.shortest.map_or(trip, |(least, _)| least);
        let (queued, allowed) = (trip - shortest.min(trip), QUEUE.max(shortest / QUEUE_SHARE));
        if queued > allowed {
            // What of the round trip is queue is in proportion to what is in flight; halfway there in each trip.
            let fits = (shortest + allowed).as_secs_f64() / trip.as_secs_f64();
            self.window = (self.window as f64 * (1.0 + fits) / 2.0) as u64;
        } else if self.limited {
            self.window += self.window / GROWTH_PER_TRIP;
        }
        self.window = self.window.clamp(self.floor, self.most);
    }
}

impl Controller for ShortQueue {
    fn on_sent(&mut self, now: Instant, _bytes: u64, packet: u64) {
        // Each phase of the handshake counts its packets anew.
        if self.sent.back().is_some_and(|(last, _)| *last >= packet) {
            self.sent.clear();
        }
        if self.sent.len() < MOST_SENT {
            self.sent.push_back((packet, now));
        }
    }

    fn on_end_acks(&mut self, now: Instant, _in_flight: u64, app_limited: bool, largest: Option<u64>) {
        // Of the packets that are acknowledged together, the last one waited least for it.
        while let Some((packet, sent)) =
            self.sent.front().copied().filter(|(packet, _)| Some(*packet) <= largest)
        {
            self.sent.pop_front();
            if Some(packet) == largest {
                self.sample(now, sent, app_limited);
            }
        }
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
        self.floor = LEAST_PACKETS * u64::from(new_mtu);
        self.most = self.most.max(self.floor);
        self.window = self.window.max(self.floor);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends what the window allows over a wire of `rate` bytes per second and `way` of round trip, for a second, in
    /// virtual time; gives the share of the wire that was used in the second half and the longest queue there.
    fn over_a_wire(rate: f64, way: Duration) -> (f64, Duration) {
        const PACKET: u64 = 1452;
        let began = Instant::now();
        let mut controller = ShortQueue::new(1 << 20, began, PACKET as u16);
        let (mut free, mut acks, mut in_flight) = (began, VecDeque::new(), 0);
        let (mut now, mut sent, mut longest) = (began, 0, Duration::ZERO);
        while now < began + Duration::from_secs(1) {
            let settled = now > began + Duration::from_millis(500);
            while in_flight + PACKET <= controller.window() {
                free = free.max(now) + Duration::from_secs_f64(PACKET as f64 / rate);
                acks.push_back((free + way, now));
                in_flight += PACKET;
                if settled {
                    sent += PACKET;
                    longest = longest.max(free - now);
                }
            }
            let Some((at, when)) = acks.pop_front() else { break };
            now = at;
            in_flight -= PACKET;
            controller.sample(now, when, false);
        }
        (sent as f64 / (rate / 2.0), longest)
    }

    #[test]
    fn a_wire_is_full_and_its_queue_is_short() {
        for (rate, way) in [(25e6, 200), (125e6, 100), (125e6, 400), (6.25e6, 2000)] {
            let (used, queue) = over_a_wire(rate, Duration::from_micros(way));
            assert!(used > 0.95, "{rate} bytes/s, {way} us: {used}");
            assert!(queue < Duration::from_millis(4), "{rate} bytes/s, {way} us: {queue:?}");
        }
    }

    #[test]
    fn loss_shrinks_the_window_once_per_trip_and_never_below_its_floor() {
        let began = Instant::now();
        let mut controller = ShortQueue::new(1 << 20, began, 1452);
        let first = controller.window();
        let at = |ms| began + Duration::from_millis(ms);
        controller.on_congestion_event(at(5), at(1), false, 1452);
        let once = controller.window();
        controller.on_congestion_event(at(6), at(2), false, 1452);
        assert!(once < first && controller.window() == once);
        controller.on_congestion_event(at(9), at(8), true, 1452);
        assert_eq!(controller.window(), LEAST_PACKETS * 1452);
    }
}
