//! `keelway-agent cleanup --kube-proxy`: what a former kube-proxy left in this network namespace goes, and nothing else.
//!
//! By netlink, so that no tool has to be there; only the tables of iptables' old back end need its own. Which chains and sets
//! are a kube-proxy's: kubernetes/kubernetes, pkg/proxy/{iptables,ipvs,nftables}. Other programs' chains begin with `KUBE-` too
//! (the kubelet's, kube-router's).

pub mod ipvs;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::netfilter::nft::{self, Chain, Jump};
use crate::netfilter::{IPV4, IPV6, Refused, conntrack};

const NFTABLES_TABLE: &str = "kube-proxy";
const IPTABLES_TABLES: [&str; 4] = ["nat", "filter", "mangle", "raw"];
const CHAINS: [&str; 13] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];
const CHAINS_OF_SERVICES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-XLB-"];
/// The kubelet makes it, and a kube-proxy a copy of it.
const SHARED_CHAIN: &str = "KUBE-FIREWALL";
/// A kubelet looks after its chains.
const KUBELET_CHAIN: &str = "KUBE-KUBELET-CANARY";
/// Where a kube-proxy serves its metrics and its mode, on loopback.
const METRICS_PORT: u16 = 10249;

/// Removes it and says what that was. What fails keeps nothing else from going, but what it stands on; it can be tried again.
///
/// # Errors
/// That a kube-proxy runs, or that something could not be removed, which is named with its reason.
pub async fn remove(force: bool) -> anyhow::Result<()> {
    if let Some(running) = running(Path::new("/proc")).or_else(answering)
        && !force
    {
        bail!("{running}; it would write its rules again: stop it first, or say --force");
    }
    // Its connections live on: the kernel's tracking goes on translating them, and IPVS those that it has.
    let live = absent_is_none(conntrack::translated())?;
    let through_ipvs = if force { Vec::new() } else { live.iter().filter(|flow| flow.by_ipvs).copied().collect() };
    let live = live.iter().filter(|flow| !flow.by_ipvs).count() + through_ipvs.len();
    if live > 0 {
        nft::hold_translation()?;
    }
    let mut report = Report::default();
    for step in [nftables, iptables, old_iptables] {
        let done = step(&mut report);
        report.succeeded(done);
    }
    // Rules use sets, so these are the last.
    let done = ipvs::remove(&mut report, &through_ipvs).await;
    report.succeeded(done);
    for line in &report.removed {
        println!("removed {line}");
    }
    for line in &report.left {
        eprintln!("left {line}");
    }
    if report.removed.is_empty() && report.left.is_empty() && report.failures.is_empty() {
        println!("nothing of a kube-proxy is left");
    }
    if live > 0 {
        println!(
            "{live} connections go on by the kernel's own tracking, which the table {} keeps going",
            nft::HOLDING_TABLE
        );
    }
    for failure in &report.failures {
        eprintln!("could not remove {failure:#}");
    }
    if !report.failures.is_empty() {
        bail!("not all of a kube-proxy is gone; run this again when those reasons are");
    }
    Ok(())
}

#[derive(Default)]
struct Report {
    removed: Vec<String>,
    /// What has to wait.
    left: Vec<String>,
    failures: Vec<anyhow::Error>,
}

impl Report {
    /// Keeps what went wrong; whether nothing did.
    fn succeeded(&mut self, done: anyhow::Result<()>) -> bool {
        let good = done.is_ok();
        self.failures.extend(done.err());
        good
    }
}

fn absent_is_none<T>(found: Result<Vec<T>, Refused>) -> Result<Vec<T>, Refused> {
    match found {
        Err(refused) if refused.is_absent() => Ok(Vec::new()),
        found => found,
    }
}

/// A process of that name, if the node's processes are seen from here.
fn running(proc: &Path) -> Option<String> {
    let named = |pid: &str| {
        let first = std::fs::read(proc.join(pid).join("cmdline")).ok()?;
        let program = String::from_utf8_lossy(first.split(|byte| *byte == 0).next()?).into_owned();
        (Path::new(&program).file_name()? == "kube-proxy").then(|| format!("{program} runs (process {pid})"))
    };
    let entries = std::fs::read_dir(proc).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    entries.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).find_map(|pid| named(&pid))
}

/// One that answers where only a kube-proxy does; in a container its process may not be seen.
fn answering() -> Option<String> {
    let patience = Duration::from_secs(1);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS_PORT));
    let mut stream = TcpStream::connect_timeout(&address, patience).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    stream.write_all(b"GET /proxyMode HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer).ok()?;
    let mode = answer.rsplit("\r\n").next()?.trim();
    ["iptables", "nftables", "ipvs"].contains(&mode).then(|| format!("a kube-proxy ({mode}) answers at {address}"))
}

fn family_name(family: u8) -> &'static str {
    if family == IPV6 { "IPv6" } else { "IPv4" }
}

fn nftables(report: &mut Report) -> anyhow::Result<()> {
    for table in absent_is_none(nft::tables()).context("tables of nftables")? {
        if table.name == NFTABLES_TABLE && [IPV4, IPV6].contains(&table.family) {
            let what = format!("the nftables table {} ({})", table.name, family_name(table.family));
            if report.succeeded(nft::delete_table(&table).with_context(|| what.clone())) {
                report.removed.push(what);
            }
        }
    }
    Ok(())
}

fn is_its_chain(name: &str, kubelet: bool) -> bool {
    CHAINS.contains(&name)
        || CHAINS_OF_SERVICES.iter().any(|prefix| name.starts_with(prefix))
        || (name == SHARED_CHAIN && !kubelet)
}

/// Rules of iptables' usual back end, which keeps them in nftables.
fn iptables(report: &mut Report) -> anyhow::Result<()> {
    let list = || Ok::<_, Refused>((absent_is_none(nft::chains())?, absent_is_none(nft::jumps())?));
    let (chains, jumps) = list().context("chains of iptables")?;
    let plan = plan(&chains, &jumps);
    for (table, family) in IPTABLES_TABLES.iter().flat_map(|table| [(table, IPV4), (table, IPV6)]) {
        let here = |of: &nft::Table| of.name == **table && of.family == family;
        let jumps: Vec<&Jump> = plan.jumps.iter().copied().filter(|jump| here(&jump.table)).collect();
        let chains: Vec<&Chain> = plan.chains.iter().copied().filter(|chain| here(&chain.table)).collect();
        if jumps.len() + chains.len() == 0 {
            continue;
        }
        let (of_jumps, of_chains, family) = (jumps.len(), chains.len(), family_name(family));
        let what = format!("{of_chains} chains and {of_jumps} jumps to them from iptables' table {table} ({family})");
        let done = nft::delete_jumps(&jumps).and_then(|()| nft::delete_chains(&chains));
        if report.succeeded(done.with_context(|| what.clone())) {
            report.removed.push(what);
        }
    }
    for kept in &plan.kept {
        eprintln!("left {} in iptables' table {}: another's rule leads there", kept.name, kept.table.name);
    }
    Ok(())
}

struct Plan<'a> {
    jumps: Vec<&'a Jump>,
    chains: Vec<&'a Chain>,
    kept: Vec<&'a Chain>,
}

/// What goes: its chains, but for those that others' chains lead to, and the built-in chains' jumps to them.
fn plan<'a>(chains: &'a [Chain], jumps: &'a [Jump]) -> Plan<'a> {
    let is_iptables =
        |table: &nft::Table| IPTABLES_TABLES.contains(&table.name.as_str()) && [IPV4, IPV6].contains(&table.family);
    let kubelet = chains.iter().any(|chain| chain.name == KUBELET_CHAIN && is_iptables(&chain.table));
    let its = |name: &str| is_its_chain(name, kubelet);
    let is_base =
        |jump: &Jump| chains.iter().any(|chain| chain.is_base && chain.table == jump.table && chain.name == jump.chain);
    let to_it: Vec<&Jump> = jumps.iter().filter(|jump| is_iptables(&jump.table) && its(&jump.target)).collect();
    let outer = |jump: &&&Jump| !its(&jump.chain);
    let mut held: BTreeSet<(&nft::Table, &str)> = to_it
        .iter()
        .filter(outer)
        .filter(|jump| !is_base(jump))
        .map(|jump| (&jump.table, jump.target.as_str()))
        .collect();
    loop {
        let more: Vec<_> = to_it
            .iter()
            .filter(|jump| held.contains(&(&jump.table, jump.chain.as_str())))
            .map(|jump| (&jump.table, jump.target.as_str()))
            .filter(|target| !held.contains(target))
            .collect();
        if more.is_empty() {
            break;
        }
        held.extend(more);
    }
    let own = chains.iter().filter(|chain| is_iptables(&chain.table) && its(&chain.name));
    let (kept, gone) = own.partition(|chain| held.contains(&(&chain.table, chain.name.as_str())));
    Plan { jumps: to_it.iter().filter(outer).filter(|jump| is_base(jump)).copied().collect(), chains: gone, kept }
}

/// Rules of iptables' old back end. Only its own tools know those tables.
fn old_iptables(report: &mut Report) -> anyhow::Result<()> {
    for (names, tool, family) in
        [("ip_tables_names", "iptables-legacy", IPV4), ("ip6_tables_names", "ip6tables-legacy", IPV6)]
    {
        let tables = std::fs::read_to_string(Path::new("/proc/net").join(names)).unwrap_or_default();
        for table in tables.lines().filter(|table| IPTABLES_TABLES.contains(table)) {
            let saved = match Command::new(format!("{tool}-save")).args(["-t", table]).output() {
                Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
                Ok(output) => bail!("{tool}-save: {}", String::from_utf8_lossy(&output.stderr).trim()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    eprintln!("not looked at: the table {table} of iptables' old back end; {tool} is not installed");
                    continue;
                }
                Err(error) => return Err(error).with_context(|| format!("{tool}-save")),
            };
            let Some((script, chains, jumps)) = old_script(table, &saved) else { continue };
            let family = family_name(family);
            let what = format!("{chains} chains and {jumps} jumps to them from iptables-legacy's {table} ({family})");
            if report.succeeded(restore(tool, &script).with_context(|| what.clone())) {
                report.removed.push(what);
            }
        }
    }
    Ok(())
}

/// What removes it from a table as saved; how many chains and jumps those are.
fn old_script(table: &str, saved: &str) -> Option<(String, usize, usize)> {
    let chain = |line: &str| Some(line.strip_prefix(':')?.split(' ').next()?.to_owned());
    let all: Vec<String> = saved.lines().filter_map(chain).collect();
    let kubelet = all.iter().any(|name| name == KUBELET_CHAIN);
    let its: Vec<&String> = all.iter().filter(|name| is_its_chain(name, kubelet)).collect();
    if its.is_empty() {
        return None;
    }
    let leads_there = |line: &&str| {
        let words: Vec<&str> = line.split(' ').collect();
        let outer = words.first() == Some(&"-A") && words.get(1).is_some_and(|from| !is_its_chain(from, kubelet));
        outer && words.windows(2).any(|pair| ["-j", "-g"].contains(&pair[0]) && is_its_chain(pair[1], kubelet))
    };
    let jumps: Vec<String> = saved.lines().filter(leads_there).map(|line| line.replacen("-A", "-D", 1)).collect();
    let flushed: String = its.iter().map(|name| format!(":{name} - [0:0]\n")).collect();
    let gone: String = its.iter().map(|name| format!("-X {name}\n")).collect();
    let script = format!("*{table}\n{flushed}{}\n{gone}COMMIT\n", jumps.join("\n"));
    Some((script, its.len(), jumps.len()))
}

fn restore(tool: &str, script: &str) -> anyhow::Result<()> {
    let tool = format!("{tool}-restore");
    let mut command = Command::new(&tool);
    command.args(["-w", "5", "--noflush"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| tool.clone())?;
    child.stdin.take().context("stdin")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{tool}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> nft::Table {
        nft::Table { family: IPV4, name: "nat".into() }
    }

    fn chain(name: &str) -> Chain {
        Chain { table: table(), name: name.into(), is_base: name == "PREROUTING" }
    }

    fn jump(chain: &str, target: &str) -> Jump {
        Jump { table: table(), chain: chain.into(), handle: 1, target: target.into() }
    }

    #[test]
    fn others_chains_stay_and_so_does_what_they_lead_to() {
        let names =
            ["PREROUTING", "KUBE-SERVICES", "KUBE-SVC-A", "KUBE-SEP-B", "KUBE-MARK-MASQ", "CNI-X", "KUBE-ROUTER-INPUT"];
        let mut chains: Vec<Chain> = names.map(chain).into();
        let jumps = [
            jump("PREROUTING", "KUBE-SERVICES"),
            jump("PREROUTING", "CNI-X"),
            jump("KUBE-SERVICES", "KUBE-SVC-A"),
            jump("KUBE-SVC-A", "KUBE-SEP-B"),
            jump("KUBE-SEP-B", "KUBE-MARK-MASQ"),
            jump("CNI-X", "KUBE-SEP-B"),
        ];
        let found = plan(&chains, &jumps);
        let of = |chains: &[&Chain]| chains.iter().map(|chain| chain.name.clone()).collect::<Vec<_>>();
        assert_eq!(of(&found.chains), ["KUBE-SERVICES", "KUBE-SVC-A"]);
        assert_eq!(of(&found.kept), ["KUBE-SEP-B", "KUBE-MARK-MASQ"]);
        assert_eq!(found.jumps, [&jumps[0]]);
        chains.push(Chain { table: nft::Table { family: IPV4, name: "mine".into() }, ..chain("KUBE-SERVICES") });
        assert_eq!(plan(&chains, &jumps[..5]).chains.len(), 4, "another's table of nftables is not iptables'");
    }

    #[test]
    fn the_kubelets_chain_stays_while_a_kubelet_looks_after_it() {
        let chains = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY"].map(chain);
        assert_eq!(plan(&chains, &[]).chains.len(), 0);
        assert_eq!(plan(&chains[..1], &[]).chains.len(), 1);
    }

    #[test]
    fn a_saved_table_becomes_a_script_of_its_chains_alone() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:MINE - [0:0]\n:KUBE-SVC-A - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                     -A PREROUTING -j MINE\n-A KUBE-SERVICES -j KUBE-SVC-A\nCOMMIT\n";
        let (script, chains, jumps) = old_script("nat", saved).unwrap();
        assert_eq!((chains, jumps), (2, 1));
        assert_eq!(
            script,
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -X KUBE-SERVICES\n-X KUBE-SVC-A\nCOMMIT\n"
        );
        assert_eq!(old_script("nat", "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
    }
}
