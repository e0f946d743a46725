# Sourced, not run: finds a compiler that can build the kernel side.
#
# The kernel side needs three things that agree: a Rust compiler, the source of its own standard library (core is
# compiled for BPF, there is no binary of it), and a bpf-linker whose LLVM is at least the compiler's. Any toolchain
# that has them will do, so each one is tested for what it holds and not for its name.
# shellcheck shell=bash

# The bpf-linker release that the programs are tested with, and the LLVM it is linked against.
# (The variables are read by the scripts that source this file.)
# shellcheck disable=SC2034
BPF_LINKER_VERSION=0.13.0
BPF_LLVM_MAJOR=22

# bpf_llvm_major RUSTC: the major version of the compiler's LLVM, empty when the compiler does not run.
bpf_llvm_major() {
    "$1" -vV 2>/dev/null | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p'
}

# bpf_usable RUSTC CARGO: succeeds when the pair can compile core for BPF; else sets bpf_reason.
bpf_usable() {
    local rustc=$1 cargo=$2 sysroot llvm
    if [ ! -x "$rustc" ] || [ ! -x "$cargo" ]; then
        bpf_reason="not installed"
        return 1
    fi
    sysroot=$("$rustc" --print sysroot 2>/dev/null) || sysroot=
    if [ -z "$sysroot" ] || [ ! -e "$sysroot/lib/rustlib/src/rust/library/core/Cargo.toml" ]; then
        bpf_reason="has no library source"
        return 1
    fi
    llvm=$(bpf_llvm_major "$rustc")
    if [ "${llvm:-99}" -gt "$BPF_LLVM_MAJOR" ]; then
        bpf_reason="uses LLVM ${llvm:-of an unknown version}, newer than bpf-linker's $BPF_LLVM_MAJOR"
        return 1
    fi
}

# find_bpf_rust: sets BPF_RUSTC and BPF_CARGO to the first toolchain that can build the kernel side; else fails and
# leaves one line for each toolchain that was looked at in BPF_LOOKED_AT.
find_bpf_rust() {
    local rustup_home=${RUSTUP_HOME:-$HOME/.rustup} dir
    BPF_RUSTC='' BPF_CARGO='' BPF_LOOKED_AT=''
    # Nightly first, as upstream's tools do; /usr/bin last, since Debian's is the fallback.
    for dir in "$rustup_home"/toolchains/nightly-*/bin "$rustup_home"/toolchains/[!n]*/bin /usr/bin; do
        [ -e "$dir/rustc" ] || continue
        if bpf_usable "$dir/rustc" "$dir/cargo"; then
            BPF_RUSTC=$dir/rustc BPF_CARGO=$dir/cargo
            return 0
        fi
        BPF_LOOKED_AT+="  $dir/rustc: $bpf_reason"$'\n'
    done
    return 1
}

# find_bpf_linker: sets BPF_LINKER to a bpf-linker, from PATH or from where cargo installs to; else fails.
find_bpf_linker() {
    BPF_LINKER=$(command -v bpf-linker) || BPF_LINKER=${CARGO_HOME:-$HOME/.cargo}/bin/bpf-linker
    [ -x "$BPF_LINKER" ]
}
