//! NumPy's `.npy` array and `.npz` archive: a small reader of any integer or float type, a writer of
//! `<i4`, `<f4` and `<f8`. Header versions 1 to 3, both byte orders, C and Fortran order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;

use thiserror::Error;

/// What is wrong with an array file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NpyError {
    /// The file could not be read or written.
    #[error("cannot read or write it: {0}")]
    Io(#[from] std::io::Error),
    /// The file does not begin with NumPy's magic bytes.
    #[error("it is not a .npy array (wrong magic bytes); save it with numpy.save")]
    Magic,
    /// The header is not the one that NumPy writes.
    #[error("its .npy header is malformed ({0}); save it again with numpy.save")]
    Header(&'static str),
    /// The element type is not an integer or a float of 1 to 8 bytes.
    #[error("its element type {0:?} is not supported; save it as int32, int64, float32 or float64")]
    Dtype(String),
    /// The shape holds more elements than this reader takes.
    #[error("its shape {0:?} holds more than 2^31 elements")]
    TooLarge(Vec<usize>),
    /// The file ends before the last element.
    #[error("it is truncated: shape {shape:?} needs {expected} elements, {found} are there")]
    Truncated {
        /// The shape that the header names.
        shape: Vec<usize>,
        /// Elements that the shape needs.
        expected: usize,
        /// Elements that the file holds.
        found: usize,
    },
    /// The archive is damaged.
    #[error("it is not a sound .npz archive: {0}")]
    Zip(#[from] zip::result::ZipError),
    /// An array of the archive is damaged.
    #[error("array {name:?}: {source}")]
    Member {
        /// The array's name without `.npy`.
        name: String,
        /// What is wrong with it.
        source: Box<NpyError>,
    },
}

/// An array in C order: `data.len()` is the product of `shape`.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Length of each axis, slowest first.
    pub shape: Vec<usize>,
    /// The elements; integers beyond 2^53 are rounded.
    pub data: Vec<f64>,
}

const MAGIC: &[u8; 6] = b"\x93NUMPY";
const MAX_HEADER: usize = 1 << 16;
const MAX_ELEMENTS: usize = 1 << 31;
const CHUNK: usize = 1 << 16;

/// Reads one `.npy` array.
pub fn read(reader: &mut dyn Read) -> Result<Array, NpyError> {
    let (shape, data) = read_map(reader, |value| value)?;
    Ok(Array { shape, data })
}

/// Reads one `.npy` array, each element through `map`: the shape and the elements in C order.
pub fn read_map<T: Copy>(
    reader: &mut dyn Read,
    map: impl FnMut(f64) -> T,
) -> Result<(Vec<usize>, Vec<T>), NpyError> {
    let header = Header::read(reader)?;
    let count = header.elements()?;
    let data = header.dtype.read(reader, count, map)?;
    if data.len() < count {
        return Err(NpyError::Truncated { shape: header.shape, expected: count, found: data.len() });
    }
    let data = if header.fortran { to_c_order(&header.shape, &data) } else { data };
    Ok((header.shape, data))
}

/// Writes `data` of `shape` as int32.
pub fn write_i32(writer: &mut dyn Write, shape: &[usize], data: &[i32]) -> Result<(), NpyError> {
    write_header(writer, "<i4", shape)?;
    write_all(writer, data.iter().map(|v| v.to_le_bytes()))
}

/// Writes `data` of `shape` as float64.
pub fn write_f64(writer: &mut dyn Write, shape: &[usize], data: &[f64]) -> Result<(), NpyError> {
    write_header(writer, "<f8", shape)?;
    write_all(writer, data.iter().map(|v| v.to_le_bytes()))
}

/// Reads every array of an `.npz` archive, by name.
pub fn read_npz(path: &Path) -> Result<BTreeMap<String, Array>, NpyError> {
    read_archive(BufReader::new(File::open(path)?))
}

fn read_archive(file: impl Read + Seek) -> Result<BTreeMap<String, Array>, NpyError> {
    let mut archive = zip::ZipArchive::new(file)?;
    let mut arrays = BTreeMap::new();
    for index in 0..archive.len() {
        let mut member = archive.by_index(index)?;
        let Some(name) = member.name().strip_suffix(".npy").map(str::to_owned) else { continue };
        let array = read(&mut member)
            .map_err(|source| NpyError::Member { name: name.clone(), source: Box::new(source) })?;
        arrays.insert(name, array);
    }
    Ok(arrays)
}

/// Writes float64 arrays as a compressed `.npz` archive.
pub fn write_npz(path: &Path, arrays: &[(&str, &[usize], &[f64])]) -> Result<(), NpyError> {
    let mut archive = NpzWriter::create(path)?;
    for (name, shape, data) in arrays {
        archive.f64(name, shape, data)?;
    }
    archive.finish()
}

/// A compressed `.npz` archive that is written array by array. Each array's data is `shape`'s product long.
pub struct NpzWriter {
    archive: zip::ZipWriter<BufWriter<File>>,
}

impl NpzWriter {
    /// Creates the file, or empties the one that is there.
    pub fn create(path: &Path) -> Result<Self, NpyError> {
        Ok(Self { archive: zip::ZipWriter::new(BufWriter::new(File::create(path)?)) })
    }

    /// Appends a float64 array.
    pub fn f64(&mut self, name: &str, shape: &[usize], data: &[f64]) -> Result<(), NpyError> {
        write_f64(self.start(name)?, shape, data)
    }

    /// Appends a float32 array.
    pub fn f32(&mut self, name: &str, shape: &[usize], data: &[f32]) -> Result<(), NpyError> {
        let archive = self.start(name)?;
        write_header(archive, "<f4", shape)?;
        write_all(archive, data.iter().map(|v| v.to_le_bytes()))
    }

    /// Appends an int32 array.
    pub fn i32(&mut self, name: &str, shape: &[usize], data: &[i32]) -> Result<(), NpyError> {
        write_i32(self.start(name)?, shape, data)
    }

    /// Closes the archive; without it the file is not sound.
    pub fn finish(self) -> Result<(), NpyError> {
        Ok(self.archive.finish()?.flush()?)
    }

    fn start(&mut self, name: &str) -> Result<&mut dyn Write, NpyError> {
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .large_file(true);
        self.archive.start_file(format!("{name}.npy"), options)?;
        Ok(&mut self.archive)
    }
}

struct Header {
    dtype: Dtype,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    fn read(reader: &mut dyn Read) -> Result<Self, NpyError> {
        let mut start = [0u8; 8];
        reader.read_exact(&mut start).map_err(|_| NpyError::Magic)?;
        if &start[..6] != MAGIC {
            return Err(NpyError::Magic);
        }
        let length = header_length(reader, start[6])?;
        let mut text = vec![0u8; length];
        reader.read_exact(&mut text).map_err(|_| NpyError::Header("it ends early"))?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Result<Self, NpyError> {
        let descr = value_of(text, "descr")?;
        let quote = descr.chars().next().filter(|c| matches!(c, '\'' | '"'));
        let Some(quote) = quote else { return Err(NpyError::Dtype(descr.chars().take(40).collect())) };
        let descr = descr[1..].split(quote).next().unwrap_or_default();
        let fortran = value_of(text, "fortran_order")?.starts_with("True");
        Ok(Self { dtype: Dtype::parse(descr)?, fortran, shape: parse_shape(value_of(text, "shape")?)? })
    }

    fn elements(&self) -> Result<usize, NpyError> {
        let product = self.shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
        product.filter(|&n| n <= MAX_ELEMENTS).ok_or_else(|| NpyError::TooLarge(self.shape.clone()))
    }
}

fn header_length(reader: &mut dyn Read, major: u8) -> Result<usize, NpyError> {
    let mut bytes = [0u8; 4];
    let width = match major {
        1 => 2,
        2 | 3 => 4,
        _ => return Err(NpyError::Header("unknown format version")),
    };
    reader.read_exact(&mut bytes[..width]).map_err(|_| NpyError::Header("it ends early"))?;
    let length = u32::from_le_bytes(bytes) as usize;
    if length > MAX_HEADER { Err(NpyError::Header("it is too long")) } else { Ok(length) }
}

/// The text after `'key':` in the header's Python dictionary.
fn value_of<'t>(text: &'t str, key: &'static str) -> Result<&'t str, NpyError> {
    let at = text.find(&format!("'{key}'")).or_else(|| text.find(&format!("\"{key}\"")));
    let rest = at.map(|at| text[at + key.len() + 2..].trim_start());
    rest.and_then(|r| r.strip_prefix(':')).map(str::trim_start).ok_or(NpyError::Header(key))
}

fn parse_shape(text: &str) -> Result<Vec<usize>, NpyError> {
    let inner = text.strip_prefix('(').and_then(|t| t.split_once(')')).ok_or(NpyError::Header("shape"))?.0;
    let axes = inner.split(',').map(str::trim).filter(|axis| !axis.is_empty());
    axes.map(|axis| axis.trim_end_matches('L').parse().map_err(|_| NpyError::Header("shape"))).collect()
}

#[derive(Clone, Copy)]
enum Kind {
    Signed,
    Unsigned,
    Float,
}

/// One element: its kind, its width in bytes (1 to 8), whether its most significant byte comes first.
#[derive(Clone, Copy)]
struct Dtype {
    kind: Kind,
    width: usize,
    big_endian: bool,
}

impl Dtype {
    fn parse(descr: &str) -> Result<Self, NpyError> {
        let refuse = || NpyError::Dtype(descr.chars().take(40).collect());
        let body = descr.trim_start_matches(['<', '>', '=', '|']);
        let big_endian =
            descr.starts_with('>') || (descr.starts_with(['=', '|']) && cfg!(target_endian = "big"));
        let mut letters = body.chars();
        let kind = letters.next().ok_or_else(refuse)?;
        let width = letters.as_str();
        let (kind, width) = match (kind, width) {
            ('?', "") | ('b', "1") => (Kind::Unsigned, 1),
            ('i', "1" | "2" | "4" | "8") => (Kind::Signed, width.parse().map_err(|_| refuse())?),
            ('u', "1" | "2" | "4" | "8") => (Kind::Unsigned, width.parse().map_err(|_| refuse())?),
            ('f', "2" | "4" | "8") => (Kind::Float, width.parse().map_err(|_| refuse())?),
            _ => return Err(refuse()),
        };
        Ok(Self { kind, width, big_endian })
    }

    /// Up to `count` elements: memory grows with what is really there, not with what a header claims.
    fn read<T: Copy>(
        self,
        reader: &mut dyn Read,
        count: usize,
        mut map: impl FnMut(f64) -> T,
    ) -> Result<Vec<T>, NpyError> {
        let mut data = Vec::with_capacity(count.min(CHUNK));
        let mut buffer = vec![0u8; CHUNK * self.width];
        while data.len() < count {
            let want = (count - data.len()).min(CHUNK) * self.width;
            let got = read_up_to(reader, &mut buffer[..want])?;
            data.extend(buffer[..got].chunks_exact(self.width).map(|bytes| map(self.value(bytes))));
            if got < want {
                break;
            }
        }
        Ok(data)
    }

    fn value(self, bytes: &[u8]) -> f64 {
        let mut word = [0u8; 8];
        for (index, byte) in bytes.iter().enumerate() {
            word[if self.big_endian { bytes.len() - 1 - index } else { index }] = *byte;
        }
        let bits = u64::from_le_bytes(word);
        match (self.kind, self.width) {
            (Kind::Unsigned, _) => bits as f64,
            (Kind::Signed, width) => {
                let unused = 64 - 8 * width as u32;
                (((bits << unused) as i64) >> unused) as f64
            }
            (Kind::Float, 2) => half(bits as u16),
            (Kind::Float, 4) => f64::from(f32::from_bits(bits as u32)),
            (Kind::Float, _) => f64::from_bits(bits),
        }
    }
}

/// IEEE 754 binary16.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    match exponent {
        0 => sign * fraction * 2f64.powi(-14),
        31 if fraction == 0.0 => sign * f64::INFINITY,
        31 => f64::NAN,
        _ => sign * (1.0 + fraction) * 2f64.powi(exponent - 15),
    }
}

fn read_up_to(reader: &mut dyn Read, buffer: &mut [u8]) -> Result<usize, NpyError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Fortran order keeps the first axis fastest; C order the last.
fn to_c_order<T: Copy>(shape: &[usize], data: &[T]) -> Vec<T> {
    let mut index = vec![0usize; shape.len()];
    let strides: Vec<usize> = shape
        .iter()
        .scan(1, |stride, &axis| {
            let this = *stride;
            *stride *= axis;
            Some(this)
        })
        .collect();
    let mut out = Vec::with_capacity(data.len());
    for _ in 0..data.len() {
        out.push(data[index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>()]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

fn write_header(writer: &mut dyn Write, descr: &str, shape: &[usize]) -> Result<(), NpyError> {
    let axes: String = shape.iter().map(|axis| format!("{axis},")).collect();
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}), }}");
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.extend(std::iter::repeat_n(' ', padded - 1 - text.len()));
    text.push('\n');
    writer.write_all(MAGIC)?;
    writer.write_all(&[1, 0])?;
    writer.write_all(&(padded as u16).to_le_bytes())?;
    Ok(writer.write_all(text.as_bytes())?)
}

fn write_all<const N: usize>(
    writer: &mut dyn Write,
    elements: impl Iterator<Item = [u8; N]>,
) -> Result<(), NpyError> {
    let mut buffer = Vec::with_capacity(CHUNK);
    for element in elements {
        buffer.extend_from_slice(&element);
        if buffer.len() >= CHUNK {
            writer.write_all(&buffer)?;
            buffer.clear();
        }
    }
    Ok(writer.write_all(&buffer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(descr: &str, fortran: &str, shape: &str, body: &[u8]) -> Vec<u8> {
        let text = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let mut bytes = MAGIC.to_vec();
        bytes.extend([2, 0]);
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(body);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Array, NpyError> {
        read(&mut &bytes[..])
    }

    #[test]
    fn reads_every_type_and_byte_order() {
        let cases: [(&str, &[u8], f64); 9] = [
            ("|i1", &[0xff], -1.0),
            (">i2", &[0xff, 0xfe], -2.0),
            ("<u2", &[1, 2], 513.0),
            (">u4", &[0, 0, 1, 0], 256.0),
            ("<i8", &[0xfd, 255, 255, 255, 255, 255, 255, 255], -3.0),
            ("<f2", &[0x00, 0xc0], -2.0),
            (">f4", &[0x40, 0x20, 0, 0], 2.5),
            ("<f8", &[0, 0, 0, 0, 0, 0, 0xf0, 0x3f], 1.0),
            ("|b1", &[1], 1.0),
        ];
        for (descr, body, value) in cases {
            let array = parse(&file(descr, "False", "(1,)", body)).unwrap();
            assert_eq!(array.data, [value], "{descr}");
        }
    }

    #[test]
    fn fortran_order_is_turned_into_c_order() {
        let array = parse(&file("|u1", "True", "(2, 3)", &[1, 4, 2, 5, 3, 6])).unwrap();
        assert_eq!(array.data, [1., 2., 3., 4., 5., 6.]);
    }

    #[test]
    fn round_trip_through_an_archive() {
        let path = tempfile::tempdir().unwrap();
        let path = path.path().join("a.npz");
        write_npz(&path, &[("x", &[2, 2], &[1., 2., 3., 4.]), ("y", &[1], &[0.5])]).unwrap();
        let arrays = read_npz(&path).unwrap();
        assert_eq!(arrays["x"], Array { shape: vec![2, 2], data: vec![1., 2., 3., 4.] });
        assert_eq!(arrays["y"].data, [0.5]);
    }

    #[test]
    fn malformed_files_are_named_errors() {
        assert!(matches!(parse(b"PK\x03\x04 nothing"), Err(NpyError::Magic)));
        assert!(matches!(parse(b"\x93NUM"), Err(NpyError::Magic)));
        assert!(matches!(parse(&file("|O", "False", "(1,)", &[])), Err(NpyError::Dtype(_))));
        assert!(matches!(parse(&file("<c16", "False", "(1,)", &[])), Err(NpyError::Dtype(_))));
        assert!(matches!(parse(&file("|u1", "False", "(-1,)", &[])), Err(NpyError::Header(_))));
        let huge = "(4294967296, 4294967296)";
        assert!(matches!(parse(&file("|u1", "False", huge, &[])), Err(NpyError::TooLarge(_))));
        let short = parse(&file("<f8", "False", "(1000000000,)", &[0; 80]));
        assert!(matches!(short, Err(NpyError::Truncated { found: 10, .. })));
    }
}
