//! Images of a cluster, made from local programs under the names that manifests and upstream's suite ask for.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::containerd::basic_images;
use crate::image::Image;
use crate::sh;

/// CoreDNS.
pub const COREDNS: &str = "registry.k8s.io/coredns/coredns:v1.15.0";
/// Upstream's programs beside a CSI driver, with the tags that deploy/ names.
const SIDECARS: [(&str, &str); 4] = [
    ("csi-provisioner", "v6.3.0"),
    ("csi-resizer", "v2.2.0"),
    ("csi-snapshotter", "v8.6.0"),
    ("snapshot-controller", "v8.6.0"),
];
const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1";
const DNS_TESTING: &str = "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0";
/// Asked for by specs that only run a script in it.
const NGINX: &str = "registry.k8s.io/e2e-test-images/nginx:1.15-4";
const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";
/// A server that sends its clients segments from outside of their windows.
const STRAY: &str = "regression-issue-74839";

/// Writes an archive for each image whose programs are there: those of [`basic_images`], CoreDNS, the CSI sidecars
/// and, with the suite's agnhost built, what the suite asks for.
pub fn write(bin: &Path, dir: &Path) -> Result<Vec<PathBuf>> {
    let mut archives = basic_images(dir)?;
    let mut add = |name: &str, image: Image| -> Result<()> {
        let path = dir.join(format!("{name}.tar"));
        image.write(&path)?;
        archives.push(path);
        Ok(())
    };
    if bin.join("coredns").exists() {
        add("coredns", Image::new(COREDNS, &["/coredns"]).file(&bin.join("coredns"), "/coredns")?)?;
    }
    if bin.join("agnhost").exists() {
        // Scripts of specs count by `let`, which dash does not know.
        let bash = sh::system("bash")?;
        add("busybox", tools(Image::new(BUSYBOX, &["/bin/sh"]))?.file(&bash, "/bin/sh")?)?;
        add("nginx", tools(Image::new(NGINX, &["/bin/sh"]))?)?;
        add("glibc-dns-testing", tools(Image::new(DNS_TESTING, &["/bin/sh"]))?)?;
        // agnhost serves TLS with a key pair that it expects in its working directory.
        let (key, certificate) = (dir.join("localhost.key"), dir.join("localhost.crt"));
        let (key_path, certificate_path) = (key.to_string_lossy(), certificate.to_string_lossy());
        sh::run(&[
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "3650",
            "-subj",
            "/CN=localhost",
            "-keyout",
            &key_path,
            "-out",
            &certificate_path,
        ])?;
        let image =
            tools(Image::new(AGNHOST, &["/agnhost"]).arguments(&["pause"]))?.file(&bin.join("agnhost"), "/agnhost")?;
        // With a server for names of a spec's own.
        let image = image.file(&bin.join("coredns"), "/coredns")?;
        let image = image
            .text("/localhost.key", &fs::read_to_string(&key)?)
            .text("/localhost.crt", &fs::read_to_string(&certificate)?);
        add("agnhost", image)?;
    }
    if bin.join(STRAY).exists() {
        let (name, program) = (format!("registry.k8s.io/e2e-test-images/{STRAY}:1.4"), format!("/{STRAY}"));
        add(STRAY, Image::new(&name, &[&program]).file(&bin.join(STRAY), &program)?)?;
    }
    for (name, tag) in SIDECARS.into_iter().filter(|(name, _)| bin.join(name).exists()) {
        let (reference, target) = (format!("registry.k8s.io/sig-storage/{name}:{tag}"), format!("/{name}"));
        add(name, Image::new(&reference, &[&target]).file(&bin.join(name), &target)?)?;
    }
    Ok(archives)
}

/// What the suite's scripts run in its images.
fn tools(image: Image) -> Result<Image> {
    // busybox's own shell would run its own nc whatever stands in /bin; a static wget of glibc's falls over itself.
    let image = image
        .busybox(&["sh", "ash", "nc", "dd", "wget"])?
        .file(&sh::system("dash")?, "/bin/sh")?
        .file(&sh::system("nc.openbsd")?, "/bin/nc")?;
    // As busybox's, it is to give up at once.
    let image = image.text("/etc/wgetrc", "tries = 1\n");
    ["curl", "dd", "dig", "socat", "getent", "wget"]
        .iter()
        .try_fold(image, |image, name| image.file(&sh::system(name)?, &format!("/usr/bin/{name}")))
}
