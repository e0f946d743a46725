//! Compiles the protobuf definition with a compiler that is itself a crate, so that no `protoc` is needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/keelway.proto");
    let descriptors = protox::compile(["keelway.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
