//! Two things measured in turn, in short blocks, by one process: what disturbs the machine disturbs both.
//!
//! A socket stays in the network namespace in which it was made, so that one process can have sockets in several.
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

use crate::cgroup;

const PATIENCE: Duration = Duration::from_secs(2);

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Timed {
    /// connect(2), each time a new connection.
    Connect,
    /// A line and its answer, over one connection.
    Answer,
    /// A new connection from its first packet to its end, with a line and its answer on it; a block's mean.
    Whole,
}

/// Our way and the peer's.
#[derive(Args, Debug)]
pub struct Turns {
    /// What is timed.
    #[arg(value_enum)]
    pub timed: Timed,
    /// Address and port of each; ours first.
    #[arg(long, num_args = 2, required = true)]
    pub targets: Vec<SocketAddr>,
    /// Files of the network namespaces to dial from; ours first.
    #[arg(long, num_args = 2, required = true)]
    pub netns: Vec<PathBuf>,
    /// Cgroups to be in while dialling; ours first. Socket hooks of others' cgroups do not apply then.
    #[arg(long, num_args = 2)]
    pub cgroups: Vec<String>,
    /// Blocks of each.
    #[arg(long, default_value_t = 100)]
    pub rounds: usize,
    /// Operations of a block, by each of those at once.
    #[arg(long, default_value_t = 50)]
    pub block: usize,
    /// How many dial at once, each from a thread of its own.
    #[arg(long, default_value_t = 1)]
    pub at_once: usize,
    /// CPU to stay on.
    #[arg(long, default_value_t = 0)]
    pub cpu: usize,
}

impl Turns {
    /// Prints the median of each block in nanoseconds, ours and the peer's in pairs.
    ///
    /// # Errors
    /// The first connection or answer that failed.
    pub fn run(&self) -> Result<()> {
        stay(Pid::from_raw(0), self.cpu)?;
        let netns: Vec<File> = self.netns.iter().map(File::open).collect::<Result<_, _>>()?;
        if self.timed != Timed::Answer {
            for which in 0..2 {
                self.enter(&netns, which)?;
                free_ports_soon()?;
            }
        }
        let mut standing = Vec::new();
        if self.timed == Timed::Answer {
            for (which, target) in self.targets.iter().enumerate() {
                self.enter(&netns, which)?;
                standing.push(dial(*target)?.0);
            }
        }
        let mut blocks = Vec::new();
        // One round more, to warm up, which is not counted.
        for round in 0..=self.rounds {
            let mut pair = [0; 2];
            for turn in 0..2 {
                // Who comes first changes from round to round.
                let which = (round + turn) % 2;
                self.enter(&netns, which)?;
                let start = Instant::now();
                let mut times = match self.timed {
                    Timed::Answer => repeat(self.block, || answer(&mut standing[which]))?,
                    Timed::Connect | Timed::Whole => self.dial_at_once(self.targets[which])?,
                };
                let mean = start.elapsed() / u32::try_from(times.len())?;
                times.sort_unstable();
                let taken = if self.timed == Timed::Whole { mean } else { times[times.len() / 2] };
                pair[which] = u64::try_from(taken.as_nanos())?;
            }
            if round > 0 {
                blocks.push(pair);
            }
        }
        println!("{}", serde_json::to_string(&blocks)?);
        Ok(())
    }
}

impl Turns {
    fn enter(&self, netns: &[File], which: usize) -> Result<()> {
        if let Some(group) = self.cgroups.get(which) {
            cgroup::join(group)?;
        }
        Ok(setns(&netns[which], CloneFlags::CLONE_NEWNET)?)
    }

    /// How long connect(2) took, of a block of connections. Threads start on the CPU and in the namespace of who starts them.
    fn dial_at_once(&self, target: SocketAddr) -> Result<Vec<Duration>> {
        let block = || {
            repeat(self.block, || {
                let (mut connection, took) = dial(target)?;
                // The server has taken it from its queue, and both ends are done when the next one begins.
                answer(&mut connection)?;
                Ok(took)
            })
        };
        if self.at_once == 1 {
            return block();
        }
        let blocks = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.at_once).map(|_| scope.spawn(block)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread that dials")).collect::<Result<Vec<_>>>()
        });
        Ok(blocks?.concat())
    }
}

/// Lets the namespace that this thread is in use a port again a second after its connection: a search for one that is free among
/// tens of thousands would be what is timed.
fn free_ports_soon() -> Result<()> {
    for (name, value) in [("tcp_tw_reuse", "1"), ("ip_local_port_range", "1024 65535")] {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::write(&path, value).with_context(|| format!("writing {value} to {path}"))?;
    }
    Ok(())
}

fn repeat(times: usize, mut operation: impl FnMut() -> Result<Duration>) -> Result<Vec<Duration>> {
    (0..times).map(|_| operation()).collect()
}

fn dial(target: SocketAddr) -> Result<(BufReader<TcpStream>, Duration)> {
    let start = Instant::now();
    let stream = TcpStream::connect(target);
    let took = start.elapsed();
    let stream = stream.with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok((BufReader::new(stream), took))
}

fn answer(connection: &mut BufReader<TcpStream>) -> Result<Duration> {
    let (start, mut line) = (Instant::now(), String::new());
    connection.get_mut().write_all(b"1\n")?;
    connection.read_line(&mut line).context("no answer")?;
    Ok(start.elapsed())
}

/// Keeps a thread on one CPU, modulo those that there are.
pub(super) fn stay(thread: Pid, cpu: usize) -> Result<()> {
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(cpu % there)?;
    Ok(sched_setaffinity(thread, &set)?)
}
