//! The configuration file: TOML whose keys are the flags' names. What is typed comes first, then the verb's own
//! table, then what stands above all tables.

use super::failure::Failure;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The command line, with the flags that the file of `--config FILE` adds to it.
pub(crate) fn applied(args: Vec<OsString>, command: &Command) -> Result<Vec<OsString>, Failure> {
    let Some(path) = named(&args) else { return Ok(args) };
    let table = read(&path)?;
    // As far as it can be understood without what the file adds.
    let typed = command.clone().ignore_errors(true).try_get_matches_from(&args);
    let Ok(typed) = typed else { return Ok(args) };
    let mut verbs = Vec::new();
    let (mut matches, mut leaf) = (&typed, command);
    while let Some((name, inner)) = matches.subcommand() {
        let Some(sub) = leaf.find_subcommand(name) else { break };
        verbs.push(name.to_owned());
        (matches, leaf) = (inner, sub);
    }
    if verbs.is_empty() {
        return Ok(args); // clap says what is missing
    }
    let added = additions(&path, &table, command, leaf, matches, &verbs)?;
    let mut all = args;
    let after = position_after(&all, &verbs);
    all.splice(after..after, added);
    Ok(all)
}

/// The file that `--config` names, if any.
fn named(args: &[OsString]) -> Option<PathBuf> {
    let mut rest = args.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = rest.next() {
        if arg == "--config" {
            return rest.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    None
}

fn read(path: &Path) -> Result<Table, Failure> {
    let wrong = |what: String| Failure::Input(format!("{}: {what}", path.display()));
    let text =
        std::fs::read_to_string(path).map_err(|e| wrong(format!("{e}; give a file that can be read")))?;
    text.parse::<Table>().map_err(|e| {
        let line = e.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        wrong(format!("line {line}: {}; write key = value", e.message()))
    })
}

/// The flags that the file adds for the verb that was typed.
fn additions(
    path: &Path,
    table: &Table,
    command: &Command,
    leaf: &Command,
    typed: &ArgMatches,
    verbs: &[String],
) -> Result<Vec<OsString>, Failure> {
    let wrong = |key: &str, what: &str| Failure::Input(format!("{}: key {key}: {what}", path.display()));
    let mut chosen: Vec<(&str, &Value, &Arg)> = Vec::new();
    let mut own = table;
    for (key, value) in table {
        match value {
            Value::Table(inner) if command.find_subcommand(key).is_some() => {
                if *key == verbs[0] {
                    own = inner;
                }
            }
            Value::Table(_) => return Err(wrong(key, "is no verb; tables are named as in [serve]")),
            _ => match flag(leaf, key) {
                Some(arg) => chosen.push((key, value, arg)),
                None if anywhere(command, key) => {}
                None => return Err(wrong(key, "is no flag of any verb; see `exflow VERB --help`")),
            },
        }
    }
    if !std::ptr::eq(own, table) {
        for (key, value) in own {
            let arg = flag(leaf, key).ok_or_else(|| {
                wrong(&format!("{}.{key}", verbs[0]), "is no flag of this verb; see its --help")
            })?;
            chosen.retain(|(other, ..)| *other != key.as_str());
            chosen.push((key, value, arg));
        }
    }
    let is_typed = |arg: &Arg| typed.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let mut added = Vec::new();
    for (key, value, arg) in chosen {
        let displaced = leaf.get_arg_conflicts_with(arg).into_iter().any(is_typed);
        if !is_typed(arg) && !displaced {
            add(&mut added, key, value)
                .ok_or_else(|| wrong(key, "a date or a table is no value of a flag"))?;
        }
    }
    Ok(added)
}

fn flag<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(key) && key != "config")
}

fn anywhere(command: &Command, key: &str) -> bool {
    flag(command, key).is_some() || command.get_subcommands().any(|sub| anywhere(sub, key))
}

/// `--key=value`, once for each value; `--key` where it is true.
fn add(args: &mut Vec<OsString>, key: &str, value: &Value) -> Option<()> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(true) => {
            args.push(format!("--{key}").into());
            return Some(());
        }
        Value::Boolean(false) => return Some(()),
        Value::Array(values) => return values.iter().try_for_each(|value| add(args, key, value)),
        Value::Datetime(_) | Value::Table(_) => return None,
    };
    args.push(format!("--{key}={text}").into());
    Some(())
}

/// Where in the line the last verb ends. Flags before it may have taken its name as a value, so the last one counts.
fn position_after(args: &[OsString], verbs: &[String]) -> usize {
    let mut at = 1;
    for verb in verbs {
        at += args[at..].iter().position(|arg| arg == verb.as_str()).map_or(0, |found| found + 1);
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ArgAction;

    fn command() -> Command {
        let flags = [
            Arg::new("model").long("model").short('m').required(true),
            Arg::new("port").long("port"),
            Arg::new("stop").long("stop").num_args(1..),
            Arg::new("eos").long("ignore-eos").action(ArgAction::SetTrue),
        ];
        let serve = Command::new("serve").args(flags);
        let generate =
            Command::new("generate").arg(Arg::new("model").long("model")).arg(Arg::new("n").long("count"));
        Command::new("exflow")
            .subcommand(serve)
            .subcommand(generate)
            .arg(Arg::new("config").long("config").global(true))
    }

    fn with(file: &str, args: &[&str]) -> Result<Vec<String>, Failure> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("exflow.toml");
        std::fs::write(&path, file).expect("writes");
        let before = ["exflow", "--config", path.to_str().expect("UTF-8")];
        let line = before.iter().chain(args).map(OsString::from).collect();
        let all = applied(line, &command())?;
        Ok(all.into_iter().skip(3).map(|arg| arg.into_string().expect("UTF-8")).collect())
    }

    #[test]
    fn what_is_typed_comes_before_the_verb_s_table_and_that_before_the_rest() {
        let file = "model = 'a'\nport = 1\ncount = 3\n[serve]\nport = 2\nstop = ['x', 'y']\nignore-eos = true\n[generate]\ncount = 5";
        let expected = ["serve", "--model=a", "--port=2", "--stop=x", "--stop=y", "--ignore-eos"];
        let mut got = with(file, &["serve"]).expect("flags");
        assert_eq!(got.remove(0), "serve");
        got.sort();
        let mut rest = expected[1..].to_vec();
        rest.sort_unstable();
        assert_eq!(got, rest);
        let got =
            with(file, &["serve", "--port", "9", "-m", "b", "--stop", "z", "--ignore-eos"]).expect("flags");
        assert_eq!(got, ["serve", "--port", "9", "-m", "b", "--stop", "z", "--ignore-eos"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (file, named) in [
            ("modle = 'a'", "modle"),
            ("[serve]\ncount = 1", "serve.count"),
            ("[fly]\nhigh = true", "fly"),
            ("port = 1979-05-27", "port"),
            ("port = ", "line 1"),
        ] {
            match with(file, &["serve"]) {
                Err(Failure::Input(text)) => {
                    assert!(text.contains(named) && text.contains(".toml"), "{text}")
                }
                other => panic!("{file}: {other:?}"),
            }
        }
    }
}
