//! `keelway-memory-api MANIFESTS DIRECTORY`: an API server of the objects in one YAML file, for guests that have room for no real one
//! (see `keelway_lab::memory_api`). Writes DIRECTORY/memory-api.conf for its clients and runs until it is killed.
use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use keelway_lab::memory_api::MemoryApi;
use serde::Deserialize;
use serde_json::Value;

#[derive(Parser)]
#[command(about = "An API server that lists and watches the objects of one file")]
struct Cli {
    manifests: PathBuf,
    directory: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let text = std::fs::read_to_string(&cli.manifests).with_context(|| cli.manifests.display().to_string())?;
    let objects = serde_norway::Deserializer::from_str(&text).map(Value::deserialize);
    let objects = objects.collect::<Result<Vec<_>, _>>().with_context(|| cli.manifests.display().to_string())?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let api = MemoryApi::serve(listener, address)?;
    api.put(objects)?;
    api.kubeconfig(&cli.directory)?;
    loop {
        std::thread::park();
    }
}
