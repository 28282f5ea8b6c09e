//! The command, run and refused.

#[cfg(target_os = "linux")]
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// What a refusal may take of memory.
pub(crate) const MOST_MEMORY: u64 = 1 << 30;

pub(crate) fn exflow(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exflow"));
    let child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    finish(child.expect("the command starts"))
}

/// The child's output; its peak of memory is within bounds, whatever it was given.
#[cfg(target_os = "linux")]
pub(crate) fn finish(mut child: Child) -> Output {
    use std::os::unix::process::ExitStatusExt;
    let read = |from: Option<Box<dyn Read + Send>>| {
        let mut from = from.expect("a pipe");
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).map(|_| bytes).expect("reads")
        })
    };
    let stdout = read(child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let stderr = read(child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>));
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both point to memory of this frame; the child is ours, and nobody else waits for it.
    let waited = unsafe { libc::wait4(child.id() as libc::pid_t, &raw mut status, 0, usage.as_mut_ptr()) };
    assert_eq!(waited, child.id() as libc::pid_t, "the child ends");
    // SAFETY: zeroed, which is a value of it, and filled in by the call above.
    let peak = 1024 * unsafe { usage.assume_init() }.ru_maxrss as u64;
    let (stdout, stderr) = (stdout.join().expect("stdout"), stderr.join().expect("stderr"));
    assert!(peak < MOST_MEMORY, "{peak} bytes of memory:\n{}", String::from_utf8_lossy(&stderr));
    Output { status: std::process::ExitStatus::from_raw(status), stdout, stderr }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn finish(child: Child) -> Output {
    child.wait_with_output().expect("the command ends")
}

pub(crate) fn generate(model: &Path, more: &[&str]) -> Output {
    let model = model.to_str().expect("a UTF-8 path");
    exflow(&[&["generate", "-m", model, "-n", "2", "--temp", "0"], more].concat())
}

/// Refused as bad input: code 2, nothing on stdout, at most four lines that hold each of `named`.
pub(crate) fn refused(what: &str, output: &Output, named: &[&str]) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{what}: exit code; stderr:\n{err}");
    assert!(!err.contains("panicked"), "{what}:\n{err}");
    assert!(out.is_empty(), "{what}: stdout is for results:\n{out}");
    let lines = err.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=4).contains(&lines), "{what}: {lines} lines on stderr:\n{err}");
    for word in named {
        assert!(err.contains(word), "{what}: stderr does not name {word:?}:\n{err}");
    }
    let remedies = [
        "add ",
        "build ",
        "check ",
        "choose ",
        "convert ",
        "copy ",
        "create ",
        "delete ",
        "download ",
        "expected ",
        "export ",
        "fetch ",
        "fix ",
        "give ",
        "install ",
        "keep ",
        "lower ",
        "make ",
        "must ",
        "needs ",
        "pass ",
        "profile ",
        "put ",
        "re-export ",
        "remove ",
        "rename ",
        "repair ",
        "replace ",
        "run ",
        "runs: ",
        "save ",
        "set ",
        "shorten ",
        "solve ",
        "split ",
        "supported",
        "try ",
        "use ",
        "write ",
    ];
    let lower = err.to_lowercase();
    assert!(remedies.iter().any(|word| lower.contains(word)), "{what}: stderr says no remedy:\n{err}");
}
