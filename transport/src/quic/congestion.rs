//! Congestion controllers for links that belong to the cluster: a bounded window per peer, no slow start.
//!
//! All ranks send at the same moment, and the queues on the way are short. What helps there is that no sender
//! ever has more in flight than the queue (or the receiver's socket buffer) takes; probing for more only
//! causes the loss that it then reacts to. Where the links are not known, the round trip tells how full the queues are:
//! [`ShortQueue`] keeps them at about a millisecond, so that a small message never waits long behind bulk.

use super::background::Background;
use super::endpoint::{ACK_THRESHOLD, ACK_THRESHOLD_LARGE};
use quinn::congestion::{Controller, ControllerFactory};
use std::any::Any;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Share of the window that stays after a loss.
const DECREASE: f64 = 0.85;

/// How a window changes while nothing is lost.
trait Policy: Debug + Clone + Send + Sync + 'static {
    /// Packets in flight that keep acknowledgements coming: the window is never below them.
    const LEAST_PACKETS: u64;

    /// A packet was sent.
    fn sent(&mut self, _now: Instant, _packet: u64) {}

    /// Whether a whole window may leave at once; else quinn spreads it over the round trip.
    fn bursts(&self) -> bool;

    /// Packets up to `largest` were acknowledged together.
    fn acknowledged(&mut self, window: &mut Window, now: Instant, app_limited: bool, largest: Option<u64>);
}

/// Bytes that may be in flight.
#[derive(Debug, Clone, Copy)]
struct Window {
    bytes: u64,
    /// What it never goes below, whatever the packets' size.
    least: u64,
    floor: u64,
    most: u64,
}

impl Window {
    /// `bytes`, brought between `least`, or what a few packets take, and `most`.
    fn new<P: Policy>(bytes: u64, least: u64, most: u64, mtu: u16) -> Self {
        let floor = least.max(P::LEAST_PACKETS * u64::from(mtu));
        let most = most.max(floor);
        Self { bytes: bytes.clamp(floor, most), least, floor, most }
    }

    fn set(&mut self, bytes: u64) {
        self.bytes = bytes.clamp(self.floor, self.most);
    }
}

/// What quinn is told of a window that is not full and may leave in a burst: it spreads no window as large as this. It
/// spreads others at the rate of the round trips before, in steps of a millisecond, so that a wire that others have just
/// left stays half empty: 0.79 of a link at 256 KB, and 0.88 without.
const NO_PACING: u64 = 1 << 40;

/// A window that yields a little on loss and follows its policy otherwise.
#[derive(Debug, Clone)]
struct Windowed<P> {
    window: Window,
    policy: P,
    /// Bytes in flight, as far as is known: exactly after every acknowledgement.
    in_flight: u64,
    /// When the window was last made smaller; packets sent before that say nothing new.
    reacted: Instant,
}

impl<P: Policy> Controller for Windowed<P> {
    fn on_sent(&mut self, now: Instant, bytes: u64, packet: u64) {
        self.in_flight += bytes;
        self.policy.sent(now, packet);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.in_flight = in_flight;
        self.policy.acknowledged(&mut self.window, now, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        if lost_bytes == 0 || sent <= self.reacted {
            return;
        }
        self.reacted = now;
        self.window.set(if persistent { 0 } else { (self.window.bytes as f64 * DECREASE) as u64 });
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        let Window { bytes, least, most, .. } = self.window;
        self.window = Window::new::<P>(bytes, least, most, new_mtu);
    }

    fn window(&self) -> u64 {
        let full = self.in_flight >= self.window.bytes;
        if full || !self.policy.bursts() { self.window.bytes } else { NO_PACING }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window.bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Builds [`Bounded`] windows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BoundedConfig {
    pub(crate) window_bytes: u64,
}

impl ControllerFactory for BoundedConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let bytes = self.window_bytes;
        let window = Window::new::<Bounded>(bytes, FLOOR_BYTES.min(bytes), bytes, mtu);
        Box::new(Windowed { window, policy: Bounded, in_flight: 0, reacted: now })
    }
}

/// A batch of acknowledgements gives back this fraction of the window (one over it).
const GROWTH: u64 = 64;
/// The window is never below this, so that a burst of loss cannot stall the link.
const FLOOR_BYTES: u64 = 32 * 1024;

/// A fixed window that grows back to its bound within a few round trips.
#[derive(Debug, Clone, Copy)]
struct Bounded;

impl Policy for Bounded {
    /// A receiver acknowledges every ninth.
    const LEAST_PACKETS: u64 = ACK_THRESHOLD_LARGE as u64 + 2;

    fn bursts(&self) -> bool {
        true
    }

    fn acknowledged(
        &mut self,
        window: &mut Window,
        _now: Instant,
        _app_limited: bool,
        _largest: Option<u64>,
    ) {
        // Batches of acknowledgements come about once a millisecond under load.
        window.set(window.bytes + window.bytes / GROWTH);
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

/// Builds [`ShortQueue`]s.
#[derive(Debug, Clone)]
pub(crate) struct ShortQueueConfig {
    /// The window is never above this: a share of the receiver's socket buffer.
    pub(crate) most_bytes: u64,
    pub(crate) background: Background,
}

impl ControllerFactory for ShortQueueConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(ShortQueue::windowed(self.most_bytes, self.background.clone(), now, mtu))
    }
}

/// A window that follows the round trip: smaller while packets wait in queues, larger while they do not.
#[derive(Debug, Clone)]
struct ShortQueue {
    background: Background,
    /// Whether bulk was on its way when a packet was last sent or acknowledged: small messages wait behind its bursts, so it
    /// is spread.
    beside_bulk: bool,
    /// The shortest round trip and when it was seen.
    shortest: Option<(Duration, Instant)>,
    /// The shortest one of packets sent since `trip_began`: one that waited for its acknowledgement says little.
    trip: Option<Duration>,
    trip_began: Instant,
    /// Whether the window was the limit in this trip.
    limited: bool,
    /// When packets were sent of which nothing is known yet, by number.
    sent: VecDeque<(u64, Instant)>,
}

impl ShortQueue {
    fn windowed(most: u64, background: Background, now: Instant, mtu: u16) -> Windowed<Self> {
        let policy = Self {
            background,
            beside_bulk: false,
            shortest: None,
            trip: None,
            trip_began: now,
            limited: false,
            sent: VecDeque::new(),
        };
        let window = Window::new::<Self>(FIRST_BYTES, 0, most, mtu);
        Windowed { window, policy, in_flight: 0, reacted: now }
    }

    /// Takes the round trip of one packet; at the end of a trip, adapts.
    fn sample(&mut self, window: &mut Window, now: Instant, sent: Instant, app_limited: bool) {
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
            self.adapt(window, trip);
            (self.trip, self.trip_began, self.limited) = (None, now, false);
        }
    }

    fn adapt(&self, window: &mut Window, trip: Duration) {
        let shortest = self.shortest.map_or(trip, |(least, _)| least);
        let (queued, allowed) = (trip - shortest.min(trip), QUEUE.max(shortest / QUEUE_SHARE));
        if queued > allowed {
            // What of the round trip is queue is in proportion to what is in flight; halfway there in each trip.
            let fits = (shortest + allowed).as_secs_f64() / trip.as_secs_f64();
            window.set((window.bytes as f64 * (1.0 + fits) / 2.0) as u64);
        } else if self.limited {
            window.set(window.bytes + window.bytes / GROWTH_PER_TRIP);
        }
    }
}

impl Policy for ShortQueue {
    const LEAST_PACKETS: u64 = ACK_THRESHOLD as u64 + 2;

    fn bursts(&self) -> bool {
        !self.beside_bulk
    }

    fn sent(&mut self, now: Instant, packet: u64) {
        self.beside_bulk = self.background.is_there(now);
        // Each phase of the handshake counts its packets anew.
        if self.sent.back().is_some_and(|(last, _)| *last >= packet) {
            self.sent.clear();
        }
        if self.sent.len() < MOST_SENT {
            self.sent.push_back((packet, now));
        }
    }

    fn acknowledged(&mut self, window: &mut Window, now: Instant, app_limited: bool, largest: Option<u64>) {
        self.beside_bulk = self.background.is_there(now);
        // Of the packets that are acknowledged together, the last one waited least for it.
        while let Some((packet, sent)) =
            self.sent.front().copied().filter(|(packet, _)| Some(*packet) <= largest)
        {
            self.sent.pop_front();
            if Some(packet) == largest {
                self.sample(window, now, sent, app_limited);
            }
        }
    }
}

/// Bytes that this controller lets be in flight: of ours, whatever quinn is told.
pub(crate) fn window_of(controller: Box<dyn Controller>) -> u64 {
    let told = controller.window();
    let any = match controller.into_any().downcast::<Windowed<ShortQueue>>() {
        Ok(ours) => return ours.window.bytes,
        Err(any) => any,
    };
    any.downcast::<Windowed<Bounded>>().map_or(told, |ours| ours.window.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends what the window allows over a wire of `rate` bytes per second and `way` of round trip, for a second, in
    /// virtual time; gives the share of the wire that was used in the second half and the longest queue there.
    fn over_a_wire(rate: f64, way: Duration) -> (f64, Duration) {
        const PACKET: u64 = 1452;
        let began = Instant::now();
        let Windowed { mut window, policy: mut queue, .. } =
            ShortQueue::windowed(1 << 20, Background::new(), began, PACKET as u16);
        let (mut free, mut acks, mut in_flight) = (began, VecDeque::new(), 0);
        let (mut now, mut sent, mut longest) = (began, 0, Duration::ZERO);
        while now < began + Duration::from_secs(1) {
            let settled = now > began + Duration::from_millis(500);
            while in_flight + PACKET <= window.bytes {
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
            queue.sample(&mut window, now, when, false);
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
        let mut controller = ShortQueue::windowed(1 << 20, Background::new(), began, 1452);
        let first = controller.window.bytes;
        let at = |ms| began + Duration::from_millis(ms);
        controller.on_congestion_event(at(5), at(1), false, 1452);
        let once = controller.window.bytes;
        controller.on_congestion_event(at(6), at(2), false, 1452);
        assert!(once < first && controller.window.bytes == once);
        controller.on_congestion_event(at(9), at(8), true, 1452);
        assert_eq!(controller.window.bytes, ShortQueue::LEAST_PACKETS * 1452);
    }

    #[test]
    fn a_window_leaves_in_a_burst_but_beside_bulk_and_is_never_exceeded() {
        let (began, background) = (Instant::now(), Background::new());
        let mut controller = ShortQueue::windowed(1 << 20, background.clone(), began, 1452);
        let bytes = controller.window.bytes;
        controller.on_sent(began, bytes - 1, 0);
        assert_eq!(controller.window(), NO_PACING);
        controller.on_sent(began, 1, 1);
        assert_eq!(controller.window(), bytes, "full");
        controller.on_end_acks(began, 0, false, None);
        assert_eq!(controller.window(), NO_PACING);
        let bulk = background.piece();
        controller.on_sent(began, 1, 2);
        assert_eq!(controller.window(), bytes, "bulk is spread");
        drop(bulk);
        assert_eq!(window_of(controller.clone_box()), bytes);
        controller.on_end_acks(Instant::now() + Duration::from_secs(1), 0, false, None);
        assert_eq!(controller.window(), NO_PACING);
        assert_eq!(window_of(controller.clone_box()), bytes, "whatever quinn is told");
    }
}
