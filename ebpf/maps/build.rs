//! Compiles the kernel side and hands its path to `object.rs`. Without the BPF toolchain the host crates still build: the
//! object is then empty, and loading it says what to install.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `hack/build-bpf` cannot compile for BPF on this machine.
const NO_TOOLCHAIN: i32 = 3;

fn main() {
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("../..");
    for watched in
        ["ebpf/programs/src", "ebpf/programs/Cargo.toml", "ebpf/layout/src", "hack/build-bpf", "hack/bpf-toolchain.sh"]
    {
        println!("cargo:rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo:rerun-if-env-changed=KEELWAY_BPF_OBJECT");
    println!("cargo:rustc-check-cfg=cfg(no_programs)");

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let object = out_dir.join("keelway.bpf.o");
    if let Some(prebuilt) = env::var_os("KEELWAY_BPF_OBJECT") {
        std::fs::copy(&prebuilt, &object).unwrap_or_else(|error| panic!("KEELWAY_BPF_OBJECT={prebuilt:?}: {error}"));
        return;
    }
    // Beside the profiles' folders, so that every profile shares one build of the kernel side.
    let target = out_dir.ancestors().nth(4).expect("OUT_DIR lies below the target folder").join("bpf");
    let status = Command::new(root.join("hack/build-bpf")).arg(&object).arg(&target).status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) if status.code() == Some(NO_TOOLCHAIN) => {
            println!("cargo:warning=built without the kernel side: run `hack/setup build`, or set KEELWAY_BPF_OBJECT");
            // The tests that load programs are then ignored, with that reason.
            println!("cargo:rustc-cfg=no_programs");
            // Asked again at each build, by a file that is never there, since the toolchain may be there then.
            println!("cargo:rerun-if-changed={}", out_dir.join("no-toolchain").display());
            std::fs::write(&object, []).expect("OUT_DIR is writable");
        }
        Ok(status) => panic!("hack/build-bpf failed: {status}"),
        Err(error) => panic!("hack/build-bpf could not be run: {error}"),
    }
}
