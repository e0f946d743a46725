//! The programs of a real cluster, built as ordinary Go modules under the checksums in `tests/cluster/tools`, into a
//! cache outside the tree (`$KEELWAY_CACHE`, else `~/.cache/keelway`).
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::sh;

/// Sets that a cluster needs.
pub const CLUSTER: &[&str] = &["etcd", "kubernetes", "containerd", "coredns", "cni", "csi"];

/// Upstream's end-to-end suite and the server that it uses.
pub const SUITE: &[&str] = &["e2e"];

/// Before what failed is tried once more.
const PAUSE: Duration = Duration::from_secs(15);

/// What `KUBEBUILDER_ASSETS` may bring ready-made.
const ASSETS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

/// Where the programs are.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("KEELWAY_CACHE") {
        return Ok(PathBuf::from(cache).join("bin"));
    }
    let home =
        std::env::var_os("HOME").context("neither KEELWAY_CACHE nor HOME says where the cluster's programs are")?;
    Ok(PathBuf::from(home).join(".cache/keelway/bin"))
}

/// The workspace's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// The reason why the cluster cannot run here, if there is one: the first program that is not built.
pub fn missing(sets: &[&str]) -> Option<String> {
    let wanted = |set: &&str| programs(set).unwrap_or_default();
    let bin = bin_dir().ok()?;
    let absent = sets.iter().flat_map(wanted).map(|(name, _)| name).find(|name| !bin.join(name).exists());
    absent.map(|name| format!("no {} (`keelway-lab cluster build` builds it)", bin.join(name).display()))
}

/// Builds every program of these sets that is not there whole for the current checksums, saying how long each took. An
/// interrupted build goes on with the program that it was at; a second one waits for the first.
pub fn build(sets: &[&str]) -> Result<()> {
    let bin = bin_dir()?;
    fs::create_dir_all(&bin).with_context(|| bin.display().to_string())?;
    let lock = File::create(bin.join(".lock"))?;
    if lock.try_lock().is_err() {
        println!("wait   for another build in {}", bin.display());
        lock.lock()?;
    }
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    for set in sets {
        let stamp = stamp(set)?;
        for (name, package) in programs(set)? {
            let (target, mark) = (bin.join(&name), bin.join(format!(".{name}.built")));
            if let Ok(marked) = fs::read_to_string(&mark)
                && built(&stamp, &target).is_ok_and(|now| now == marked)
            {
                println!("have   {name}");
                continue;
            }
            let given = assets
                .as_ref()
                .map(|dir| dir.join(&name))
                .filter(|path| ASSETS.contains(&name.as_str()) && path.exists());
            let unfinished = bin.join(format!(".{name}.new"));
            match given {
                Some(path) => {
                    fs::copy(&path, &unfinished)?;
                    println!("copied {name} from {}", path.display());
                }
                None => compile(set, &name, &package, &unfinished)?,
            }
            // On the disk before it has its name, and named before it is marked: whatever ends this, a mark is true.
            File::open(&unfinished)?.sync_all()?;
            fs::rename(&unfinished, &target)?;
            fs::write(&mark, built(&stamp, &target)?)?;
        }
    }
    Ok(())
}

/// What the mark of a program says: the checksums that it was built from, and its size, since a file may be cut.
fn built(stamp: &str, target: &Path) -> io::Result<String> {
    Ok(format!("{stamp} {}\n", fs::metadata(target)?.len()))
}

fn compile(set: &str, name: &str, package: &str, target: &Path) -> Result<()> {
    println!("build  {name} ...");
    let start = Instant::now();
    let mut go = go(set)?;
    // The suite is a test binary; everything else is a program.
    go.args(if name == "e2e.test" { &["test", "-c"][..] } else { &["build"] });
    // What git says about this tree is no part of someone else's program, and git may not be willing to say it.
    go.args(["-buildvcs=false", "-trimpath", "-ldflags", &format!("-s -w {}", version_flags(set)?)]);
    go.arg("-o").arg(target).arg(package);
    // The proxy of modules may be away for a moment.
    if let Err(error) = sh::checked(&mut go) {
        println!("again  {name}, since {error:#}");
        std::thread::sleep(PAUSE);
        sh::checked(&mut go)?;
    }
    println!("built  {name} in {} s", start.elapsed().as_secs());
    Ok(())
}

/// Without a version the API server and the kubelet call themselves v0.0.0 and refuse each other.
fn version_flags(set: &str) -> Result<String> {
    if set != "kubernetes" && set != "e2e" {
        return Ok(String::new());
    }
    let version = sh::checked(go(set)?.args(["list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes"]))?;
    let version = version.trim();
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let at = "-X k8s.io/component-base/version";
    Ok(format!("{at}.gitVersion={version} {at}.gitMajor={major} {at}.gitMinor={minor}"))
}

/// Name and package of each program of a set, as its go.mod names them.
fn programs(set: &str) -> Result<Vec<(String, String)>> {
    let text =
        fs::read_to_string(tools().join(set).join("go.mod")).with_context(|| format!("no set of programs `{set}`"))?;
    let mut found: Vec<(String, String)> =
        tool_lines(&text).map(|package| (program_name(package), package.to_owned())).collect();
    if set == "e2e" {
        found.push(("e2e.test".to_owned(), "k8s.io/kubernetes/test/e2e".to_owned()));
    }
    ensure!(!found.is_empty(), "the go.mod of `{set}` names no tool");
    Ok(found)
}

fn tool_lines(text: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        match (line, inside) {
            ("tool (", _) => inside = true,
            (")", true) => inside = false,
            (package, true) => return Some(package),
            (line, false) => return line.strip_prefix("tool "),
        }
        None
    })
}

fn program_name(package: &str) -> String {
    let last = package.rsplit('/').find(|part| !is_version(part)).unwrap_or(package);
    if package.contains("/etcd/server/") { "etcd".to_owned() } else { last.to_owned() }
}

/// `v3`, as the last part of a module's path.
fn is_version(part: &str) -> bool {
    part.strip_prefix('v').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

fn stamp(set: &str) -> Result<String> {
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"] {
        hash.update(fs::read(tools().join(set).join(file))?);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The directory with upstream's definitions of snapshots, in the module that csi-snapshotter is built from.
pub fn snapshot_definitions() -> Result<PathBuf> {
    let module = "github.com/kubernetes-csi/external-snapshotter/client/v8";
    sh::checked(go("csi")?.args(["mod", "download", module]))?;
    let dir = sh::checked(go("csi")?.args(["list", "-m", "-f", "{{.Dir}}", module]))?;
    Ok(PathBuf::from(dir.trim()).join("config/crd"))
}

fn tools() -> PathBuf {
    root().join("tests/cluster/tools")
}

fn go(set: &str) -> Result<Command> {
    let usual = || Some(PathBuf::from("/usr/local/go/bin/go")).filter(|path| path.is_file());
    let program = sh::system("go").ok().or_else(usual).context("no Go on this machine: `hack/setup cluster`")?;
    let mut command = Command::new(program);
    command.current_dir(tools().join(set)).env("CGO_ENABLED", "0");
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::{program_name, programs};

    #[test]
    fn go_mod_names_the_programs() {
        let names = |set| programs(set).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names("etcd"), ["etcd"]);
        assert_eq!(names("e2e"), ["agnhost", "regression-issue-74839", "e2e.test"]);
        assert!(names("kubernetes").contains(&"kubelet".to_owned()));
        assert_eq!(program_name("github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"), "csi-sanity");
    }
}
