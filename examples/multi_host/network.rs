//! Four network namespaces on a bridge, and processes in them. Needs Linux, root and iproute2.

use super::{HOST, HOSTS, IDENTITIES, Outcome, VICTIM};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) fn address(host: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, host as u8 + 1)
}

/// Namespaces and their bridge, removed with the value.
pub(crate) struct Network(String);

impl Network {
    pub(crate) fn new() -> Outcome<Self> {
        let network = Self(format!("xf{}", std::process::id()));
        let bridge = network.namespace("b");
        ip(&["netns", "add", &bridge])?;
        ip(&["-n", &bridge, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &bridge, "link", "set", "br0", "up"])?;
        for host in 0..HOSTS {
            let (name, port) = (network.namespace(&host.to_string()), format!("port{host}"));
            ip(&["netns", "add", &name])?;
            ip(&[
                "-n", &name, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &bridge,
            ])?;
            ip(&["-n", &bridge, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("{}/24", address(host)), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    fn namespace(&self, of: &str) -> String {
        format!("{}-{of}", self.0)
    }

    pub(crate) fn spawn(&self, host: u16, identities: &Path, victim: Option<&Child>) -> Outcome<Child> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(&host.to_string())]).arg(std::env::current_exe()?);
        command.env(HOST, host.to_string()).env(IDENTITIES, identities).stdin(Stdio::null());
        if let Some(victim) = victim {
            command.env(VICTIM, victim.id().to_string());
        }
        Ok(command.spawn()?)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for of in ["b", "0", "1", "2", "3"] {
            let _ = Command::new("ip")
                .args(["netns", "delete", &self.namespace(of)])
                .stderr(Stdio::null())
                .status();
        }
    }
}

fn ip(args: &[&str]) -> Outcome {
    match Command::new("ip").args(args).status()?.success() {
        true => Ok(()),
        false => {
            Err(format!("ip {}: run as root, on a kernel that allows network namespaces", args.join(" "))
                .into())
        }
    }
}
