//! `keelway-agent install-cni`: the CNI plugin and its configuration, put on the node whole or not at all.
//!
//! A container runtime takes the first configuration by name. One that sorts before ours would win, so that is refused;
//! one that sorts after ours never gets a pod, and is only named: its owner may still run on the node.

use std::path::{Path, PathBuf};

use keelway_cni::install::{
    BINARY_FILE, CONFLIST_FILE, Conflist, Loopback, install_binary, install_conflist, install_loopback,
};
use keelway_cni::pending;

use crate::config::{ConfigError, InstallCniArgs, PluginConfig};

/// The plugin is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Another plugin would win.
    #[error(
        "--conf-dir {dir}: {files} sort before {CONFLIST_FILE}, so the container runtime would use them: remove them, or \
         say --allow-foreign-cni"
    )]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The files, with the networks that they name.
        files: String,
    },
    /// Our file's name is another's.
    #[error(
        "--conf-dir {dir}: {CONFLIST_FILE} is another plugin's ({owner}): remove it, or say --allow-foreign-cni to replace it"
    )]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// What is known of it.
        owner: String,
    },
    /// The system refused.
    #[error("{what} {path}: {source}")]
    System {
        /// The setting or step.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What was installed, and what else is there.
#[derive(Debug, PartialEq, Eq)]
pub struct Installed {
    /// The plugin.
    pub binary: PathBuf,
    /// The configuration.
    pub conflist: PathBuf,
    /// Whose `loopback` is beside it.
    pub loopback: Loopback,
    /// Other plugins' configurations, by file name, with what to know of each.
    pub foreign: Vec<String>,
}

/// Installs, and says on standard output what it did.
///
/// # Errors
/// An [`InstallError`]; nothing is half installed then.
pub fn install(args: &InstallCniArgs) -> anyhow::Result<()> {
    let installed = perform(args)?;
    println!("installed {} and {}", installed.binary.display(), installed.conflist.display());
    match installed.loopback {
        Loopback::Installed => {
            println!("installed loopback beside it, for runtimes that do not bring up lo themselves")
        }
        Loopback::Foreign => println!("left the loopback that is there alone"),
    }
    for foreign in installed.foreign {
        println!("also in {}: {foreign}", args.conf_dir.display());
    }
    Ok(())
}

/// Installs the plugin first, then the configuration that names it.
///
/// # Errors
/// The first step that failed; those after it are not tried.
pub fn perform(args: &InstallCniArgs) -> Result<Installed, InstallError> {
    let agent = PluginConfig::load(args)?;
    let (mut before, after) = foreign(&args.conf_dir)?;
    if let Some(owner) = foreign_owner(&args.conf_dir) {
        if !args.allow_foreign_cni {
            return Err(InstallError::Taken { dir: args.conf_dir.clone(), owner });
        }
        before.push(format!("{CONFLIST_FILE} ({owner}), which was replaced,"));
    }
    if !before.is_empty() && !args.allow_foreign_cni {
        return Err(InstallError::Foreign { dir: args.conf_dir.clone(), files: before.join(", ") });
    }
    let from = match &args.from {
        Some(from) => from.clone(),
        None => std::env::current_exe()
            .map(|own| own.with_file_name(BINARY_FILE))
            .map_err(|source| InstallError::System { what: "finding", path: BINARY_FILE.into(), source })?,
    };
    // Asked for on its own, so that the error names the file that is missing and not the one to be written.
    std::fs::metadata(&from).map_err(|source| InstallError::System { what: "--from", path: from.clone(), source })?;
    let refused = |source| InstallError::System { what: "--bin-dir", path: args.bin_dir.clone(), source };
    // First, while the old plugin shows whether the loopback beside it is its copy.
    let loopback = install_loopback(&from, &args.bin_dir).map_err(refused)?;
    let binary = install_binary(&from, &args.bin_dir).map_err(refused)?;
    let conflist = Conflist {
        socket: Some(agent.run_dir.join("agent.sock")),
        state_dir: Some(agent.state_dir.join(pending::DIRECTORY)),
        status_grace_seconds: Some(agent.status_grace.as_secs()),
        ..Conflist::default()
    };
    let conflist = install_conflist(&args.conf_dir, &conflist).map_err(|source| InstallError::System {
        what: "--conf-dir",
        path: args.conf_dir.clone(),
        source,
    })?;
    let wins = before.into_iter().map(|file| format!("{file} sorts before ours and is what the runtime uses"));
    let loses = after.into_iter().map(|file| format!("{file} is not used while ours is there"));
    Ok(Installed { binary, conflist, loopback, foreign: wins.chain(loses).collect() })
}

/// Other configurations that a runtime would read, sorted: those before ours, and those after.
pub(crate) fn foreign(dir: &Path) -> Result<(Vec<String>, Vec<String>), InstallError> {
    let wrong = |source| InstallError::System { what: "--conf-dir", path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        entries => entries.map_err(wrong)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(wrong)?.file_name().into_string().ok());
    }
    names.retain(|name| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        matches!(ending, Some("conf" | "conflist" | "json")) && name != CONFLIST_FILE
    });
    names.sort();
    let split = names.partition_point(|name| name.as_str() < CONFLIST_FILE);
    let mut shown: Vec<String> = names.iter().map(|name| with_network(dir, name)).collect();
    let after = shown.split_off(split);
    Ok((shown, after))
}

/// The network and plugins of a file that has our name and is not ours; what does not read as a configuration is nobody's.
pub(crate) fn foreign_owner(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join(CONFLIST_FILE)).ok()?;
    let list: serde_json::Value = serde_json::from_str(&text).ok()?;
    let plugins: Vec<&str> = list["plugins"].as_array()?.iter().filter_map(|plugin| plugin["type"].as_str()).collect();
    let network = list["name"].as_str().unwrap_or_default();
    (!plugins.contains(&BINARY_FILE)).then(|| format!("network {network:?}, plugins {}", plugins.join(", ")))
}

/// The file's name, with the network that it names.
fn with_network(dir: &Path, file: &str) -> String {
    let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    match value.get("name").and_then(serde_json::Value::as_str) {
        Some(network) => format!("{file} (network {network:?})"),
        None => file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::Text;

    fn args(dir: &Path) -> InstallCniArgs {
        std::fs::write(dir.join("plugin"), "binary").unwrap();
        std::fs::write(dir.join("agent.yaml"), "status-grace: 90s\nrun-dir: /run/other\nmtu: 1400\n").unwrap();
        InstallCniArgs {
            bin_dir: dir.join("bin"),
            conf_dir: dir.join("net.d"),
            from: Some(dir.join("plugin")),
            config: Some(dir.join("agent.yaml")),
            run_dir: Some(Text("/run/kw".to_owned())),
            state_dir: None,
            status_grace: None,
            allow_foreign_cni: false,
        }
    }

    #[test]
    fn installs_twice_over() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path());
        for _ in 0..2 {
            let installed = perform(&args).unwrap();
            assert_eq!(installed.foreign, Vec::<String>::new());
            assert_eq!(std::fs::metadata(&installed.binary).unwrap().permissions().mode() & 0o777, 0o755);
            let text = std::fs::read_to_string(installed.conflist).unwrap();
            let list: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(list["cniVersion"], "1.0.0");
            let plugin = &list["plugins"][0];
            assert_eq!((&plugin["type"], &plugin["socket"]), (&"keelway-cni".into(), &"/run/kw/agent.sock".into()));
            assert_eq!(plugin["statusGraceSeconds"], 90);
        }
        let left: Vec<_> = std::fs::read_dir(&args.conf_dir).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file stays: {left:?}");
    }

    #[test]
    fn a_configuration_that_would_win_is_refused_and_one_that_would_lose_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut args = args(dir.path());
        std::fs::create_dir(&args.conf_dir).unwrap();
        std::fs::write(args.conf_dir.join("10-other.conflist"), r#"{"name": "other"}"#).unwrap();
        std::fs::write(args.conf_dir.join("00-readme.txt"), "").unwrap();
        let installed = perform(&args).unwrap();
        assert_eq!(installed.foreign, [r#"10-other.conflist (network "other") is not used while ours is there"#]);
        std::fs::remove_file(&installed.conflist).unwrap();
        std::fs::write(args.conf_dir.join("00-first.conf"), r#"{"name": "first"}"#).unwrap();
        let refused = perform(&args).unwrap_err().to_string();
        assert!(refused.contains(r#"00-first.conf (network "first") sort before"#), "{refused}");
        assert!(!installed.conflist.exists());
        args.allow_foreign_cni = true;
        assert_eq!(perform(&args).unwrap().foreign.len(), 2);
    }

    #[test]
    fn a_missing_plugin_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let args = InstallCniArgs { from: Some(dir.path().join("none")), ..args(dir.path()) };
        let error = perform(&args).unwrap_err().to_string();
        assert!(error.starts_with("--from ") && error.contains("none: No such file"), "{error}");
        assert!(!args.conf_dir.exists());
    }
}
