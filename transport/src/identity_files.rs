//! Authorities and identities on disk, as PEM; keys are readable by their owner only.
//!
//! An authority's directory holds `authority.crt` and `authority.key`; it issues into `rank-N/`. An identity's
//! directory holds `identity.crt`, `identity.key` and either `authority.crt` or `pins.txt`, whose lines are a rank
//! and the SHA-256 of that rank's certificate in hexadecimal.

use crate::TransportError;
use crate::identity::{ClusterAuthority, Fingerprint, Identity, Trust};
use crate::os;
use exflow_placement::Rank;
use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

const AUTHORITY_CERTIFICATE: &str = "authority.crt";
const AUTHORITY_KEY: &str = "authority.key";
const CERTIFICATE: &str = "identity.crt";
const KEY: &str = "identity.key";
const PINS: &str = "pins.txt";

impl ClusterAuthority {
    /// Makes an authority in `directory`, which must not hold one yet.
    pub fn init(directory: &Path) -> Result<Self, TransportError> {
        let key_path = directory.join(AUTHORITY_KEY);
        if key_path.exists() {
            let what = "there is an authority already".into();
            return Err(wrong(
                &key_path,
                what,
                "choose another directory, or remove it if it is no longer trusted",
            ));
        }
        let authority = Self::new()?;
        fs::create_dir_all(directory).map_err(|e| system(directory, &e))?;
        write_private(&key_path, &authority.issuer.key().serialize_pem())?;
        write_public(&directory.join(AUTHORITY_CERTIFICATE), &pem("CERTIFICATE", &authority.certificate))?;
        Ok(authority)
    }

    /// Reads the authority of `directory`.
    pub fn load(directory: &Path) -> Result<Self, TransportError> {
        let key_path = directory.join(AUTHORITY_KEY);
        let text = read(&key_path, "make an authority with `exflow cert init`")?;
        let key = KeyPair::from_pem(&text)
            .map_err(|e| wrong(&key_path, e.to_string(), "make the authority again"))?;
        Ok(Self::from_parts(read_certificate(&directory.join(AUTHORITY_CERTIFICATE))?, key))
    }

    /// Issues an identity for `rank` into `directory`/rank-N; gives that path.
    pub fn issue_into(
        &self,
        directory: &Path,
        rank: Rank,
        validity: Duration,
    ) -> Result<PathBuf, TransportError> {
        let path = directory.join(format!("rank-{rank}"));
        self.issue(rank, validity)?.save(&path)?;
        Ok(path)
    }
}

impl Identity {
    /// Writes the identity into `directory`, over one that is there.
    pub fn save(&self, directory: &Path) -> Result<(), TransportError> {
        fs::create_dir_all(directory).map_err(|e| system(directory, &e))?;
        write_private(&directory.join(KEY), &pem("PRIVATE KEY", self.key.secret_der()))?;
        write_public(&directory.join(CERTIFICATE), &pem("CERTIFICATE", &self.certificate))?;
        match &self.trust {
            Trust::Authority(certificate) => {
                write_public(&directory.join(AUTHORITY_CERTIFICATE), &pem("CERTIFICATE", certificate))
            }
            Trust::Pinned(pins) => write_public(&directory.join(PINS), &write_pins(pins)),
        }
    }

    /// Reads the identity of `directory`.
    pub fn load(directory: &Path) -> Result<Self, TransportError> {
        let key_path = directory.join(KEY);
        let text = read(&key_path, "issue one with `exflow cert issue`")?;
        warn_if_readable(&key_path);
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes());
        let key = key.map_err(|e| wrong(&key_path, e.to_string(), "issue the identity again"))?;
        let certificate = read_certificate(&directory.join(CERTIFICATE))?;
        let pins = directory.join(PINS);
        let trust = if pins.exists() {
            Trust::Pinned(read_pins(&pins)?)
        } else {
            Trust::Authority(read_certificate(&directory.join(AUTHORITY_CERTIFICATE))?)
        };
        Ok(Self::new(certificate, key, trust))
    }
}

fn write_pins(pins: &[(Rank, Fingerprint)]) -> String {
    let mut text = String::from("# rank  SHA-256 of its certificate\n");
    for (rank, print) in pins {
        let hex: String = print.iter().map(|byte| format!("{byte:02x}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{rank} {hex}");
    }
    text
}

fn read_pins(path: &Path) -> Result<Vec<(Rank, Fingerprint)>, TransportError> {
    let text = read(path, "write one `RANK SHA256` per line")?;
    let lines =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(at, line)| {
            let what = format!("line {} is not `RANK SHA256`", at + 1);
            parse_pin(line).ok_or_else(|| wrong(path, what, "write a rank and 64 hexadecimal digits"))
        })
        .collect()
}

fn parse_pin(line: &str) -> Option<(Rank, Fingerprint)> {
    let (rank, hex) = line.trim().split_once(char::is_whitespace)?;
    let hex = hex.trim();
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut print = [0; 32];
    for (byte, at) in print.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some((Rank(rank.parse().ok()?), print))
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, TransportError> {
    let text = read(path, "issue the identity again")?;
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|e| wrong(path, e.to_string(), "issue the identity again"))
}

fn read(path: &Path, remedy: &str) -> Result<String, TransportError> {
    fs::read_to_string(path).map_err(|error| wrong(path, error.to_string(), remedy))
}

fn write_public(path: &Path, text: &str) -> Result<(), TransportError> {
    fs::write(path, text).map_err(|e| system(path, &e))
}

/// Writes a file that only its owner can read: never open to others, not even for a moment.
fn write_private(path: &Path, text: &str) -> Result<(), TransportError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    os::owner_only(&mut options);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(system(path, &error)),
        _ => {}
    }
    let written = options.open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|e| system(path, &e))
}

fn warn_if_readable(path: &Path) {
    if os::others_can_read(path) {
        tracing::warn!(path = %path.display(), "this key can be read by others: chmod 600");
    }
}

fn wrong(path: &Path, what: String, remedy: &str) -> TransportError {
    TransportError::Identity { path: Some(path.into()), what, remedy: remedy.into() }
}

fn system(path: &Path, error: &io::Error) -> TransportError {
    wrong(path, error.to_string(), "check the path and its permissions")
}

/// PEM with the given label.
fn pem(label: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let word = group.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
                << (8 * (3 - group.len()));
            for digit in 0..4 {
                let value = (word >> (18 - 6 * digit)) & 63;
                text.push(if digit <= group.len() { char::from(DIGITS[value as usize]) } else { '=' });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::DEFAULT_VALIDITY;

    #[test]
    fn identities_survive_the_disk_and_keys_are_private() {
        let directory = tempfile::tempdir().expect("directory");
        ClusterAuthority::init(directory.path()).expect("init");
        assert!(ClusterAuthority::init(directory.path()).is_err(), "an authority is never overwritten");
        let authority = ClusterAuthority::load(directory.path()).expect("load");
        let path = authority.issue_into(directory.path(), Rank(2), DEFAULT_VALIDITY).expect("issue");
        let identity = Identity::load(&path).expect("load");
        assert!(identity.trust.is_rank(&identity.certificate, Rank(2)));
        for key in [path.join(KEY), directory.path().join(AUTHORITY_KEY)] {
            assert!(!os::others_can_read(&key), "{}", key.display());
        }
    }

    #[test]
    fn pins_survive_the_disk() {
        let directory = tempfile::tempdir().expect("directory");
        let own = Identity::self_signed(Rank(1)).expect("identity");
        let print = own.fingerprint();
        own.pin(vec![(Rank(0), [7; 32]), (Rank(1), print)]).save(directory.path()).expect("save");
        let loaded = Identity::load(directory.path()).expect("load");
        let Trust::Pinned(pins) = loaded.trust() else { panic!("pins") };
        assert_eq!(*pins, [(Rank(0), [7; 32]), (Rank(1), print)]);
        fs::write(directory.path().join(PINS), "0 abc\n").expect("write");
        let error = Identity::load(directory.path()).expect_err("not a fingerprint").to_string();
        assert!(error.contains("line 1") && error.contains("pins.txt"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let error = Identity::load(Path::new("/nowhere")).expect_err("nothing there").to_string();
        assert!(error.contains("identity.key") && error.contains("exflow cert issue"), "{error}");
    }
}
