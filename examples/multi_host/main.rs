//! Four hosts with their own addresses, one command: `cargo run --release --example multi_host` (Linux, root).
//!
//! Makes four network namespaces on a bridge, issues an identity to each, starts a process in each, and lets rank 0
//! generate. Then one of the hosts is switched off amid a second run. Both runs must say what one rank says alone.

mod network;

use exflow::engine::{
    Cluster, ClusterOptions, GroupOptions, NoProgress, Observer, Rank, Request, TransportKind,
    prepare_process, work,
};
use exflow::transport::identity::{ClusterAuthority, DEFAULT_VALIDITY};
use network::{Network, address};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const HOSTS: u16 = 4;
/// Where a process is told which host it is, where identities are, and rank 0 whom it may switch off.
const HOST: &str = "EXFLOW_EXAMPLE_HOST";
const IDENTITIES: &str = "EXFLOW_EXAMPLE_IDENTITIES";
const VICTIM: &str = "EXFLOW_EXAMPLE_VICTIM";

fn main() -> Outcome {
    prepare_process(1);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/gpt-moe-16e");
    match std::env::var(HOST) {
        Ok(host) => host_process(host.parse()?, &model),
        Err(_) => all_hosts(),
    }
}

/// One host: rank 0 generates, the others work for it.
fn host_process(host: usize, model: &Path) -> Outcome {
    let identities = PathBuf::from(std::env::var(IDENTITIES)?);
    let mut group = GroupOptions::new(host, HOSTS.into(), format!("{}:7447", address(0)), identities);
    group.observer = Observer::new(move |what| eprintln!("host {host}: {what}"));
    let mut options = ClusterOptions::new(model);
    options.transport = TransportKind::Quic;
    options.group = Some(group);
    if host > 0 {
        return Ok(work(options, &NoProgress)?);
    }
    let mut alone = Cluster::start(ClusterOptions { group: None, ..options.clone() }, &NoProgress)?;
    let requests = requests(&alone)?;
    let expected = run(&mut alone, &requests, &mut |_| Ok(()))?;
    drop(alone);
    let mut cluster = Cluster::start(options, &NoProgress)?;
    let all = run(&mut cluster, &requests, &mut |_| Ok(()))?;
    check("four hosts", &expected, &all)?;
    let victim = std::env::var(VICTIM)?;
    let rest = run(&mut cluster, &requests, &mut |tokens| match tokens {
        30 => Command::new("sh").args(["-c", &format!("kill -KILL {victim}")]).status().map(|_| ()),
        _ => Ok(()),
    })?;
    check("three of them", &expected, &rest)?;
    eprintln!("epoch {}, absent ranks {:?}", cluster.epoch(), cluster.absent());
    match cluster.absent().is_empty() {
        true => Err("the last host was not missed".into()),
        false => Ok(()),
    }
}

fn requests(cluster: &Cluster) -> Outcome<Vec<Request>> {
    let prompts = ["In the beginning", "The king said", "There was a man"];
    let request = |text: &&str| {
        let prompt_ids = cluster.text()?.encode(text)?;
        Ok::<_, Box<dyn Error>>(Request {
            prompt_ids,
            max_tokens: 40,
            ignore_eos: true,
            ..Request::default()
        })
    };
    prompts.iter().map(request).collect()
}

type Hook<'a> = &'a mut dyn FnMut(usize) -> std::io::Result<()>;

fn run(cluster: &mut Cluster, requests: &[Request], hook: Hook<'_>) -> Outcome<Vec<String>> {
    let (mut tokens, mut failed) = (0, None);
    let generation = cluster.generate(requests, &mut |_| {
        tokens += 1;
        failed = hook(tokens).err().or(failed.take());
    })?;
    failed.map_or(Ok(()), Err)?;
    Ok(generation.sequences.into_iter().map(|done| done.text).collect())
}

fn check(who: &str, expected: &[String], said: &[String]) -> Outcome {
    if expected != said {
        return Err(format!("{who} say {said:?}, one rank says {expected:?}").into());
    }
    eprintln!("{who} say what one rank says");
    Ok(())
}

fn all_hosts() -> Outcome {
    let identities = std::env::temp_dir().join(format!("exflow-hosts-{}", std::process::id()));
    let authority = ClusterAuthority::init(&identities)?;
    for host in 0..HOSTS {
        authority.issue_into(&identities, Rank(host), DEFAULT_VALIDITY)?;
    }
    let network = Network::new()?;
    let mut others = (1..HOSTS).map(|h| network.spawn(h, &identities, None)).collect::<Outcome<Vec<_>>>()?;
    let leader = network.spawn(0, &identities, others.last())?.wait()?;
    for other in &mut others {
        // One of them was switched off; the others end with rank 0.
        other.wait()?;
    }
    drop(network);
    std::fs::remove_dir_all(&identities)?;
    match leader.success() {
        true => Ok(()),
        false => Err("rank 0 failed".into()),
    }
}
