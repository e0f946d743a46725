//! What of the kernel the programs cannot do without, asked of it before anything is loaded: what is missing is then named, and
//! not left to be guessed from a verifier's words.

use aya::maps::MapType;
use aya::programs::{ProgramError, ProgramType};
use aya::sys::{BpfHelper, SyscallError, is_helper_supported, is_map_supported, is_program_supported};

use crate::error::Error;

const PROGRAMS: &[(ProgramType, &str, &str)] = &[
    (ProgramType::SchedClassifier, "BPF classifiers (tc)", "CONFIG_NET_CLS_BPF"),
    (ProgramType::CgroupSockAddr, "BPF programs on a cgroup's sockets", "CONFIG_CGROUP_BPF"),
];

const MAPS: &[(MapType, &str)] = &[
    (MapType::Hash, "BPF maps of type hash"),
    (MapType::LruHash, "BPF maps of type lru_hash"),
    (MapType::LruPerCpuHash, "BPF maps of type lru_percpu_hash"),
    (MapType::LpmTrie, "BPF maps of type lpm_trie"),
    (MapType::PerCpuArray, "BPF maps of type percpu_array"),
    (MapType::ProgramArray, "BPF maps of type prog_array"),
    (MapType::RingBuf, "BPF maps of type ringbuf"),
];

/// Those that came last, or that a kernel may be built without.
const HELPERS: &[(BpfHelper, &str, &str)] = &[
    (BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "the BPF helper ktime_get_coarse_ns", "CONFIG_BPF_SYSCALL"),
    (BpfHelper::BPF_FUNC_redirect_peer, "the BPF helper redirect_peer", "CONFIG_NET"),
    (BpfHelper::BPF_FUNC_redirect_neigh, "the BPF helper redirect_neigh", "CONFIG_INET"),
    (BpfHelper::BPF_FUNC_fib_lookup, "the BPF helper fib_lookup", "CONFIG_INET"),
    (BpfHelper::BPF_FUNC_skb_set_tunnel_key, "the BPF helper skb_set_tunnel_key", "CONFIG_NET"),
];

/// Asks the kernel for everything that the programs need.
///
/// # Errors
/// The first thing that it cannot do, or that this process may not.
pub fn check() -> Result<(), Error> {
    for (program, what, option) in PROGRAMS {
        let answer = is_program_supported(*program).map_err(|error| unasked(&error))?;
        required(answer, what, option)?;
    }
    for (map, what) in MAPS {
        let answer = is_map_supported(*map).map_err(|error| refused(&error.io_error))?;
        required(answer, what, "CONFIG_BPF_SYSCALL")?;
    }
    for (helper, what, option) in HELPERS {
        let answer = is_helper_supported(ProgramType::SchedClassifier, *helper).map_err(|error| unasked(&error))?;
        required(answer, what, option)?;
    }
    Ok(())
}

fn required(there: bool, what: &'static str, option: &'static str) -> Result<(), Error> {
    if there { Ok(()) } else { Err(Error::NoFeature { what, option, release: crate::loader::release() }) }
}

fn unasked(error: &ProgramError) -> Error {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => refused(io_error),
        ProgramError::LoadError { io_error, .. } => refused(io_error),
        other => Error::Refused { what: "a question about its features".into(), reason: other.to_string() },
    }
}

fn refused(error: &std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Error::NoFeature {
            what: "the bpf system call",
            option: "CONFIG_BPF_SYSCALL",
            release: crate::loader::release(),
        },
        Some(libc::EPERM | libc::EACCES) => Error::NotPermitted,
        _ => Error::Refused { what: "a question about its features".into(), reason: error.to_string() },
    }
}
