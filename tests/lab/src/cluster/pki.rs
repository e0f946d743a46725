//! Keys, certificates and kubeconfigs of a cluster, made by openssl in the lab's scratch folder.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::sh::run;

/// A cluster's certificate authority and what it signed.
#[derive(Clone, Debug)]
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// The one in `dir`, which may have to be made yet.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Makes the authority and the key that signs service account tokens.
    pub fn make(&self) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        let (key, certificate) = (self.key("ca"), self.certificate("ca"));
        run(&[
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            &key,
            "-out",
            &certificate,
            "-days",
            "3650",
            "-subj",
            "/CN=lab",
        ])?;
        run(&["openssl", "genrsa", "-out", &self.key("sa"), "2048"])?;
        run(&["openssl", "rsa", "-in", &self.key("sa"), "-pubout", "-out", &self.file("sa.pub")])?;
        Ok(())
    }

    /// Signs a certificate for a subject such as `/O=system:masters/CN=admin`, with alternative names such as
    /// `IP:127.0.0.1,DNS:localhost`.
    pub fn sign(&self, name: &str, subject: &str, alternative: &str) -> Result<()> {
        let (key, request, certificate) = (self.key(name), self.file(&format!("{name}.csr")), self.certificate(name));
        run(&["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", &key, "-out", &request, "-subj", subject])?;
        let extensions = self.file(&format!("{name}.ext"));
        fs::write(&extensions, format!("subjectAltName={alternative}\nextendedKeyUsage=serverAuth,clientAuth\n"))?;
        let (ca, ca_key) = (self.certificate("ca"), self.key("ca"));
        // Without a file of serial numbers each is drawn at random: nodes get theirs at the same time.
        run(&[
            "openssl",
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-days",
            "3650",
            "-extfile",
            &extensions,
            "-out",
            &certificate,
        ])?;
        Ok(())
    }

    /// A kubeconfig for the API server at `server` with this certificate.
    pub fn kubeconfig(&self, name: &str, server: &str) -> Result<PathBuf> {
        let user = serde_json::json!({"client-certificate": self.certificate(name), "client-key": self.key(name)});
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority": self.certificate("ca")}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
            "current-context": "lab",
        });
        let path = self.dir.join(format!("{name}.conf"));
        fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Path of a key.
    pub fn key(&self, name: &str) -> String {
        self.file(&format!("{name}.key"))
    }

    /// Path of a certificate.
    pub fn certificate(&self, name: &str) -> String {
        self.file(&format!("{name}.crt"))
    }

    /// Path of another file.
    pub fn file(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }
}
