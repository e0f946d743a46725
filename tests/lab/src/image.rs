//! Image archives from local files, for `ctr images import`: no registry is needed.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::sh;

/// What glibc loads by name when a program in the image resolves host names.
const NAME_SERVICES: [&str; 4] = ["/etc/nsswitch.conf", "libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"];

/// An image being put together; programs bring the shared libraries that they need.
#[derive(Debug)]
pub struct Image {
    reference: String,
    entrypoint: Vec<String>,
    arguments: Vec<String>,
    files: BTreeMap<PathBuf, Content>,
}

#[derive(Debug)]
enum Content {
    File(PathBuf),
    Text(String),
    Link(String),
    Directory(u32),
}

impl Image {
    /// An image with the usual empty directories.
    pub fn new(reference: &str, entrypoint: &[&str]) -> Self {
        let mut files = BTreeMap::new();
        for name in ["dev", "etc", "proc", "run", "sys", "var"] {
            files.insert(PathBuf::from(name), Content::Directory(0o755));
        }
        files.insert(PathBuf::from("tmp"), Content::Directory(0o1777));
        Self {
            reference: reference.to_owned(),
            entrypoint: entrypoint.iter().map(|&word| word.to_owned()).collect(),
            arguments: Vec::new(),
            files,
        }
    }

    /// What the entry point is given by who gives it nothing.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Adds a program or another file, and the libraries that it is linked to.
    pub fn file(mut self, source: &Path, target: &str) -> Result<Self> {
        // Not a dynamic program: ldd says so with an exit status other than 0.
        let ldd = Command::new("ldd").arg(source).output().context("running ldd")?;
        let text = String::from_utf8_lossy(&ldd.stdout).into_owned();
        let libraries: Vec<&str> =
            text.split_whitespace().filter(|word| ldd.status.success() && word.starts_with('/')).collect();
        for library in &libraries {
            self.put(library, Content::File(PathBuf::from(library)));
        }
        if let Some(libc) = libraries.iter().find(|library| library.contains("/libc.so")) {
            for name in NAME_SERVICES {
                let path = Path::new(libc).with_file_name("").join(name);
                if path.exists() {
                    self.put(&path.to_string_lossy(), Content::File(path.clone()));
                }
            }
        }
        self.put(target, Content::File(source.to_owned()));
        Ok(self)
    }

    /// Adds a small text file.
    #[must_use]
    pub fn text(mut self, target: &str, text: &str) -> Self {
        self.put(target, Content::Text(text.to_owned()));
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(mut self, to: &str, target: &str) -> Self {
        self.put(target, Content::Link(to.to_owned()));
        self
    }

    /// Adds busybox under the names of its applets, but for those in `except`.
    pub fn busybox(mut self, except: &[&str]) -> Result<Self> {
        let busybox = sh::system("busybox")?;
        for applet in sh::run(&[busybox.as_os_str(), "--list".as_ref()])?.split_whitespace() {
            if applet != "busybox" && !except.contains(&applet) {
                self = self.link("/bin/busybox", &format!("/bin/{applet}"));
            }
        }
        self.file(&busybox, "/bin/busybox")
    }

    fn put(&mut self, target: &str, content: Content) {
        self.files.insert(PathBuf::from(target.trim_start_matches('/')), content);
    }

    /// Writes the archive (docker-archive form, one layer).
    pub fn write(&self, out: &Path) -> Result<()> {
        let layer = self.layer()?;
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Cmd": self.arguments,
                "Env": ["PATH=/:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))]},
        });
        let config = serde_json::to_vec(&config)?;
        let name = format!("{}.json", hex(&config));
        let manifest = json!([{"Config": name, "RepoTags": [self.reference], "Layers": ["layer.tar"]}]);
        let file = File::create(out).with_context(|| format!("creating {}", out.display()))?;
        let mut archive = Builder::new(file);
        append(&mut archive, &name, 0o644, &config)?;
        append(&mut archive, "layer.tar", 0o644, &layer)?;
        append(&mut archive, "manifest.json", 0o644, &serde_json::to_vec(&manifest)?)?;
        archive.finish()?;
        Ok(())
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        for (path, content) in &self.files {
            let mut header = Header::new_gnu();
            match content {
                Content::File(source) => {
                    let mut data = Vec::new();
                    File::open(source)
                        .with_context(|| format!("opening {}", source.display()))?
                        .read_to_end(&mut data)?;
                    append(&mut archive, &path.to_string_lossy(), 0o755, &data)?;
                }
                Content::Text(text) => append(&mut archive, &path.to_string_lossy(), 0o644, text.as_bytes())?,
                Content::Link(to) => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_size(0);
                    header.set_mode(0o777);
                    archive.append_link(&mut header, path, to)?;
                }
                Content::Directory(mode) => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_size(0);
                    header.set_mode(*mode);
                    archive.append_data(&mut header, path, std::io::empty())?;
                }
            }
        }
        Ok(archive.into_inner()?)
    }
}

fn append<W: std::io::Write>(archive: &mut Builder<W>, path: &str, mode: u32, data: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, data).with_context(|| format!("adding {path}"))
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}
