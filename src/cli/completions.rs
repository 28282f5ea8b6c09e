//! `exflow completions` and `exflow man`: what shells and `man` want to know of the command.

use super::failure::Failure;
use super::output;
use clap::{CommandFactory, Parser};
use std::path::PathBuf;

/// Writes a shell's completions of this command to stdout
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  exflow completions bash > ~/.local/share/bash-completion/completions/exflow"
)]
pub(crate) struct Args {
    /// Which shell
    shell: clap_complete::Shell,
}

pub(crate) fn run<C: Parser>(args: &Args) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "exflow", &mut text);
    output::text(&String::from_utf8_lossy(&text))
}

/// Writes the manual: the command's page to stdout, or one page a verb into a folder
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  exflow man --out ~/.local/share/man/man1 && man exflow-generate")]
pub(crate) struct ManArgs {
    /// Folder for exflow.1, exflow-generate.1 and so on
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn man<C: CommandFactory>(args: &ManArgs) -> Result<(), Failure> {
    let command = C::command();
    let Some(folder) = &args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return output::text(&String::from_utf8_lossy(&page));
    };
    let failed = |e: std::io::Error| {
        let what = format!("{}: cannot be written: {e}; choose a folder that is writable", folder.display());
        Failure::Run(what)
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(command, folder).map_err(failed)
}
