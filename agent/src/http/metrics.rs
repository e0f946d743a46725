//! The agent's metrics. Where kube-proxy has such a metric, it is kube-proxy's with `keelway_` in place of `kubeproxy_`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::kube_proxy::KubeProxy;
use crate::source::{Kind, Status};

/// What [`Metrics::encode`] writes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: String,
    hook: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MapLabel {
    map: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    map: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

/// Seconds: close around what one change should take.
const CHANGE_WRITE: [f64; 18] = [
    50e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1,
    0.5, 2.0,
];

/// A handle on the agent's metrics; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    change_write: Histogram,
    sync_errors: Counter,
    drops: Family<DropLabels, Counter>,
    drop_bytes: Family<DropLabels, Counter>,
    map_entries: Family<MapLabel, Gauge>,
    map_capacity: Family<MapLabel, Gauge>,
    flow_entries: Family<FlowLabels, Gauge>,
    flows_swept: Family<MapLabel, Counter>,
    source_synced: Family<KindLabel, Gauge>,
    source_objects: Family<KindLabel, Gauge>,
    source_errors: Counter,
    services_left_out: Gauge,
    policy_wait: Histogram,
    policy_unchecked: Counter,
    adopted: Gauge,
    kube_proxy: KubeProxy,
}

impl Metrics {
    /// All at zero. `version` and `layout` are those of `build_info`.
    pub fn new(version: &str, layout: u32) -> Self {
        Self::build(version, layout, Registry::default(), KubeProxy::default())
    }

    /// The same, and under kube-proxy's own names too, with its labels and buckets.
    pub fn with_kube_proxy_names(version: &str, layout: u32) -> Self {
        let (mut all, kube_proxy) = (Registry::default(), KubeProxy::default());
        kube_proxy.register(all.sub_registry_with_prefix("kubeproxy"));
        Self::build(version, layout, all, kube_proxy)
    }

    fn build(version: &str, layout: u32, mut all: Registry, kube_proxy: KubeProxy) -> Self {
        let registry = all.sub_registry_with_prefix("keelway");
        let labels = vec![("version".to_owned(), version.to_owned()), ("layout".to_owned(), layout.to_string())];
        registry.register("build", "What runs: always 1", Info::new(labels));
        kube_proxy.register(registry);
        macro_rules! registered {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let inner = Inner {
            change_write: registered!(
                "change_write_duration_seconds",
                "From a decoded change of endpoints to its last write to the kernel",
                Histogram::new(CHANGE_WRITE)
            ),
            sync_errors: registered!("sync_errors", "Syncs that failed and are retried", Counter::default()),
            drops: registered!("drop", "Packets dropped", Family::default()),
            drop_bytes: registered!("drop_bytes", "Bytes of packets dropped", Family::default()),
            map_entries: registered!("map_entries", "Entries of a kernel table", Family::default()),
            map_capacity: registered!("map_capacity", "Entries that a kernel table can hold", Family::default()),
            flow_entries: registered!(
                "flow_entries",
                "Entries of a table of flows within their time (live) and past it (expired), as last counted",
                Family::default()
            ),
            flows_swept: registered!("flows_swept", "Expired entries removed by this agent", Family::default()),
            source_synced: registered!("source_synced", "1 after the first full list of a kind", Family::default()),
            source_objects: registered!("source_objects", "Objects of a kind that are known", Family::default()),
            source_errors: registered!("source_errors", "Failures to read desired state", Counter::default()),
            services_left_out: registered!(
                "services_left_out",
                "Services that do not fit into the kernel's tables; served as before, or not at all, until there is room",
                Gauge::default()
            ),
            policy_wait: registered!(
                "cni_policy_wait_seconds",
                "How long ADDs waited until the policies in force were no older than their Pod",
                Histogram::new(exponential_buckets(0.001, 2.0, 15))
            ),
            policy_unchecked: registered!(
                "cni_policy_unchecked",
                "ADDs that went on with the policies that were known, since no API server answered",
                Counter::default()
            ),
            adopted: registered!(
                "adopted_flows",
                "Connections of a former kube-proxy that were left to the kernel's own tracking at the start",
                Gauge::default()
            ),
            kube_proxy,
            registry: all,
        };
        Self(Arc::new(inner))
    }

    /// The text that Prometheus reads.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.0.registry);
        text
    }

    /// A sync succeeded after `seconds`, at `unix_seconds`; `full`: of everything, not of what changed.
    pub fn sync_done(&self, seconds: f64, unix_seconds: f64, full: bool) {
        self.0.kube_proxy.sync_done(seconds, unix_seconds, full);
    }

    /// A sync failed.
    pub fn sync_failed(&self) {
        self.0.sync_errors.inc();
    }

    /// A Service changed.
    pub fn service_changed(&self) {
        self.0.kube_proxy.service_changed();
    }

    /// An EndpointSlice changed.
    pub fn endpoints_changed(&self) {
        self.0.kube_proxy.endpoints_changed();
    }

    /// A change of an endpoint reached the kernel `seconds` after it happened; `ipv6` is its family, where it has endpoints.
    pub fn endpoint_programmed(&self, seconds: f64, ipv6: Option<bool>) {
        self.0.kube_proxy.endpoint_programmed(seconds, ipv6);
    }

    /// Ports of Services with a Local policy and no endpoint here, while others have some.
    pub fn set_no_local(&self, counts: keelway_proxy::NoLocal) {
        self.0.kube_proxy.set_no_local(counts);
    }

    /// So many flows were left to the kernel's own tracking.
    pub fn set_adopted(&self, flows: usize) {
        self.0.adopted.set(flows as i64);
    }

    /// A change of endpoints was in the kernel `seconds` after it had been read.
    pub fn change_written(&self, seconds: f64) {
        self.0.change_write.observe(seconds);
    }

    /// So many Services do not fit.
    pub fn set_left_out(&self, services: usize) {
        self.0.services_left_out.set(services as i64);
    }

    /// An ADD waited for policies.
    pub fn policies_awaited(&self, seconds: f64) {
        self.0.policy_wait.observe(seconds);
    }

    /// An ADD could not ask whether the policies are new enough.
    pub fn policies_unchecked(&self) {
        self.0.policy_unchecked.inc();
    }

    /// So much was dropped since the counters were made, which the kernel keeps across restarts.
    pub fn set_drops(&self, reason: &str, hook: &str, packets: u64, bytes: u64) {
        let labels = DropLabels { reason: reason.to_owned(), hook: hook.to_owned() };
        self.0.drops.get_or_create(&labels).inner().store(packets, Ordering::Relaxed);
        self.0.drop_bytes.get_or_create(&labels).inner().store(bytes, Ordering::Relaxed);
    }

    /// How full a kernel table is.
    pub fn set_map(&self, map: &str, entries: u64, capacity: u64) {
        let labels = MapLabel { map: map.to_owned() };
        self.0.map_entries.get_or_create(&labels).set(entries as i64);
        self.0.map_capacity.get_or_create(&labels).set(capacity as i64);
    }

    /// What the sweep of a table of flows found and removed.
    pub fn set_flows(&self, map: &str, live: u64, expired: u64, removed: u64) {
        for (state, entries) in [("live", live), ("expired", expired)] {
            let labels = FlowLabels { map: map.to_owned(), state };
            self.0.flow_entries.get_or_create(&labels).set(entries as i64);
        }
        let labels = MapLabel { map: map.to_owned() };
        self.0.flows_swept.get_or_create(&labels).inner().store(removed, Ordering::Relaxed);
    }

    /// What the source knows about itself.
    pub fn set_source(&self, status: &Status) {
        for kind in Kind::ALL {
            let labels = KindLabel { kind: kind.as_str().to_owned() };
            let known = status.kind(kind);
            self.0.source_synced.get_or_create(&labels).set(known.synced.into());
            self.0.source_objects.get_or_create(&labels).set(known.objects as i64);
        }
        self.0.source_errors.inner().store(status.errors(), Ordering::Relaxed);
    }

    pub(super) fn count_healthz(&self, code: u16) {
        self.0.kube_proxy.count_healthz(code);
    }

    pub(super) fn count_livez(&self, code: u16) {
        self.0.kube_proxy.count_livez(code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kube_proxy() {
        let metrics = Metrics::new("0.1.0", 7);
        metrics.service_changed();
        metrics.endpoints_changed();
        metrics.count_healthz(503);
        metrics.sync_done(0.003, 7.0, true);
        metrics.endpoint_programmed(0.4, Some(true));
        metrics.set_drops("policy", "pod-ingress", 5, 300);
        metrics.set_map("conntrack4", 10, 100);
        metrics.set_flows("conntrack4", 6, 4, 9);
        metrics.set_source(&Status::default());
        let text = metrics.encode();
        for line in [
            "keelway_build_info{version=\"0.1.0\",layout=\"7\"} 1",
            "keelway_sync_proxy_rules_service_changes_total 1",
            "keelway_sync_proxy_rules_service_changes_pending 0",
            "keelway_sync_proxy_rules_endpoint_changes_pending 0",
            "keelway_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "keelway_sync_full_proxy_rules_duration_seconds_bucket{le=\"0.004\",ip_family=\"IPv6\"} 1",
            "keelway_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 7.0",
            "keelway_network_programming_duration_seconds_bucket{le=\"0.5\",ip_family=\"IPv6\"} 1",
            "keelway_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
            "keelway_proxy_healthz_total{code=\"503\"} 1",
            "keelway_proxy_livez_total{code=\"200\"} 0",
            "keelway_drop_total{reason=\"policy\",hook=\"pod-ingress\"} 5",
            "keelway_drop_bytes_total{reason=\"policy\",hook=\"pod-ingress\"} 300",
            "keelway_map_entries{map=\"conntrack4\"} 10",
            "keelway_map_capacity{map=\"conntrack4\"} 100",
            "keelway_flow_entries{map=\"conntrack4\",state=\"live\"} 6",
            "keelway_flow_entries{map=\"conntrack4\",state=\"expired\"} 4",
            "keelway_flows_swept_total{map=\"conntrack4\"} 9",
            "keelway_source_synced{kind=\"Pod\"} 0",
            "keelway_source_errors_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing from\n{text}");
        }
        let queued = "keelway_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv6\"} ";
        assert!(text.contains(queued), "{text}");
        assert!(!text.contains("kubeproxy_"), "kube-proxy's own names are for those who ask for them");
        // The same under both names.
        let both = Metrics::with_kube_proxy_names("0.1.0", 7);
        both.sync_done(0.003, 7.0, false);
        let text = both.encode();
        let of = |prefix: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| line.starts_with(prefix));
            lines.map(|line| line.replacen(prefix, "", 1)).collect()
        };
        let theirs = of("kubeproxy_");
        assert!(theirs.len() > 50 && theirs.iter().all(|line| of("keelway_").contains(line)), "{text}");
    }
}
