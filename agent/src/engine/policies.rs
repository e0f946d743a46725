//! Policies: the model, the numbers that it keeps on disk, and the writes.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::PathBuf;

use keelway_cni::install::write_atomically;
use keelway_layout::{Identity, maps};
use keelway_maps::{Datapath, Table as _, TableError, Tables};
use keelway_policy as policy;

use super::endpoints::Endpoints;
use super::{EngineError, Settings, convert};

/// The list of numbers is written anew when it has grown to this many lines and to twice what is needed.
const COMPACT_ABOVE: usize = 8192;

pub struct Policies {
    pub model: policy::Model,
    numbers: Numbers,
    /// What did not fit.
    pub errors: Vec<String>,
}

/// The numbers given to identities and rules, on disk so that a restart goes on with them.
struct Numbers {
    path: PathBuf,
    lines: usize,
}

impl Numbers {
    fn read(&mut self) -> std::io::Result<String> {
        let mut text = String::new();
        match File::open(&self.path) {
            Ok(mut file) => file.read_to_string(&mut text)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        // A crash may have cut the last line short; it was not acted on then.
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        if complete != text.len() {
            text.truncate(complete);
            write_atomically(&self.path, text.as_bytes(), 0o600)?;
        }
        self.lines = text.lines().count();
        Ok(text)
    }

    fn append(&mut self, lines: &[String]) -> std::io::Result<()> {
        let mut text = lines.join("\n");
        text.push('\n');
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        self.lines += lines.len();
        Ok(())
    }

    fn rewrite(&mut self, lines: &[String]) -> std::io::Result<()> {
        let mut text = lines.join("\n");
        text.push('\n');
        write_atomically(&self.path, text.as_bytes(), 0o600)?;
        self.lines = lines.len();
        Ok(())
    }
}

const fn config(settings: &Settings) -> policy::Config {
    policy::Config {
        limits: policy::Limits {
            identities: maps::MAX_IDENTITIES as usize,
            rules: maps::MAX_RULES as usize,
            cidrs: maps::MAX_CIDRS as usize,
        },
        implied_namespaces: settings.implied_namespaces,
    }
}

fn dump(tables: &Tables) -> Result<policy::Dump, TableError> {
    Ok(policy::Dump {
        identities: tables
            .identities
            .dump()?
            .into_iter()
            .filter_map(|(key, value)| Some((convert::net(key.addr(), key.prefix_len())?, value.id)))
            .collect(),
        rules: tables
            .rules
            .dump()?
            .into_iter()
            .filter_map(|(key, rule)| Some((convert::from_rule_key(&key)?, rule)))
            .collect(),
        cidrs: tables
            .cidrs
            .dump()?
            .into_iter()
            .filter_map(|(key, peer)| Some((convert::from_cidr_key(&key)?, peer)))
            .collect(),
        endpoints: Vec::new(),
    })
}

impl Policies {
    pub fn open(settings: &Settings, tables: &Tables) -> anyhow::Result<Self> {
        let path = settings.state_dir.join("policy-numbers");
        let mut numbers = Numbers { path, lines: 0 };
        let text = numbers.read()?;
        let dump = dump(tables)?;
        let model = policy::Model::restore(config(settings), text.lines(), &dump)
            .map_err(|error| anyhow::anyhow!("{}: {error}", numbers.path.display()))?;
        Ok(Self { model, numbers, errors: Vec::new() })
    }

    /// Reads the maps back into the model's mirror, keeping its objects.
    pub fn restore(&mut self, tables: &Tables) -> Result<(), EngineError> {
        self.model.resync(&dump(tables).map_err(|error| EngineError::Kernel(error.to_string()))?);
        Ok(())
    }

    /// Writes what changed.
    pub fn apply(&mut self, datapath: &mut Datapath, endpoints: &mut Endpoints) -> Result<(), EngineError> {
        let changes = self.model.take_changes();
        self.errors = changes.errors.iter().map(ToString::to_string).collect();
        if !changes.numbers.is_empty() {
            self.persist(&changes.numbers)?;
        }
        for op in changes.ops {
            execute(datapath, endpoints, op).map_err(|error| EngineError::Kernel(error.to_string()))?;
        }
        Ok(())
    }

    fn persist(&mut self, lines: &[String]) -> Result<(), EngineError> {
        let path = self.numbers.path.clone();
        let failed = |error: std::io::Error| EngineError::Kernel(format!("{}: {error}", path.display()));
        self.numbers.append(lines).map_err(failed)?;
        if self.numbers.lines > COMPACT_ABOVE {
            let all = self.model.numbers();
            if self.numbers.lines > 2 * all.len() {
                self.numbers.rewrite(&all).map_err(failed)?;
            }
        }
        Ok(())
    }
}

fn execute(datapath: &mut Datapath, endpoints: &mut Endpoints, op: policy::Op) -> Result<(), TableError> {
    use policy::Op;
    let tables = &mut datapath.tables;
    match op {
        Op::PutRule { key, rule } => tables.rules.put(&convert::rule_key(&key), &rule),
        Op::DeleteRule { key } => tables.rules.delete(&convert::rule_key(&key)),
        Op::PutCidr { key, peer } => tables.cidrs.put(&convert::cidr_key(&key), &peer),
        Op::DeleteCidr { key } => tables.cidrs.delete(&convert::cidr_key(&key)),
        Op::PutIdentity { prefix, identity } => {
            tables.identities.put(&convert::prefix(prefix), &Identity { id: identity, flags: 0 })
        }
        Op::DeleteIdentity { prefix } => tables.identities.delete(&convert::prefix(prefix)),
        Op::PutEndpoint(policy) => endpoints.set_policy(policy, tables),
        Op::DeleteEndpoint { uid } => {
            endpoints.forget_policy(&uid);
            Ok(())
        }
        Op::Bump(policy::Scope::All) => tables.bump_epoch(),
        Op::Bump(policy::Scope::Subject(subject)) => endpoints.bump(subject, tables),
    }
}
