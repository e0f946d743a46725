//! `keelway-probe`: the server and the clients that run in the lab's pods (see `keelway_lab::probe`).
use clap::Parser;
use keelway_lab::probe::{Probe, run};

#[derive(Parser)]
#[command(about = "A server that says who it is, and clients that count what they see")]
struct Cli {
    #[command(subcommand)]
    probe: Probe,
}

fn main() -> anyhow::Result<()> {
    run(&Cli::parse().probe)
}
