//! Links to order: what `--link` describes, and what becomes of each packet on such a link.
//!
//! A model of one rank's outgoing side, without socket or clock: the driver asks it when each packet may leave.

use crate::TransportError;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// An outgoing link: delay, rate and accidents. The default is no shaping at all.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct LinkSpec {
    /// Added one-way delay.
    pub latency: Duration,
    /// Bits per second; 0: as fast as it goes.
    pub rate_bits: u64,
    /// Share of packets that are lost, 0 to 1.
    pub loss: f64,
    /// Share of packets that are held back and overtaken.
    pub reorder: f64,
    /// Share of packets that are sent twice.
    pub duplicate: f64,
    /// Share of packets in which a bit is flipped.
    pub corrupt: f64,
    /// The same seed gives the same accidents for the same packets.
    pub seed: u64,
}

impl LinkSpec {
    /// A wired network: 0.2 ms one way, 1 Gbit/s.
    pub fn lan() -> Self {
        Self { latency: Duration::from_micros(200), rate_bits: 1_000_000_000, ..Self::default() }
    }

    /// A wireless network: 2 ms one way, 100 Mbit/s.
    pub fn wifi() -> Self {
        Self { latency: Duration::from_millis(2), rate_bits: 100_000_000, ..Self::default() }
    }

    /// A wide-area network: 10 ms one way, 50 Mbit/s.
    pub fn wan() -> Self {
        Self { latency: Duration::from_millis(10), rate_bits: 50_000_000, ..Self::default() }
    }

    fn profile(name: &str) -> Option<Self> {
        match name {
            "lan" => Some(Self::lan()),
            "wifi" => Some(Self::wifi()),
            "wan" => Some(Self::wan()),
            _ => None,
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "latency" => self.latency = duration(value)?,
            "rate" => self.rate_bits = rate(value)?,
            "loss" => self.loss = share(value)?,
            "reorder" => self.reorder = share(value)?,
            "duplicate" => self.duplicate = share(value)?,
            "corrupt" => self.corrupt = share(value)?,
            "seed" => self.seed = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

impl FromStr for LinkSpec {
    type Err = TransportError;

    /// Reads `lan`, `wifi`, `wan`, or `key=value` pairs separated by commas; a profile may come first.
    fn from_str(text: &str) -> Result<Self, TransportError> {
        let mut spec = Self::default();
        for (at, part) in text.split(',').map(str::trim).enumerate() {
            let profile = if at == 0 { Self::profile(part) } else { None };
            let known = match (profile, part.split_once('=')) {
                (Some(profile), _) => {
                    spec = profile;
                    Some(())
                }
                (None, Some((key, value))) => spec.set(key.trim(), value.trim()),
                (None, None) => None,
            };
            if known.is_none() {
                return Err(TransportError::Options {
                    what: format!("link {text:?}: {part:?} is not understood"),
                    remedy: "write lan, wifi, wan, or such as latency=5ms,rate=100mbit,loss=0.1%,seed=1"
                        .into(),
                });
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "latency={}us,rate={}bit", self.latency.as_micros(), self.rate_bits)?;
        let shares = [self.loss, self.reorder, self.duplicate, self.corrupt];
        for (name, share) in ["loss", "reorder", "duplicate", "corrupt"].into_iter().zip(shares) {
            if share > 0.0 {
                write!(f, ",{name}={share}")?;
            }
        }
        write!(f, ",seed={}", self.seed)
    }
}

/// A number and what follows it.
fn split_unit(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    Some((text[..end].parse().ok()?, text[end..].trim()))
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let seconds = match unit {
        "us" => number * 1e-6,
        "ms" => number * 1e-3,
        "s" => number,
        _ => return None,
    };
    (seconds <= 60.0).then(|| Duration::from_secs_f64(seconds))
}

fn rate(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let scale = match unit {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => return None,
    };
    Some((number * scale) as u64)
}

fn share(text: &str) -> Option<f64> {
    let (number, unit) = split_unit(text)?;
    let share = match unit {
        "%" => number / 100.0,
        "" => number,
        _ => return None,
    };
    (share <= 1.0).then_some(share)
}

/// What is to be done with one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// When it leaves (and, on a perfect wire, arrives).
    pub leave: Duration,
    /// When a copy leaves, if one does.
    pub copy: Option<Duration>,
    /// Which bit is flipped, if any.
    pub flip: Option<usize>,
}

/// The outgoing side of one link.
#[derive(Debug, Clone)]
pub struct LinkModel {
    spec: LinkSpec,
    random: u64,
    /// When the wire has sent all that was given to it.
    free_at: Duration,
}

/// Bytes that may wait for the wire, as time at its rate; what comes on top is lost, as in a switch.
const QUEUE: Duration = Duration::from_millis(50);
/// How much later a packet leaves that is overtaken.
const OVERTAKEN: Duration = Duration::from_millis(1);
/// Bytes that Ethernet, IP and UDP add to a payload.
const OVERHEAD_BYTES: u64 = 42;

impl LinkModel {
    /// A link as ordered. `salt` makes links with the same seed differ.
    pub fn new(spec: LinkSpec, salt: u64) -> Self {
        let random =
            spec.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x5851;
        Self { spec, random, free_at: Duration::ZERO }
    }

    /// Decides about a packet of `bytes` that is given to the link at `now`; `None`: it is lost.
    pub fn send(&mut self, now: Duration, bytes: usize) -> Option<Fate> {
        let accidents = [self.spec.loss, self.spec.reorder, self.spec.duplicate, self.spec.corrupt];
        let [lost, late, twice, broken] = accidents.map(|share| self.happens(share));
        let flip = broken.then(|| (self.next() as usize) % (bytes.max(1) * 8));
        let sent = self.transmit(now, bytes)?;
        if lost {
            return None;
        }
        let arrival = sent + self.spec.latency;
        let leave = if late { arrival + OVERTAKEN } else { arrival };
        Some(Fate { leave, copy: twice.then_some(arrival), flip })
    }

    /// When the last bit is on the wire; `None` where the queue before it is full.
    fn transmit(&mut self, now: Duration, bytes: usize) -> Option<Duration> {
        if self.spec.rate_bits == 0 {
            return Some(now);
        }
        let begin = self.free_at.max(now);
        if begin - now > QUEUE {
            return None;
        }
        let bits = (bytes as u64 + OVERHEAD_BYTES) * 8;
        self.free_at = begin + Duration::from_nanos(bits * 1_000_000_000 / self.spec.rate_bits.max(1));
        Some(self.free_at)
    }

    fn happens(&mut self, share: f64) -> bool {
        // Always drawn, so that one setting does not change the accidents of another.
        let drawn = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        drawn < share
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_and_written() {
        let spec: LinkSpec = "latency=5ms,rate=100mbit,loss=0.1%,seed=1".parse().expect("valid");
        assert_eq!((spec.latency, spec.rate_bits, spec.seed), (Duration::from_millis(5), 100_000_000, 1));
        assert!((spec.loss - 0.001).abs() < 1e-12);
        assert_eq!(spec.to_string().parse::<LinkSpec>().expect("valid"), spec);
        let wan: LinkSpec = "wan,loss=0.01".parse().expect("valid");
        assert_eq!((wan.latency, wan.loss), (Duration::from_millis(10), 0.01));
        for bad in
            ["", "moon", "latency=5", "loss=200%", "rate=-1mbit", "latency=5ms,lan", "loss=x", "rate=1mb"]
        {
            assert!(bad.parse::<LinkSpec>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rate_and_delay_add_up_and_the_queue_is_bounded() {
        let spec =
            LinkSpec { latency: Duration::from_millis(5), rate_bits: 8_000_000, ..LinkSpec::default() };
        let mut link = LinkModel::new(spec, 0);
        let wire = Duration::from_micros(1000);
        for packet in 1..=51 {
            let fate = link.send(Duration::ZERO, 958).expect("room in the queue");
            assert_eq!(fate.leave, wire * packet + spec.latency);
        }
        assert_eq!(link.send(Duration::ZERO, 958), None);
        assert!(link.send(Duration::from_millis(10), 958).is_some());
    }

    #[test]
    fn accidents_are_as_frequent_as_ordered_and_repeatable() {
        let spec: LinkSpec = "loss=10%,duplicate=20%,corrupt=5%,reorder=1%,seed=3".parse().expect("valid");
        let run = |salt| {
            let mut link = LinkModel::new(spec, salt);
            (0..10_000).map(|_| link.send(Duration::ZERO, 100)).collect::<Vec<_>>()
        };
        let fates = run(1);
        assert_eq!(fates, run(1));
        assert_ne!(fates, run(2));
        let share = |what: &dyn Fn(&Fate) -> bool| fates.iter().flatten().filter(|fate| what(fate)).count();
        assert!((850..1150).contains(&fates.iter().filter(|fate| fate.is_none()).count()));
        assert!((1600..2000).contains(&share(&|fate| fate.copy.is_some())));
        assert!((350..550).contains(&share(&|fate| fate.flip.is_some())));
        assert!((50..140).contains(&share(&|fate| !fate.leave.is_zero())));
    }
}
