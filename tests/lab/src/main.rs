//! `keelway-lab`: the lab for people, and the small programs that the lab library runs of itself.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use keelway_lab::enter::Enter;
use keelway_lab::{Lab, boot, clean, enter};

#[derive(Parser)]
#[command(about = "A lab of nodes on one machine: for tests, for the demos, and to look around in")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring up nodes to look around in; Ctrl-C removes them.
    Lab {
        /// How many nodes.
        #[arg(default_value_t = 2)]
        nodes: u8,
        /// Without a container runtime and an agent on them.
        #[arg(long)]
        bare: bool,
        /// The lab's name, 1 to 7 letters or digits.
        #[arg(long, default_value = "lab")]
        id: String,
    },
    /// Remove what a crashed run left behind (with --all, running labs too).
    Clean {
        /// Remove every lab, also those in use.
        #[arg(long)]
        all: bool,
    },
    #[command(hide = true)]
    Guard { id: String },
    #[command(hide = true)]
    NodeInit { spec: PathBuf },
    #[command(hide = true)]
    NodePid1 { spec: PathBuf },
    #[command(hide = true)]
    Enter(Enter),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(255)),
        Err(error) => {
            eprintln!("keelway-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Lab { nodes, bare: _, id } => {
            let lab = Lab::named(&id, nodes)?;
            for node in lab.nodes() {
                println!("{}  {}  {}", node.name, node.v4, node.v6);
            }
            loop {
                std::thread::park();
            }
        }
        Command::Clean { all } => {
            for id in clean::leftovers(all)? {
                clean::remove(&id)?;
                println!("removed lab {id}");
            }
        }
        Command::Guard { id } => clean::guard(&id)?,
        Command::NodeInit { spec } => return boot::init(&spec),
        Command::NodePid1 { spec } => boot::pid1(&spec)?,
        Command::Enter(wanted) => return enter::enter(&wanted),
    }
    Ok(0)
}
