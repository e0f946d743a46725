//! The metrics that kube-proxy has too: names, labels and buckets of kubernetes/kubernetes, pkg/proxy/metrics/metrics.go, but for
//! those of one back end (`..._nftables_...`, `..._iptables_...`, `conntrack_reconciler_...`), which say nothing here.
//!
//! A sync is one of both families here: each is told. A Service's change is counted once; kube-proxy counts it in each of its
//! two proxies.

use std::iter::successors;
use std::sync::atomic::AtomicU64;

use keelway_proxy::NoLocal;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Seconds as a float.
type Seconds = Gauge<f64, AtomicU64>;

const FAMILIES: [(&str, bool); 2] = [("IPv4", false), ("IPv6", true)];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfFamily {
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPolicy {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCode {
    code: u16,
}

/// How a histogram of either kind is made.
#[derive(Clone, Copy, Debug)]
enum Buckets {
    Sync,
    Programming,
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        let linear = |first: f64, step: f64, count| successors(Some(first), move |last| Some(last + step)).take(count);
        match self {
            Self::Sync => Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            // Its list begins with a bucket of nothing.
            Self::Programming => Histogram::new(
                [0.0]
                    .into_iter()
                    .chain(linear(0.25, 0.25, 2))
                    .chain(linear(1.0, 1.0, 59))
                    .chain(linear(60.0, 5.0, 12))
                    .chain(linear(120.0, 30.0, 7)),
            ),
        }
    }
}

type Histograms = Family<OfFamily, Histogram, Buckets>;

#[derive(Debug)]
pub(super) struct KubeProxy {
    sync: Histograms,
    full: Histograms,
    partial: Histograms,
    programming: Histograms,
    last: Family<OfFamily, Seconds>,
    queued: Family<OfFamily, Seconds>,
    services: Counter,
    services_pending: Gauge,
    endpoints: Counter,
    endpoints_pending: Gauge,
    no_local: Family<OfPolicy, Gauge>,
    healthz: Family<OfCode, Counter>,
    livez: Family<OfCode, Counter>,
}

impl Default for KubeProxy {
    fn default() -> Self {
        Self {
            sync: Family::new_with_constructor(Buckets::Sync),
            full: Family::new_with_constructor(Buckets::Sync),
            partial: Family::new_with_constructor(Buckets::Sync),
            programming: Family::new_with_constructor(Buckets::Programming),
            last: Family::default(),
            queued: Family::default(),
            services: Counter::default(),
            services_pending: Gauge::default(),
            endpoints: Counter::default(),
            endpoints_pending: Gauge::default(),
            no_local: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
        }
    }
}

impl KubeProxy {
    /// Into a registry whose prefix stands for `kubeproxy`.
    pub fn register(&self, registry: &mut Registry) {
        let sync = "Time to bring changes to the kernel";
        registry.register("sync_proxy_rules_duration_seconds", sync, self.sync.clone());
        registry.register("sync_full_proxy_rules_duration_seconds", "The same, of everything", self.full.clone());
        registry.register("sync_partial_proxy_rules_duration_seconds", "The same, of changes", self.partial.clone());
        registry.register(
            "network_programming_duration_seconds",
            "From the change of an endpoint to the kernel",
            self.programming.clone(),
        );
        let last = "When the kernel was last brought up to date";
        registry.register("sync_proxy_rules_last_timestamp_seconds", last, self.last.clone());
        let queued = "When a sync was last asked for";
        registry.register("sync_proxy_rules_last_queued_timestamp_seconds", queued, self.queued.clone());
        registry.register("sync_proxy_rules_service_changes", "Service changes", self.services.clone());
        let waiting = "Service changes that wait for the next sync";
        registry.register("sync_proxy_rules_service_changes_pending", waiting, self.services_pending.clone());
        registry.register("sync_proxy_rules_endpoint_changes", "EndpointSlice changes", self.endpoints.clone());
        let waiting = "EndpointSlice changes that wait for the next sync";
        registry.register("sync_proxy_rules_endpoint_changes_pending", waiting, self.endpoints_pending.clone());
        registry.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local traffic policy and no endpoint here",
            self.no_local.clone(),
        );
        registry.register("proxy_healthz", "Answers of /healthz by HTTP status", self.healthz.clone());
        registry.register("proxy_livez", "Answers of /livez by HTTP status", self.livez.clone());
        // As there, a series is there before it has counted anything.
        self.set_no_local(NoLocal::default());
        for code in [200, 503] {
            drop(self.healthz.get_or_create(&OfCode { code }));
            drop(self.livez.get_or_create(&OfCode { code }));
        }
    }

    pub fn sync_done(&self, seconds: f64, unix_seconds: f64, full: bool) {
        for (ip_family, _) in FAMILIES {
            let of = OfFamily { ip_family };
            self.sync.get_or_create(&of).observe(seconds);
            if full { &self.full } else { &self.partial }.get_or_create(&of).observe(seconds);
            self.last.get_or_create(&of).set(unix_seconds);
        }
        self.services_pending.set(0);
        self.endpoints_pending.set(0);
    }

    pub fn service_changed(&self) {
        self.services.inc();
        self.services_pending.inc();
        self.asked();
    }

    pub fn endpoints_changed(&self) {
        self.endpoints.inc();
        self.endpoints_pending.inc();
        self.asked();
    }

    fn asked(&self) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        for (ip_family, _) in FAMILIES {
            self.queued.get_or_create(&OfFamily { ip_family }).set(now.as_secs_f64());
        }
    }

    pub fn endpoint_programmed(&self, seconds: f64, ipv6: Option<bool>) {
        for (ip_family, of) in FAMILIES {
            if ipv6.is_none_or(|ipv6| ipv6 == of) {
                self.programming.get_or_create(&OfFamily { ip_family }).observe(seconds);
            }
        }
    }

    pub fn set_no_local(&self, counts: NoLocal) {
        for (traffic_policy, counts) in [("internal", counts.internal), ("external", counts.external)] {
            for ((ip_family, _), count) in FAMILIES.into_iter().zip(counts) {
                self.no_local.get_or_create(&OfPolicy { ip_family, traffic_policy }).set(count as i64);
            }
        }
    }

    pub fn count_healthz(&self, code: u16) {
        self.healthz.get_or_create(&OfCode { code }).inc();
    }

    pub fn count_livez(&self, code: u16) {
        self.livez.get_or_create(&OfCode { code }).inc();
    }
}
