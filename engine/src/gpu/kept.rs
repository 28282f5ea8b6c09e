//! What a driver compiled, kept in a file from one process to the next where its interface offers that (Vulkan).

use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes of the digest that stands before the driver's data.
const DIGEST_BYTES: usize = 32;
/// No driver makes as much of these kernels; a larger file is not read.
const MAX_BYTES: u64 = 256 << 20;

/// Where an adapter's compiled kernels are kept.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KeptPipelines {
    /// The file; it may be deleted at any time.
    pub path: PathBuf,
    /// Its size; `None`: nothing is kept yet.
    pub bytes: Option<u64>,
}

/// A driver's compiled pipelines, with the file that keeps them.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) raw: wgpu::PipelineCache,
    path: PathBuf,
}

impl Kept {
    /// Those of a device, with what its file holds; `None` where its interface or the user's folders offer no place.
    pub(super) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<Self> {
        let offered = device.features().contains(wgpu::Features::PIPELINE_CACHE);
        let path = path(info).filter(|_| offered)?;
        let data = read(&path);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: Some("exflow"),
            data: data.as_deref(),
            // Another driver's data, or an older one's: begin anew.
            fallback: true,
        };
        // SAFETY: the data is what `save` wrote into the user's own folder: the digest before it says that it is whole, the
        // file's name that it is of such an adapter; wgpu and the driver compare their versions.
        let raw = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self { raw, path })
    }

    /// Writes the file anew where there is more than it holds. A disk that refuses costs the next process the time to
    /// compile, and nothing else.
    pub(super) fn save(&self) {
        let Some(data) = self.raw.get_data() else { return };
        if read(&self.path).as_ref() != Some(&data)
            && let Err(e) = write(&self.path, &data)
        {
            tracing::debug!("compiled kernels were not kept in {}: {e}", self.path.display());
        }
    }
}

/// Where such an adapter's are kept.
pub(super) fn report(info: &wgpu::AdapterInfo) -> Option<KeptPipelines> {
    let path = path(info)?;
    let bytes = std::fs::metadata(&path).ok().map(|file| file.len());
    Some(KeptPipelines { path, bytes })
}

fn path(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    let name = wgpu::util::pipeline_cache_key(info)?;
    Some(user_folder()?.join(name).with_extension("bin"))
}

/// exflow's folder among this user's caches.
pub(super) fn user_folder() -> Option<PathBuf> {
    folder(&|variable| std::env::var_os(variable))
}

/// Where it is by the environment.
fn folder(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("LOCALAPPDATA"))
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|caches| caches.join("exflow"))
}

/// The data of a file that is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    let (digest, data) = bytes.split_at_checked(DIGEST_BYTES)?;
    (Sha256::digest(data)[..] == *digest).then(|| data.to_vec())
}

fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    replace(path, &[&Sha256::digest(data)[..], data].concat())
}

/// Writes a file in one piece: others see it before or after.
pub(super) fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let fresh = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&fresh, content)?;
    std::fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::{folder, read, write};
    use std::path::{Path, PathBuf};

    #[test]
    fn only_a_whole_file_is_read() {
        let there = tempfile::tempdir().expect("a folder");
        let path = there.path().join("deep").join("a.bin");
        assert_eq!(read(&path), None);
        write(&path, b"what a driver made").expect("writes");
        assert_eq!(read(&path).as_deref(), Some(&b"what a driver made"[..]));
        write(&path, b"more").expect("writes over it");
        assert_eq!(read(&path).as_deref(), Some(&b"more"[..]));
        assert_eq!(std::fs::read_dir(there.path().join("deep")).expect("a folder").count(), 1);
        let whole = std::fs::read(&path).expect("reads");
        for broken in [&whole[..whole.len() - 1], &whole[..7], &[], &[&whole[..], b"x"].concat()] {
            std::fs::write(&path, broken).expect("writes");
            assert_eq!(read(&path), None, "{} bytes", broken.len());
        }
    }

    #[test]
    fn the_folder_is_the_users() {
        let of = |set: &[(&str, &str)]| {
            folder(&|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        let root = std::env::temp_dir();
        let (home, xdg) = (root.join("home"), root.join("xdg"));
        let [home, xdg] = [&home, &xdg].map(|path: &PathBuf| path.to_str().expect("UTF-8"));
        assert_eq!(of(&[("HOME", home)]), Some(Path::new(home).join(".cache").join("exflow")));
        assert_eq!(of(&[("HOME", home), ("XDG_CACHE_HOME", xdg)]), Some(Path::new(xdg).join("exflow")));
        assert_eq!(of(&[("XDG_CACHE_HOME", "not/absolute")]), None);
        assert_eq!(of(&[]), None);
    }
}
