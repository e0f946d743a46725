//! keelway-agent: see the library.

use std::io::IsTerminal as _;

use clap::Parser as _;
use keelway_agent::config::{Cli, Command, Config, Host};
use keelway_agent::{cleanup, run};
use tracing_subscriber::EnvFilter;

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("KEELWAY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Colours are for people; logs that are kept have none.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    match act(cli) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keelway-agent: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn act(cli: Cli) -> anyhow::Result<()> {
    match cli.command.unwrap_or_else(|| Command::Run(Box::new(cli.flags))) {
        Command::Run(flags) => {
            let config = Config::load(&flags, &Host::read())?;
            share_one_heap();
            runtime()?.block_on(run::run(config))
        }
        Command::Cleanup(args) if args.kube_proxy => runtime()?.block_on(cleanup::kube_proxy::remove(args.force)),
        Command::Cleanup(args) => {
            let config = Config::load(&args.flags, &Host::read())?;
            runtime()?.block_on(cleanup::cleanup(&config))
        }
        Command::InstallCni(args) => keelway_agent::install::install(&args),
        Command::Version => {
            println!("keelway-agent {} (layout {})", env!("CARGO_PKG_VERSION"), keelway_layout::LAYOUT_VERSION);
            Ok(())
        }
    }
}

/// Has all threads allocate from one heap. Objects are read on one thread and kept by another, so that a heap for each
/// keeps holes that nobody else can use: a tenth of the memory of a node with 100,000 endpoints.
fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two numbers and may be called at any time; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}
