//! `keelway status` for people.

use keelway_api::v1::{MapFill, NodeStatusResponse};

use crate::table;
use crate::volumes::Volumes;

/// Whether the node does all that it should.
pub fn is_well(status: &NodeStatusResponse, volumes: &Volumes) -> bool {
    volume_problem(volumes).is_none()
        && status.synced
        && status.problems.is_empty()
        && status.hooks.iter().all(|hook| hook.attached)
}

/// What is wrong with the CSI driver, in words.
pub fn volume_problem(volumes: &Volumes) -> Option<String> {
    match volumes {
        Volumes::Unwell(reason) => Some(format!("volumes: {reason}")),
        Volumes::NoDriver | Volumes::Listed(_) => None,
    }
}

/// The answer as a page.
pub fn table(status: &NodeStatusResponse, volumes: &Volumes) -> String {
    let counts = status.counts.unwrap_or_default();
    let mut page = table::pairs(&[
        ("Node", status.node.clone()),
        (
            "Agent",
            format!("{} (layout {}), up {}", status.version, status.layout_version, uptime(status.uptime_seconds)),
        ),
        ("Source", status.source.clone()),
        ("Synced", yes(status.synced).to_owned()),
        ("Pod CIDRs", or_none(&status.pod_cidrs.join(", "))),
        ("Routing", format!("{}, MTU {}", status.routing, status.mtu)),
        ("Load balancing", or_none(&status.load_balancer_mode)),
        ("XDP", by_xdp(status)),
        ("Generation", status.generation.to_string()),
        ("Services", format!("{} ({} frontends, {} backends)", counts.services, counts.frontends, counts.backends)),
        ("Policies", format!("{} ({} rules, {} identities)", counts.policies, counts.policy_rules, counts.identities)),
        ("Pods here", counts.endpoints.to_string()),
        ("Nodes", counts.nodes.to_string()),
        ("Volumes", volume_summary(volumes)),
    ]);
    let kinds =
        status.kinds.iter().map(|kind| vec![kind.kind.clone(), kind.objects.to_string(), yes(kind.synced).into()]);
    page += &section("Source", &["KIND", "OBJECTS", "SYNCED"], kinds.collect());
    let hooks = status.hooks.iter().map(|hook| {
        let attached = yes(hook.attached).to_owned();
        let ids = [hook.program_id, hook.link_id].map(|id| if id == 0 { "-".to_owned() } else { id.to_string() });
        let [program, link] = ids;
        vec![hook.hook.clone(), hook.device.clone(), hook.mechanism.clone(), program, link, attached]
    });
    page += &section("Programs", &["HOOK", "AT", "BY", "PROGRAM", "LINK", "ATTACHED"], hooks.collect());
    let maps = status.maps.iter().map(|map| {
        let kind = if map.lru { "evicts the oldest" } else { "refuses more" };
        vec![map.name.clone(), map.entries.to_string(), map.capacity.to_string(), fill(map), kind.to_owned()]
    });
    page += &section("Tables", &["TABLE", "ENTRIES", "CAPACITY", "FULL", "WHEN FULL"], maps.collect());
    let drops = status
        .drops
        .iter()
        .map(|drop| vec![drop.reason.clone(), drop.hook.clone(), drop.packets.to_string(), drop.bytes.to_string()]);
    page += &section("Drops", &["REASON", "HOOK", "PACKETS", "BYTES"], drops.collect());
    if let Volumes::Listed(listed) = volumes {
        let rows = listed.iter().map(|volume| vec![volume.id.clone(), volume.capacity.to_string()]);
        page += &section("Volumes", &["ID", "BYTES"], rows.collect());
    }
    page += "\nProblems\n";
    let problems: Vec<String> = status.problems.iter().cloned().chain(volume_problem(volumes)).collect();
    if problems.is_empty() {
        page += "  none\n";
    }
    for problem in &problems {
        page += &format!("  {}\n", problem.replace('\n', "\n    "));
    }
    page
}

fn section(title: &str, heading: &[&str], rows: Vec<Vec<String>>) -> String {
    match rows.is_empty() {
        true => format!("\n{title}\n  none\n"),
        false => format!("\n{title}\n{}", table::render(heading, &rows)),
    }
}

fn by_xdp(status: &NodeStatusResponse) -> String {
    match (status.xdp.as_str(), status.xdp_packets) {
        (mode, 0) => or_none(mode),
        // They count for as long as the node is up, whatever the setting is now.
        (mode, packets) => format!("{mode} ({packets} packets turned round)"),
    }
}

fn volume_summary(volumes: &Volumes) -> String {
    match volumes {
        Volumes::NoDriver => "no driver on this node".to_owned(),
        Volumes::Listed(listed) => {
            let bytes: i64 = listed.iter().map(|volume| volume.capacity).sum();
            format!("{} ({} MiB)", listed.len(), bytes >> 20)
        }
        Volumes::Unwell(_) => "the driver does not answer".to_owned(),
    }
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "NO" }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "none".to_owned() } else { text.to_owned() }
}

/// In percent, rounded up, so that one entry of many is not nothing.
fn fill(map: &MapFill) -> String {
    match map.capacity {
        0 => "-".to_owned(),
        capacity => format!("{}%", map.entries.saturating_mul(100).div_ceil(capacity)),
    }
}

/// The two largest units.
fn uptime(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use keelway_api::v1::{Counts, Drop, Hook, SourceKind};

    use super::*;
    use crate::volumes::Volume;

    fn status() -> NodeStatusResponse {
        NodeStatusResponse {
            version: "0.1.0".into(),
            layout_version: 1,
            node: "n1".into(),
            source: "manifests /m".into(),
            synced: true,
            kinds: vec![SourceKind { kind: "Pod".into(), synced: true, objects: 12 }],
            hooks: vec![Hook {
                hook: "cgroup-connect4".into(),
                device: "/sys/fs/cgroup".into(),
                mechanism: "link".into(),
                link_id: 7,
                program_id: 70,
                attached: true,
            }],
            maps: vec![MapFill { name: "frontends4".into(), entries: 1, capacity: 65536, lru: false }],
            counts: Some(Counts { services: 3, frontends: 6, backends: 9, ..Counts::default() }),
            drops: vec![Drop { reason: "policy".into(), hook: "pod-ingress".into(), packets: 5, bytes: 300 }],
            pod_cidrs: vec!["10.244.1.0/24".into(), "fd00::/64".into()],
            routing: "vxlan".into(),
            load_balancer_mode: "snat".into(),
            xdp: "off".into(),
            xdp_packets: 0,
            mtu: 1450,
            generation: 2,
            uptime_seconds: 3700,
            problems: vec![],
        }
    }

    fn volumes() -> Volumes {
        Volumes::Listed(vec![Volume { id: "vol-1".into(), capacity: 64 << 20 }])
    }

    #[test]
    fn a_page_shows_everything_in_columns() {
        let page = table(&status(), &volumes());
        for line in [
            "Agent           0.1.0 (layout 1), up 1h 1m",
            "Pod CIDRs       10.244.1.0/24, fd00::/64",
            "Load balancing  snat",
            "XDP             off",
            "Services        3 (6 frontends, 9 backends)",
            "Volumes         1 (64 MiB)",
            "  vol-1  67108864",
            "  HOOK             AT              BY    PROGRAM  LINK  ATTACHED",
            "  cgroup-connect4  /sys/fs/cgroup  link       70     7  yes",
            "  frontends4        1     65536  1%    refuses more",
            "  policy  pod-ingress        5    300",
            "  none",
        ] {
            assert!(page.lines().any(|found| found == line), "{line:?} is missing from\n{page}");
        }
    }

    #[test]
    fn what_went_by_xdp_is_counted() {
        let status = NodeStatusResponse { xdp: "native".into(), xdp_packets: 1200, ..status() };
        let line = "XDP             native (1200 packets turned round)";
        assert!(table(&status, &volumes()).lines().any(|found| found == line));
    }

    #[test]
    fn what_is_wrong_is_shown_and_told_by_the_exit_status() {
        assert!(is_well(&status(), &volumes()));
        let unsynced = NodeStatusResponse { synced: false, ..status() };
        let troubled = NodeStatusResponse { problems: vec!["map full".into()], ..status() };
        let mut detached = status();
        detached.hooks[0].attached = false;
        for unwell in [&unsynced, &troubled, &detached] {
            assert!(!is_well(unwell, &volumes()), "{unwell:?}");
        }
        let silent = Volumes::Unwell("csi.sock: no answer".into());
        assert!(is_well(&status(), &Volumes::NoDriver) && !is_well(&status(), &silent));
        assert!(table(&status(), &silent).ends_with("Problems\n  volumes: csi.sock: no answer\n"));
        assert!(table(&troubled, &volumes()).ends_with("Problems\n  map full\n"));
        assert!(table(&detached, &volumes()).contains("NO"));
    }
}
