//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler on a machine that is no node.
use std::path::Path;

use anyhow::{Result, ensure};

use super::pki::Pki;
use crate::host::Host;
use crate::process::Process;
use crate::sh::{SOON, wait_for};

/// Of pods, IPv4 and IPv6.
pub const POD_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/56";
/// Of Services; the first family is the primary one.
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The DNS Service's address.
pub const DNS: &str = "10.96.0.10";

/// Starts all four; returns when the API server says that it is ready.
pub fn start(host: &Host, bin: &Path, pki: &Pki) -> Result<()> {
    let program = |name: &str| bin.join(name).to_string_lossy().into_owned();
    let (v4, v6) = (host.v4, host.v6);
    pki.make()?;
    let names = "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost";
    let addresses = format!("IP:127.0.0.1,IP:{v4},IP:{v6},IP:10.96.0.1,IP:fd00:10:96::1");
    pki.sign("apiserver", "/CN=kube-apiserver", &format!("{addresses},{names}"))?;
    pki.sign("admin", "/O=system:masters/CN=admin", "DNS:admin")?;
    let admin = pki.kubeconfig("admin", &server(host))?;

    let data = host.dir.join("etcd").to_string_lossy().into_owned();
    let client = "http://127.0.0.1:2379";
    let mut etcd = Arguments::new(program("etcd"));
    etcd.add("data-dir", &data).add("listen-client-urls", client).add("advertise-client-urls", client);
    // A lab's data need not outlive the machine.
    etcd.add("listen-peer-urls", "http://127.0.0.1:2380").add("unsafe-no-fsync", "true");
    let mut etcd = host.spawn("etcd", &etcd.0)?;

    let mut api = Arguments::new(program("kube-apiserver"));
    api.add("etcd-servers", client).add("advertise-address", &v4.to_string()).add("secure-port", "6443");
    api.add("service-cluster-ip-range", SERVICE_CIDRS).add("allow-privileged", "true");
    api.add("tls-cert-file", &pki.certificate("apiserver")).add("tls-private-key-file", &pki.key("apiserver"));
    // One authority signs clients and the aggregator: then the aggregator's name must be said.
    api.add("client-ca-file", &pki.certificate("ca")).add("requestheader-client-ca-file", &pki.certificate("ca"));
    api.add("requestheader-allowed-names", "aggregator");
    api.add("kubelet-client-certificate", &pki.certificate("admin")).add("kubelet-client-key", &pki.key("admin"));
    api.add("kubelet-preferred-address-types", "InternalIP");
    api.add("service-account-key-file", &pki.file("sa.pub")).add("service-account-signing-key-file", &pki.key("sa"));
    api.add("service-account-issuer", "https://kubernetes.default.svc");
    api.add("authorization-mode", "Node,RBAC").add("enable-admission-plugins", "NodeRestriction");
    let mut api = host.spawn("apiserver", &api.0)?;

    let kubectl =
        [program("kubectl"), format!("--kubeconfig={}", admin.display()), "get".into(), "--raw=/readyz".into()];
    wait_for("the API server", 3 * SOON, || {
        etcd.check()?;
        api.check()?;
        ensure!(host.run(&kubectl)?.trim() == "ok", "it is not ready");
        Ok(())
    })?;

    let kubeconfig = admin.to_string_lossy().into_owned();
    let mut controllers = Arguments::new(program("kube-controller-manager"));
    controllers
        .add("kubeconfig", &kubeconfig)
        .add("leader-elect", "false")
        .add("use-service-account-credentials", "true");
    controllers.add("service-account-private-key-file", &pki.key("sa")).add("root-ca-file", &pki.certificate("ca"));
    controllers
        .add("cluster-signing-cert-file", &pki.certificate("ca"))
        .add("cluster-signing-key-file", &pki.key("ca"));
    controllers
        .add("allocate-node-cidrs", "true")
        .add("cluster-cidr", POD_CIDRS)
        .add("service-cluster-ip-range", SERVICE_CIDRS);
    let controllers = host.spawn("controller-manager", &controllers.0)?;
    let mut scheduler = Arguments::new(program("kube-scheduler"));
    scheduler.add("kubeconfig", &kubeconfig).add("leader-elect", "false");
    let scheduler = host.spawn("scheduler", &scheduler.0)?;
    [etcd, api, controllers, scheduler].into_iter().for_each(Process::keep);
    Ok(())
}

/// The API server's URL.
pub fn server(host: &Host) -> String {
    format!("https://{}:6443", host.v4)
}

/// A command line of `--name=value` flags.
pub(super) struct Arguments(pub(super) Vec<String>);

impl Arguments {
    pub(super) fn new(program: String) -> Self {
        Self(vec![program])
    }

    pub(super) fn add(&mut self, name: &str, value: &str) -> &mut Self {
        self.0.push(format!("--{name}={value}"));
        self
    }
}
