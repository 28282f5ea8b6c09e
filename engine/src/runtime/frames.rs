//! What the engine's payloads look like: little-endian, counts first, lengths checked while reading.

use super::tables::Edition;
use crate::EngineError;
use bytes::Bytes;
use exflow_placement::Rank;
use exflow_shaders::Cache;
use exflow_transport::Pool;

/// One chosen expert of a row, served by the rank that the row goes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    /// Its place in router order.
    pub(crate) k: u16,
    pub(crate) expert: u16,
    pub(crate) weight: f32,
}

/// A dispatched row; one that is written borrows its residual stream.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RowFrame<R = Vec<f32>> {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// Which placement table the token goes by.
    pub(crate) edition: Edition,
    /// g1: the token's next residence.
    pub(crate) next: Rank,
    /// The rank that serves the choice with the largest weight.
    pub(crate) main: Rank,
    /// Partials that g1 must expect from other ranks.
    pub(crate) expects: u16,
    pub(crate) choices: Vec<Choice>,
    /// `[H]` residual stream before the norm.
    pub(crate) residual: R,
}

impl RowFrame<&[f32]> {
    pub(crate) fn owned(self) -> RowFrame {
        let Self { sequence, position, edition, next, main, expects, choices, residual } = self;
        let residual = residual.to_vec();
        RowFrame { sequence, position, edition, next, main, expects, choices, residual }
    }
}

/// A partial on its way to the token's next residence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PartialFrame {
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// Place in router order of the choice that it is of (the first one of a sum).
    pub(crate) k: u16,
    /// `[H]`.
    pub(crate) values: Vec<f32>,
}

/// Keys and values of one position at one layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KvRow {
    pub(crate) layer: u16,
    pub(crate) sequence: u32,
    pub(crate) position: u32,
    /// What the cache holds of it.
    pub(crate) values: Vec<f32>,
}

/// Appends to a payload.
#[derive(Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn floats(&mut self, values: &[f32]) -> &mut Self {
        // One by one they would take twelve times as long.
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    pub(crate) fn row<R: AsRef<[f32]>>(&mut self, row: &RowFrame<R>) {
        self.u32(row.sequence).u32(row.position).u16(row.edition.0).u16(row.next.0).u16(row.main.0);
        self.u16(row.expects).u16(row.choices.len() as u16);
        for choice in &row.choices {
            self.u16(choice.k).u16(choice.expert).u32(choice.weight.to_bits());
        }
        self.floats(row.residual.as_ref());
    }

    pub(crate) fn partial(&mut self, sequence: u32, position: u32, k: u16, values: &[f32]) {
        self.u32(sequence).u32(position).u16(k).floats(values);
    }

    /// Keys and values of one position at one layer, in the cache's words.
    pub(crate) fn kv(&mut self, layer: u16, sequence: u32, position: u32, words: &[u32]) {
        self.u16(layer).u32(sequence).u32(position);
        self.bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }

    /// In flow a payload of rows or partials begins with what they are of.
    pub(crate) fn begin(&mut self, prefill: bool) -> &mut Self {
        if self.bytes.is_empty() {
            self.u16(u16::from(prefill));
        }
        self
    }
}

/// What goes to each rank, put together in memory that is used again: once that is there, a payload costs no allocation.
#[derive(Default)]
pub(crate) struct Payloads {
    /// `[R]` what is being written.
    open: Vec<Writer>,
    pool: Pool,
}

impl Payloads {
    pub(crate) fn new(ranks: usize) -> Self {
        Self { open: (0..ranks).map(|_| Writer::default()).collect(), pool: Pool::default() }
    }

    /// What goes to this rank next.
    pub(crate) fn to(&mut self, rank: Rank) -> &mut Writer {
        &mut self.open[rank.index()]
    }

    /// Bytes so far, to all ranks.
    pub(crate) fn bytes(&self) -> usize {
        self.open.iter().map(|writer| writer.bytes.len()).sum()
    }

    /// What was written for this rank, which may be nothing.
    pub(crate) fn take(&mut self, rank: Rank) -> Bytes {
        let written = &mut self.open[rank.index()].bytes;
        if written.is_empty() {
            return Bytes::new();
        }
        let mut buffer = self.pool.buffer(written.len());
        buffer.extend_from_slice(written);
        written.clear();
        self.pool.seal(buffer)
    }

    /// `[R]` what was written for each rank.
    pub(crate) fn take_all(&mut self) -> Vec<Bytes> {
        (0..self.open.len()).map(|rank| self.take(Rank::from(rank))).collect()
    }

    /// Forgets what was written.
    pub(crate) fn clear(&mut self) {
        self.open.iter_mut().for_each(|writer| writer.bytes.clear());
    }
}

/// Reads a payload of one peer.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    from: Rank,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], from: Rank) -> Self {
        Self { bytes, from }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], EngineError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or_else(|| {
            EngineError::Internal(format!("rank {} sent a payload that ends early", self.from))
        })?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, EngineError> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, EngineError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(crate) fn floats(&mut self, count: usize) -> Result<Vec<f32>, EngineError> {
        let bytes = self.take(4 * count)?;
        let values: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        match is_finite(&values) {
            true => Ok(values),
            false => Err(EngineError::Internal(format!("rank {} sent a row that is not finite", self.from))),
        }
    }

    /// Rows to the end of the payload, `hidden` values each.
    pub(crate) fn rows(mut self, hidden: usize) -> Result<Vec<RowFrame>, EngineError> {
        let mut rows = Vec::new();
        while !self.bytes.is_empty() {
            let (sequence, position) = (self.u32()?, self.u32()?);
            let edition = Edition(self.u16()?);
            let (next, main, expects, count) =
                (Rank(self.u16()?), Rank(self.u16()?), self.u16()?, self.u16()?);
            let mut choices = Vec::new();
            for _ in 0..count {
                let (k, expert) = (self.u16()?, self.u16()?);
                choices.push(Choice { k, expert, weight: f32::from_bits(self.u32()?) });
            }
            let residual = self.floats(hidden)?;
            rows.push(RowFrame { sequence, position, edition, next, main, expects, choices, residual });
        }
        Ok(rows)
    }

    /// Partials to the end of the payload, `hidden` values each.
    pub(crate) fn partials(mut self, hidden: usize) -> Result<Vec<PartialFrame>, EngineError> {
        let mut partials = Vec::new();
        while !self.bytes.is_empty() {
            let (sequence, position, k) = (self.u32()?, self.u32()?, self.u16()?);
            partials.push(PartialFrame { sequence, position, k, values: self.floats(hidden)? });
        }
        Ok(partials)
    }

    /// Keys and values to the end of the payload, `width` values a row, as the cache holds them.
    pub(crate) fn kv(mut self, width: usize, cache: Cache) -> Result<Vec<KvRow>, EngineError> {
        let mut rows = Vec::new();
        while !self.bytes.is_empty() {
            let (layer, sequence, position) = (self.u16()?, self.u32()?, self.u32()?);
            let words = self.take(4 * cache.words(width))?;
            let words: Vec<u32> =
                words.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let values = cache.unpack(&words, width);
            if !is_finite(&values) {
                return Err(EngineError::Internal(format!(
                    "rank {} sent keys that are not finite",
                    self.from
                )));
            }
            rows.push(KvRow { layer, sequence, position, values });
        }
        Ok(rows)
    }
}

/// Whether all are numbers; all are looked at, as one instruction then looks at several.
fn is_finite(values: &[f32]) -> bool {
    !values.iter().fold(false, |found, value| found | !value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_and_short_ones_are_refused() {
        let row = RowFrame {
            sequence: 7,
            position: 300,
            edition: Edition(2),
            next: Rank(2),
            main: Rank(1),
            expects: 1,
            choices: vec![Choice { k: 0, expert: 9, weight: 0.75 }],
            residual: vec![1.0, -2.0, 3.5],
        };
        let mut payloads = Payloads::new(2);
        payloads.to(Rank(1)).row(&row);
        assert!(payloads.bytes() > 0 && payloads.take(Rank(0)).is_empty());
        let bytes = payloads.take(Rank(1));
        assert!(payloads.bytes() == 0 && payloads.take(Rank(1)).is_empty());
        assert_eq!(Reader::new(&bytes, Rank(0)).rows(3).expect("whole"), [row]);
        for cut in 1..bytes.len() {
            assert!(Reader::new(&bytes[..cut], Rank(0)).rows(3).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let mut payloads = Payloads::new(1);
        for values in [[1.0, f32::NAN], [f32::NEG_INFINITY, 2.0]] {
            payloads.to(Rank(0)).partial(1, 2, 0, &values);
            assert!(Reader::new(&payloads.take(Rank(0)), Rank(3)).partials(2).is_err());
            payloads.to(Rank(0)).kv(0, 1, 2, &values.map(f32::to_bits));
            assert!(Reader::new(&payloads.take(Rank(0)), Rank(3)).kv(2, Cache::F32).is_err());
        }
    }

    #[test]
    fn a_payload_lies_where_one_lay_that_is_gone() {
        let mut payloads = Payloads::new(3);
        let mut places = std::collections::BTreeSet::new();
        for step in 0..2000_u32 {
            for rank in (0..3).map(Rank::from) {
                payloads.to(rank).begin(false).partial(7, step, 0, &[1.5; 100]);
            }
            let sent = payloads.take_all();
            for (rank, bytes) in sent.iter().enumerate() {
                let partials = Reader::new(&bytes[2..], Rank::from(rank)).partials(100).expect("whole");
                assert_eq!((partials.len(), partials[0].position), (1, step));
            }
            places.extend(sent.iter().map(|bytes| bytes.as_ptr() as usize / (64 << 10)));
        }
        assert!(places.len() <= 4, "2.4 MB in {} places of 64 KiB", places.len());
        payloads.to(Rank(2)).u32(1);
        payloads.clear();
        assert_eq!(payloads.bytes(), 0);
    }
}
