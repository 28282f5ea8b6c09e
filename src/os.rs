//! What differs from one operating system to another for the library; the command has a module of its own. `portable` is what
//! a system gets of which nothing better is known; it is compiled and tested everywhere.

#[cfg(not(unix))]
pub(crate) use portable::link;
#[cfg(unix)]
pub(crate) use unix::link;

#[cfg(unix)]
mod unix {
    use std::io;
    use std::path::Path;

    /// Makes `place` a link to `target`, which is relative to the folder of `place`; what was there goes.
    pub(crate) fn link(target: &Path, place: &Path) -> io::Result<()> {
        match std::fs::remove_file(place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => std::os::unix::fs::symlink(target, place),
        }
    }
}

#[cfg(any(test, not(unix)))]
mod portable {
    use std::io;
    use std::path::Path;

    /// Copies what `target`, which is relative to the folder of `place`, holds to `place`: links want rights elsewhere.
    pub(crate) fn link(target: &Path, place: &Path) -> io::Result<()> {
        let folder = place.parent().unwrap_or(Path::new(""));
        std::fs::copy(folder.join(target), place).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_link_has_the_content_of_its_target_and_replaces_what_was_there() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("blob"), "content").expect("writes");
        std::fs::create_dir(folder.path().join("snapshot")).expect("a folder");
        for (name, link) in [("link", link as fn(&Path, &Path) -> _), ("copy", portable::link)] {
            let place = folder.path().join("snapshot").join(name);
            for _ in 0..2 {
                link(Path::new("../blob"), &place).expect("a link");
                assert_eq!(std::fs::read_to_string(&place).expect("reads"), "content");
            }
        }
        assert!(link(Path::new("../blob"), &folder.path().join("nowhere/link")).is_err());
    }
}
