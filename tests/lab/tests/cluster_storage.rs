//! Claims in a real Kubernetes, from the first byte to nothing left: the scheduler, the sidecars, the kubelet and the driver.
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keelway_lab::cluster::programs::root;
use keelway_lab::cluster::{Cluster, demo, install, programs};
use keelway_lab::sh::{self, wait_for};

const OBJECTS: &str = include_str!("../../fixtures/cluster-storage.yaml");

/// How long the sidecars and the kubelet may take for one thing, on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn a_claim_lives_from_its_first_byte_to_nothing_left() {
    let reason = programs::missing(programs::CLUSTER).or_else(|| sh::missing(&["openssl", "runc"], &["keelway-csi"]));
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return;
    }
    let lab = Claims { cluster: Cluster::up("claims", 2).unwrap() };
    install::keelway(&lab.cluster).unwrap();
    demo::ready(&lab.cluster).unwrap();
    install::snapshots(&lab.cluster).unwrap();
    if let Err(error) = lab.story() {
        let _ = lab.kubectl(&["get", "pods,pvc,pv,csistoragecapacities", "-A"]).map(|text| println!("{text}"));
        let _ = lab.kubectl(&["get", "events", "--sort-by=.lastTimestamp"]).map(|text| println!("{text}"));
        panic!("{error:#}");
    }
}

struct Claims {
    cluster: Cluster,
}

impl Claims {
    fn story(&self) -> Result<()> {
        self.capacity()?;
        self.cluster.apply(OBJECTS)?;
        self.kubectl(&["rollout", "status", "statefulset/db", "--timeout=300s"])?;
        self.cluster.wait(&["pod/first", "--for=condition=Ready"], 300)?;
        self.group()?;
        self.device()?;
        self.one_pod_alone()?;
        self.expand_in_use()?;
        self.snapshot_and_restore()?;
        self.a_content_made_by_hand()?;
        self.clone_a_claim()?;
        self.another_driver_object()?;
        self.another_pod()?;
        self.while_the_kubelet_is_away()?;
        self.nothing_is_left()
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(args)
    }

    /// Runs a line of shell in a pod.
    fn shell(&self, pod: &str, line: &str) -> Result<String> {
        Ok(self.kubectl(&["exec", pod, "--", "busybox", "sh", "-c", line])?.trim().to_owned())
    }

    fn path(&self, object: &str, path: &str) -> Result<String> {
        Ok(self.kubectl(&["get", object, "-o", &format!("jsonpath={path}")])?.trim().to_owned())
    }

    /// Waits until kubectl shows this value at a path of an object.
    fn until(&self, object: &str, path: &str, wanted: &str) -> Result<()> {
        wait_for(&format!("{path} of {object} to be {wanted}"), LIMIT, || {
            let found = self.path(object, path)?;
            ensure!(found == wanted, "it is {found:?}");
            Ok(())
        })
    }

    /// Each node says of each class what it has, and a claim that fits nowhere is not sent anywhere.
    fn capacity(&self) -> Result<()> {
        wait_for("capacity of each class on each node", LIMIT, || {
            let path =
                "jsonpath={range .items[*]}{.storageClassName} {.nodeTopology.matchLabels} {.capacity}{'\\n'}{end}";
            let text = self.kubectl(&["-n", "kube-system", "get", "csistoragecapacities", "-o", path])?;
            for class in ["keelway-local ", "keelway-local-xfs "] {
                for node in ["node1", "node2"] {
                    let found =
                        text.lines().any(|line| line.starts_with(class) && line.contains(node) && !line.ends_with(' '));
                    ensure!(found, "{class} on {node} is missing from {text}");
                }
            }
            Ok(())
        })?;
        self.cluster.apply(&claim("huge", "keelway-local", "100Pi", ""))?;
        self.cluster.apply(&pod("waits", "huge"))?;
        wait_for("the scheduler to see that nothing is large enough", LIMIT, || {
            let events = self.kubectl(&["get", "events", "--field-selector=involvedObject.name=waits"])?;
            ensure!(events.contains("did not have enough free storage"), "events: {events}");
            Ok(())
        })?;
        let chosen = self.path("pvc/huge", "{.metadata.annotations}")?.contains("selected-node");
        ensure!(!chosen, "a node was chosen for what fits nowhere");
        self.kubectl(&["delete", "pod/waits", "pvc/huge"]).map(drop)
    }

    fn group(&self) -> Result<()> {
        let seen =
            self.shell("db-0", "busybox stat -c %g,%a /data; busybox id -u; echo before >/data/file && busybox sync")?;
        let group = seen.lines().next().unwrap_or_default();
        ensure!(group.starts_with("2000,") && group.ends_with("775"), "fsGroup is 2000, the volume has {seen}");
        ensure!(self.shell("db-0", "busybox stat -c %u,%g /data/file")? == "1000,2000", "a new file has another group");
        Ok(())
    }

    fn device(&self) -> Result<()> {
        let size = self.shell("first", "busybox blockdev --getsize64 /dev/volume")?;
        ensure!(size == (32_u64 << 20).to_string(), "the device has {size} bytes");
        self.shell(
            "first",
            "echo keelway | busybox dd of=/dev/volume bs=512 conv=notrunc,sync 2>/dev/null && busybox sync",
        )?;
        let read = self.shell("first", "busybox head -c 7 /dev/volume")?;
        ensure!(read == "keelway", "the device holds {read:?}");
        ensure!(
            self.shell("first", "busybox grep ' /single ' /proc/mounts")?.contains(" ext4 "),
            "/single is not ext4"
        );
        Ok(())
    }

    fn one_pod_alone(&self) -> Result<()> {
        self.shell("first", "echo mine >/single/file && busybox sync")?;
        self.cluster.apply(&pod("second", "single"))?;
        wait_for("the second pod to be refused", LIMIT, || {
            let events = self.kubectl(&["get", "events", "--field-selector=involvedObject.name=second"])?;
            ensure!(events.contains("ReadWriteOncePod"), "events: {events}");
            Ok(())
        })?;
        ensure!(self.path("pod/second", "{.status.phase}")? == "Pending", "two pods have the volume");
        self.kubectl(&["delete", "pod/first"])?;
        self.cluster.wait(&["pod/second", "--for=condition=Ready"], 300)?;
        ensure!(self.shell("second", "busybox cat /data/file")? == "mine", "the second pod has other data");
        self.kubectl(&["delete", "pod/second"]).map(drop)
    }

    fn expand_in_use(&self) -> Result<()> {
        let pod = self.path("pod/db-0", "{.metadata.uid}")?;
        let to = r#"{"spec":{"resources":{"requests":{"storage":"448Mi"}}}}"#;
        self.kubectl(&["patch", "pvc/data-db-0", "-p", to])?;
        self.until("pvc/data-db-0", "{.status.capacity.storage}", "448Mi")?;
        let mebibytes: u64 = self.shell("db-0", "busybox df -m /data | busybox awk 'END {print $2}'")?.parse()?;
        ensure!(mebibytes > 380, "the filesystem has {mebibytes} MiB");
        ensure!(self.path("pod/db-0", "{.metadata.uid}")? == pod, "the pod was replaced");
        ensure!(self.shell("db-0", "busybox cat /data/file")? == "before", "data changed");
        Ok(())
    }

    fn snapshot_and_restore(&self) -> Result<()> {
        self.cluster.apply(
            "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {name: picture}, spec: {\
             volumeSnapshotClassName: keelway-local, source: {persistentVolumeClaimName: data-db-0}}}",
        )?;
        self.until("volumesnapshot/picture", "{.status.readyToUse}", "true")?;
        self.shell("db-0", "echo after >/data/file && busybox sync")?;
        let from = "dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: picture},";
        self.read_back("restored", from, "before")
    }

    /// A content that names a snapshot and no node is had by the node that has the snapshot, out of two.
    fn a_content_made_by_hand(&self) -> Result<()> {
        let content = self.path("volumesnapshot/picture", "{.status.boundVolumeSnapshotContentName}")?;
        let handle = self.path(&format!("volumesnapshotcontent/{content}"), "{.status.snapshotHandle}")?;
        self.cluster.apply(&format!(
            "{{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotContent, metadata: {{name: by-hand}}, spec: {{\
             deletionPolicy: Retain, driver: local.csi.keelway.dev, source: {{snapshotHandle: {handle}}}, \
             volumeSnapshotRef: {{name: by-hand, namespace: default}}}}}}"
        ))?;
        self.cluster.apply(
            "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, metadata: {name: by-hand}, spec: {\
             source: {volumeSnapshotContentName: by-hand}}}",
        )?;
        self.until("volumesnapshot/by-hand", "{.status.readyToUse}", "true")?;
        let node = self.path(
            "volumesnapshotcontent/by-hand",
            r"{.metadata.labels.snapshot\.storage\.kubernetes\.io/managed-by}",
        )?;
        let wanted = self.path("pod/db-0", "{.spec.nodeName}")?;
        ensure!(node == wanted, "{node:?} took a snapshot of {wanted}");
        self.kubectl(&["delete", "volumesnapshot/by-hand"])?;
        self.kubectl(&["delete", "volumesnapshotcontent/by-hand"])?;
        ensure!(self.path("volumesnapshot/picture", "{.status.readyToUse}")? == "true", "the snapshot is gone");
        Ok(())
    }

    fn clone_a_claim(&self) -> Result<()> {
        self.read_back("cloned", "dataSource: {kind: PersistentVolumeClaim, name: data-db-0},", "after")
    }

    /// A claim that is made from something, for a pod on the node of its source: the scheduler does not know of sources.
    fn read_back(&self, name: &str, source: &str, wanted: &str) -> Result<()> {
        self.cluster.apply(&claim(name, "keelway-local-xfs", "448Mi", source))?;
        let node = self.path("pod/db-0", "{.spec.nodeName}")?;
        let on = format!("spec: {{nodeSelector: {{kubernetes.io/hostname: {node}}},");
        self.cluster.apply(&pod(name, name).replacen("spec: {", &on, 1))?;
        self.cluster.wait(&[&format!("pod/{name}"), "--for=condition=Ready"], 240)?;
        let found = self.shell(name, "busybox cat /data/file")?;
        ensure!(found == wanted, "{name} holds {found:?}, not {wanted:?}");
        Ok(())
    }

    /// Over an older CSIDriver, as deploy/README.md says: apply alone cannot change what it is for, and replacing it disturbs nobody.
    fn another_driver_object(&self) -> Result<()> {
        let file = root().join("deploy/csi/csidriver.yaml");
        let older = fs::read_to_string(&file)?.replace("[Persistent, Ephemeral]", "[Persistent]");
        let replace = |file: &Path| self.kubectl(&["replace", "--force", "-f", &file.to_string_lossy()]);
        let copy = self.cluster.lab.dir.join("csidriver.yaml");
        fs::write(&copy, &older)?;
        replace(&copy)?;
        let modes = "{.spec.volumeLifecycleModes}";
        ensure!(self.path("csidriver/local.csi.keelway.dev", modes)? == r#"["Persistent"]"#, "{older}");
        let refused = self.cluster.apply(&fs::read_to_string(&file)?).expect_err("the API server lets it change");
        ensure!(format!("{refused:#}").contains("immutable"), "{refused:#}");
        replace(&file)?;
        ensure!(self.path("csidriver/local.csi.keelway.dev", modes)?.contains("Ephemeral"), "it is not replaced");
        ensure!(self.shell("db-0", "busybox cat /data/file")? == "after", "the pod lost its volume");
        Ok(())
    }

    fn another_pod(&self) -> Result<()> {
        self.kubectl(&["delete", "pod/db-0"])?;
        self.kubectl(&["rollout", "status", "statefulset/db", "--timeout=300s"])?;
        ensure!(self.shell("db-0", "busybox cat /data/file")? == "after", "the new pod has other data");
        Ok(())
    }

    /// A pod is gone before its kubelet could unmount its volume, and the next one has the volume all the same.
    fn while_the_kubelet_is_away(&self) -> Result<()> {
        let (name, old) = (self.path("pod/db-0", "{.spec.nodeName}")?, self.path("pod/db-0", "{.metadata.uid}")?);
        let node = self.cluster.lab.nodes().iter().find(|node| node.name == name).context("the pod's node")?;
        self.cluster.stop_kubelet(node)?;
        self.kubectl(&["delete", "pod/db-0", "--force", "--grace-period=0"])?;
        self.cluster.start_kubelet(node)?;
        wait_for("another pod", LIMIT, || {
            ensure!(self.path("pod/db-0", "{.metadata.uid}")? != old, "it is the one that was deleted");
            Ok(())
        })?;
        self.kubectl(&["rollout", "status", "statefulset/db", "--timeout=300s"])?;
        ensure!(self.shell("db-0", "busybox cat /data/file")? == "after", "the new pod has other data");
        wait_for("the old pod's mount to go", LIMIT, || {
            let mounts = node.run(&["cat", "/proc/mounts"])?;
            ensure!(!mounts.contains(&old), "{mounts}");
            Ok(())
        })
    }

    fn nothing_is_left(&self) -> Result<()> {
        self.kubectl(&["delete", "statefulset/db", "pod/restored", "pod/cloned", "volumesnapshot/picture"])?;
        self.kubectl(&["delete", "pvc", "--all"])?;
        wait_for("the volumes to be gone", LIMIT, || {
            let volumes = self.kubectl(&["get", "pv", "-o", "name"])?;
            ensure!(volumes.trim().is_empty(), "{volumes}");
            for node in self.cluster.lab.nodes() {
                for dir in ["pool", "csi/volumes", "csi/snapshots"] {
                    let path = node.path(&format!("/var/lib/keelway/{dir}"))?;
                    let left: Vec<_> = match fs::read_dir(&path) {
                        Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
                        Err(_) => Vec::new(),
                    };
                    let kept = left.iter().filter(|name| *name != ".keelway-pool").count();
                    ensure!(kept == 0, "{} of {}: {left:?}", path.display(), node.name);
                }
                let mounts = node.run(&["cat", "/proc/mounts"])?;
                ensure!(!mounts.contains("kubernetes.io~csi") && !mounts.contains("/globalmount"), "{mounts}");
            }
            Ok(())
        })
        .context("something is left")
    }
}

fn claim(name: &str, class: &str, size: &str, source: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {name}}}, spec: {{storageClassName: {class}, {source} \
         accessModes: [ReadWriteOnce], resources: {{requests: {{storage: {size}}}}}}}}}"
    )
}

fn pod(name: &str, claim: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{terminationGracePeriodSeconds: 1, containers: \
         [{{name: it, image: 'keelway.local/probe:lab', imagePullPolicy: Never, volumeMounts: [{{name: data, mountPath: /data}}]}}], \
         volumes: [{{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}]}}}}"
    )
}
