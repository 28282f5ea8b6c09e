//! Arrays on disk, as numpy writes them: `.npy` version 1.0 inside a zip.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// The `.npy` form of an f32 array in C order.
pub(crate) fn f32_array(shape: &[usize], values: &[f32]) -> Vec<u8> {
    array("<f4", shape, bytemuck::cast_slice(values))
}

/// The `.npy` form of an i32 array in C order.
pub(crate) fn i32_array(shape: &[usize], values: &[i32]) -> Vec<u8> {
    array("<i4", shape, bytemuck::cast_slice(values))
}

/// Every target of wgpu is little-endian, so that memory is what the file holds.
fn array(dtype: &str, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sizes})}}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend_from_slice(&(header.len() as u16).to_le_bytes());
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(bytes);
    out
}

/// Writes named arrays.
pub(crate) fn write(path: &Path, arrays: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut zip = zip::ZipWriter::new(io::BufWriter::new(File::create(path)?));
    let options = zip::write::SimpleFileOptions::default().large_file(true);
    for (name, bytes) in arrays {
        zip.start_file(format!("{name}.npy"), options).map_err(io::Error::other)?;
        zip.write_all(bytes)?;
    }
    zip.finish().map_err(io::Error::other)?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_end_on_a_multiple_of_64() {
        let bytes = f32_array(&[3, 257], &[0.5; 771]);
        assert_eq!((bytes.len() - 771 * 4) % 64, 0);
        assert!(String::from_utf8_lossy(&bytes[10..]).starts_with("{'descr': '<f4'"));
    }
}
