//! What differs from one operating system to another: files that only their owner may read, processor time. `portable` is what a system gets
//! of which nothing better is known; it is compiled and tested everywhere.

#[cfg(not(unix))]
pub use portable::cpu_time;
#[cfg(not(unix))]
pub(crate) use portable::{others_can_read, owner_only};
#[cfg(unix)]
pub use unix::cpu_time;
#[cfg(unix)]
pub(crate) use unix::{others_can_read, owner_only};

#[cfg(unix)]
mod unix {
    use std::fs::{OpenOptions, metadata};
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    use std::path::Path;
    use std::time::Duration;

    /// What all threads of this process took of the processors so far; `None` where the system is not asked.
    pub fn cpu_time() -> Option<Duration> {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?))
    }

    /// A file made with these options is its owner's only, from its first moment.
    pub(crate) fn owner_only(options: &mut OpenOptions) {
        options.mode(0o600);
    }

    /// Whether anybody but its owner may read, write or run a file.
    pub(crate) fn others_can_read(path: &Path) -> bool {
        metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0)
    }
}

#[cfg(any(test, not(unix)))]
mod portable {
    use std::fs::OpenOptions;
    use std::path::Path;

    /// Rights come from the folder.
    pub(crate) fn owner_only(_options: &mut OpenOptions) {}

    /// Nothing is known.
    pub(crate) fn others_can_read(_path: &Path) -> bool {
        false
    }

    /// What all threads of this process took of the processors so far: not told.
    #[cfg_attr(unix, expect(unreachable_pub, reason = "offered where nothing better is known"))]
    pub fn cpu_time() -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn files_are_made_either_way_and_private_where_the_system_can() {
        let folder = tempfile::tempdir().expect("a folder");
        let make = |name: &str, restrict: fn(&mut OpenOptions)| {
            let mut options = OpenOptions::new();
            restrict(options.write(true).create_new(true));
            options.open(folder.path().join(name)).expect("a file");
            folder.path().join(name)
        };
        assert!(!others_can_read(&make("private", owner_only)));
        assert!(!portable::others_can_read(&make("plain", portable::owner_only)));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let open = make("open", portable::owner_only);
            std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).expect("rights");
            assert!(others_can_read(&open));
        }
    }

    #[test]
    fn processor_time_grows_with_work() {
        assert_eq!(portable::cpu_time(), None);
        #[cfg(unix)]
        {
            let before = cpu_time().expect("a clock");
            while cpu_time().expect("a clock") == before {
                std::hint::spin_loop();
            }
            assert!(cpu_time().expect("a clock") > before);
        }
    }
}
