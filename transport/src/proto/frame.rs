//! Frames: a header of 40 bytes, then the payload. Every number is little-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `EXFL` |
//! | 4 | 1 | version of this layout, 1 |
//! | 5 | 1 | [`ByteClass`] |
//! | 6 | 2 | MoE layer, `0xffff` where there is none |
//! | 8 | 8 | world id: drawn by rank 0, the same at every rank; 0 until joined |
//! | 16 | 4 | epoch |
//! | 20 | 2 | source rank |
//! | 22 | 2 | zero |
//! | 24 | 8 | number: of the round; of the message on a bulk or control stream; with the top bit set: of a message between two ranks on the rows stream |
//! | 32 | 4 | payload length in bytes |
//! | 36 | 4 | FNV-1a over the 36 bytes before it |
//!
//! The payload carries no checksum of its own: the connection below authenticates every byte. The header's
//! guards against a reader that has lost its place.

use super::round::Violation;
use crate::{ByteClass, Pool};
use bytes::{Buf, Bytes, BytesMut};
use exflow_placement::Rank;

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 40;
/// Set in [`FrameHeader::number`] of a point-to-point message on the rows stream; the rest counts messages to that
/// peer, from 0.
pub const MESSAGE: u64 = 1 << 63;
/// Version of the frame layout.
pub const FRAME_VERSION: u8 = 1;
/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"EXFL";

/// What stands before every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub class: ByteClass,
    /// MoE layer, `u16::MAX` where there is none.
    pub layer: u16,
    /// Which world the frame belongs to.
    pub world: u64,
    /// Which life of that world.
    pub epoch: u32,
    /// The rank that sent it.
    pub source: Rank,
    /// Number of the round, or of the message on its stream, from 0.
    pub number: u64,
    /// Payload bytes.
    pub length: u32,
}

impl FrameHeader {
    /// The header as it goes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0_u8; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4] = FRAME_VERSION;
        out[5] = self.class as u8;
        out[6..8].copy_from_slice(&self.layer.to_le_bytes());
        out[8..16].copy_from_slice(&self.world.to_le_bytes());
        out[16..20].copy_from_slice(&self.epoch.to_le_bytes());
        out[20..22].copy_from_slice(&self.source.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.number.to_le_bytes());
        out[32..36].copy_from_slice(&self.length.to_le_bytes());
        let check = fnv1a(&out[..36]);
        out[36..40].copy_from_slice(&check.to_le_bytes());
        out
    }

    /// Reads a header and refuses any that this version would not have written, or whose payload would be
    /// longer than `cap` bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES], cap: u32) -> Result<Self, Violation> {
        let mut input = &bytes[..];
        if input[..4] != MAGIC {
            return Err(Violation::BadMagic);
        }
        if fnv1a(&input[..36]) != u32::from_le_bytes([bytes[36], bytes[37], bytes[38], bytes[39]]) {
            return Err(Violation::BadChecksum);
        }
        input.advance(4);
        let version = input.get_u8();
        if version != FRAME_VERSION {
            return Err(Violation::FrameVersion { theirs: version });
        }
        let number = input.get_u8();
        let class = ByteClass::from_number(number).ok_or(Violation::UnknownClass { number })?;
        let layer = input.get_u16_le();
        let world = input.get_u64_le();
        let epoch = input.get_u32_le();
        let source = Rank(input.get_u16_le());
        if input.get_u16_le() != 0 {
            return Err(Violation::ReservedBits);
        }
        let number = input.get_u64_le();
        let length = input.get_u32_le();
        if length > cap {
            return Err(Violation::Oversized { length, cap });
        }
        Ok(Self { class, layer, world, epoch, source, number, length })
    }
}

/// 32-bit FNV-1a.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Cuts a byte stream into frames.
///
/// Call [`Decoder::header`] until it gives one, decide whether the payload is wanted (nothing has been
/// allocated for it yet), then call [`Decoder::payload`] until it gives the payload. Both take what they need
/// from the front of `input` and ask for more by returning `None`.
#[derive(Debug)]
pub struct Decoder {
    cap: u32,
    head: [u8; HEADER_BYTES],
    have: usize,
    expected: Option<usize>,
    /// Of a payload of which a part has come.
    body: Option<BytesMut>,
    pool: Pool,
}

impl Decoder {
    /// A decoder that refuses payloads longer than `cap` bytes.
    pub fn new(cap: u32) -> Self {
        Self { cap, head: [0; HEADER_BYTES], have: 0, expected: None, body: None, pool: Pool::default() }
    }

    /// Whether the stream may end here, between two frames.
    pub fn is_between_frames(&self) -> bool {
        self.have == 0 && self.expected.is_none()
    }

    /// The next header, once all of it has come.
    pub fn header(&mut self, input: &mut Bytes) -> Result<Option<FrameHeader>, Violation> {
        let take = input.len().min(HEADER_BYTES - self.have);
        self.head[self.have..self.have + take].copy_from_slice(&input[..take]);
        input.advance(take);
        self.have += take;
        if self.have < HEADER_BYTES {
            return Ok(None);
        }
        let header = FrameHeader::decode(&self.head, self.cap)?;
        self.have = 0;
        self.expected = Some(header.length as usize);
        Ok(Some(header))
    }

    /// The payload of the header that was given last, once all of it has come. A payload that lies in one
    /// piece of input is not copied; any other is put together in memory that is used again ([`Pool`]).
    pub fn payload(&mut self, input: &mut Bytes) -> Option<Bytes> {
        let length = self.expected?;
        if self.body.is_none() && input.len() >= length {
            self.expected = None;
            return Some(input.split_to(length));
        }
        let mut body = self.body.take().unwrap_or_else(|| self.pool.buffer(length));
        let take = input.len().min(length - body.len());
        body.extend_from_slice(&input[..take]);
        input.advance(take);
        if body.len() < length {
            self.body = Some(body);
            return None;
        }
        self.expected = None;
        Some(self.pool.seal(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(length: u32) -> FrameHeader {
        FrameHeader {
            class: ByteClass::Combine,
            layer: 7,
            world: 0x0102_0304_0506_0708,
            epoch: 9,
            source: Rank(3),
            number: 0x1112_1314_1516_1718,
            length,
        }
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = header(0x21).encode();
        let expected = [
            0x45, 0x58, 0x46, 0x4c, 1, 1, 7, 0, 8, 7, 6, 5, 4, 3, 2, 1, 9, 0, 0, 0, 3, 0, 0, 0, 0x18, 0x17,
            0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x21, 0, 0, 0,
        ];
        assert_eq!(bytes[..36], expected);
        assert_eq!(FrameHeader::decode(&bytes, 0x21), Ok(header(0x21)));
    }

    #[test]
    fn a_length_over_the_cap_is_refused_before_anything_is_allocated() {
        let mut decoder = Decoder::new(1024);
        let mut input = Bytes::copy_from_slice(&header(u32::MAX).encode());
        assert_eq!(decoder.header(&mut input), Err(Violation::Oversized { length: u32::MAX, cap: 1024 }));
        assert!(decoder.body.is_none());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = header(5).encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameHeader::decode(&bad, 1 << 20).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_cutting_of_the_stream_gives_the_same_frames(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..6),
            cuts in proptest::collection::vec(1_usize..90, 1..40),
        ) {
            let mut wire = Vec::new();
            for (number, payload) in payloads.iter().enumerate() {
                let mut head = header(payload.len() as u32);
                head.number = number as u64;
                wire.extend_from_slice(&head.encode());
                wire.extend_from_slice(payload);
            }
            let mut decoder = Decoder::new(1 << 16);
            let (mut at, mut cut, mut got, mut in_body) = (0, 0, Vec::new(), false);
            while at < wire.len() {
                let end = (at + cuts[cut % cuts.len()]).min(wire.len());
                let mut input = Bytes::copy_from_slice(&wire[at..end]);
                (at, cut) = (end, cut + 1);
                loop {
                    if !in_body {
                        if decoder.header(&mut input).expect("valid").is_none() { break; }
                        in_body = true;
                    }
                    let Some(payload) = decoder.payload(&mut input) else { break };
                    got.push(payload.to_vec());
                    in_body = false;
                }
            }
            prop_assert_eq!(got, payloads);
            prop_assert!(decoder.is_between_frames());
        }

        #[test]
        fn bytes_of_any_kind_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new(64);
            let mut input = Bytes::from(bytes);
            while let Ok(Some(_)) = decoder.header(&mut input) {
                if decoder.payload(&mut input).is_none() { break; }
            }
        }
    }
}
