//! `keelway-cni`: the plugin that a container runtime runs. Thin: it checks the call, asks the agent, prints the answer.
//! Under the name `loopback` it is another plugin, which sets a pod's `lo` up and asks nobody.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use keelway_cni::spec::{CniError, Env, Request, Version, code};
use keelway_cni::{command, loopback};

/// No configuration is longer; what is, is not one.
const STDIN_MAX: u64 = 4 << 20;

fn main() -> ExitCode {
    // A runtime parses stdout: even a bug of ours has to be an error in its terms.
    std::panic::set_hook(Box::new(|panic| {
        let error = CniError::new(code::AGENT, "keelway-cni panicked; please report it").details(panic.to_string());
        print(&error.render(None));
        std::process::exit(1);
    }));
    let (result, version) = run();
    match result {
        Ok(text) => {
            if !text.is_empty() {
                print(&text);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            print(&error.render(version));
            ExitCode::FAILURE
        }
    }
}

fn run() -> (Result<String, CniError>, Option<Version>) {
    let env = Env::read(|name| std::env::var(name).ok());
    let mut stdin = Vec::new();
    if let Err(e) = std::io::stdin().lock().take(STDIN_MAX).read_to_end(&mut stdin) {
        return (Err(CniError::new(code::IO_FAILURE, "read stdin").details(e.to_string())), None);
    }
    let request = match Request::parse(&env, &stdin) {
        Ok(request) => request,
        Err((error, version)) => return (Err(error), version),
    };
    let version = request.version();
    let program = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    if loopback::is_meant(&program, &request) {
        return (loopback::run(&request, &env.netns), version);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(command::run(request)),
        Err(e) => Err(CniError::new(code::IO_FAILURE, "start the runtime").details(e.to_string())),
    };
    (result, version)
}

fn print(text: &str) {
    // Nobody is left to tell when stdout is closed.
    let _ = writeln!(std::io::stdout(), "{text}");
}
