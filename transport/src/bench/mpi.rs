//! `MPI_Alltoallv` through a small C program that is compiled when it is asked for.

use super::WARM_UP;
use super::samples::Samples;
use crate::TransportError;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const SOURCE: &str = include_str!("alltoallv.c");

/// How the MPI program is compiled and started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MpiLaunch {
    /// Compiler.
    pub compiler: String,
    /// Launcher and its arguments, before `-n RANKS PROGRAM`.
    pub launcher: Vec<String>,
}

impl Default for MpiLaunch {
    /// Open MPI's own, over TCP as between hosts, not over shared memory; more ranks than cores are allowed.
    fn default() -> Self {
        let launcher = "mpirun --allow-run-as-root --oversubscribe --mca btl tcp,self --mca pml ob1";
        Self { compiler: "mpicc".into(), launcher: launcher.split(' ').map(String::from).collect() }
    }
}

/// The compiled program; removed when dropped.
pub(super) struct Program {
    folder: PathBuf,
    launcher: Vec<String>,
}

fn failed(what: String, remedy: &str) -> TransportError {
    TransportError::Options { what, remedy: remedy.into() }
}

impl Program {
    pub(super) fn compile(launch: &MpiLaunch) -> Result<Self, TransportError> {
        let folder = std::env::temp_dir().join(format!("exflow-mpi-{}", std::process::id()));
        let program = Self { folder, launcher: launch.launcher.clone() };
        let source = program.folder.join("alltoallv.c");
        std::fs::create_dir_all(&program.folder)
            .and_then(|()| std::fs::write(&source, SOURCE))
            .map_err(|error| failed(format!("{}: {error}", source.display()), "make it writable"))?;
        let mut compiler = Command::new(&launch.compiler);
        compiler.arg("-O2").arg("-o").arg(program.path()).arg(&source);
        run(&mut compiler, "install an MPI with its compiler (Debian: openmpi-bin libopenmpi-dev)")?;
        Ok(program)
    }

    fn path(&self) -> PathBuf {
        self.folder.join("alltoallv")
    }

    /// Runs the program once.
    pub(super) fn turn(
        &self,
        ranks: usize,
        bytes: usize,
        iterations: usize,
        samples: &mut Samples,
    ) -> Result<(), TransportError> {
        let Some((launcher, arguments)) = self.launcher.split_first() else {
            return Err(failed("the MPI launcher is empty".into(), "give one such as mpirun"));
        };
        let mut command = Command::new(launcher);
        command.args(arguments).arg("-n").arg(ranks.to_string()).arg(self.path());
        command.args([bytes, WARM_UP, iterations].map(|number| number.to_string()));
        let text = run(&mut command, "see whether `mpirun hostname` works")?;
        let mut numbers = text.lines().filter_map(|line| line.trim().parse::<u64>().ok());
        let (cpu, times) = (numbers.next(), numbers.map(Duration::from_nanos).collect::<Vec<_>>());
        let (Some(cpu), true) = (cpu, times.len() == iterations) else {
            return Err(failed(format!("the MPI program wrote {text:?}"), "see whether it runs alone"));
        };
        *samples.cpu.get_or_insert_default() += Duration::from_nanos(cpu);
        samples.exchanges += WARM_UP + iterations;
        samples.times.extend(times);
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn run(command: &mut Command, remedy: &str) -> Result<String, TransportError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| failed(format!("{name}: {error}"), remedy))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let first = words.lines().find(|line| line.chars().any(char::is_alphanumeric)).unwrap_or_default();
    Err(failed(format!("{name} failed ({}): {first}", output.status), remedy))
}
