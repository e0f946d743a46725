//! Asks the running kernel's verifier about every program of a BPF object: `keelway-kernel-load OBJECT BPFFS`.
//!
//! Prints a line for each program: `ok NAME INSTRUCTIONS MILLISECONDS` with what the verifier walked, or
//! `refused NAME REASON` followed by the end of the verifier's log. Maps are pinned in the directory BPFFS, which has to
//! exist, and are the caller's to remove. Exit status: 0 when every program was accepted, 1 when one was refused, 2 when
//! the object could not be read or its maps not be made.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use aya::programs::{Program, ProgramError};
use aya::{EbpfLoader, VerifierLogLevel};

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            println!("error {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Loads every program once; the number that the verifier refused.
fn run() -> anyhow::Result<usize> {
    let mut args = std::env::args_os().skip(1);
    let (Some(object), Some(bpffs), None) = (args.next(), args.next(), args.next()) else {
        bail!("usage: keelway-kernel-load OBJECT BPFFS");
    };
    let bytes = std::fs::read(&object).with_context(|| format!("reading {}", object.display()))?;
    let mut loaded = EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .default_map_pin_directory(&bpffs)
        .load(&bytes)
        .with_context(|| format!("making the maps of {}", object.display()))?;
    let mut refused = 0;
    let mut count = 0;
    let mut programs: Vec<_> = loaded.programs_mut().map(|(name, program)| (name.to_owned(), program)).collect();
    programs.sort_by(|left, right| left.0.cmp(&right.0));
    for (name, program) in programs {
        let started = Instant::now();
        count += 1;
        match load(program) {
            Ok(()) => {
                // Kernels before 5.16 do not say what they walked.
                let walked = program.info().ok().and_then(|info| info.verified_instruction_count());
                let walked = walked.map_or_else(|| "-".to_owned(), |count| count.to_string());
                println!("ok {name} {walked} {}", started.elapsed().as_millis());
            }
            Err(error) => {
                refused += 1;
                println!("refused {name} {}", explain(&error));
            }
        }
    }
    if count == 0 {
        bail!("{} holds no program", object.display());
    }
    Ok(refused)
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::Xdp(program) => program.load(),
        // Each hook that the project uses is listed above; a new one has to be added, not passed over.
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The error with the last lines of the verifier's log, where the reason stands.
fn explain(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return error.to_string() };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().collect();
    format!("{io_error}\n{}", lines[lines.len().saturating_sub(12)..].join("\n"))
}
