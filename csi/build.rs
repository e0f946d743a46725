//! Compiles the interface definitions with a compiler that is itself a crate, so that no `protoc` is needed, and gives
//! each message with a secret in it a `Debug` that does not show it.
use std::fmt::Write;

use protox::prost_reflect::{ExtensionDescriptor, FieldDescriptor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(["csi.proto", "pluginregistration.proto"])?;
    let pool = compiler.descriptor_pool();
    let secret = pool.get_extension_by_name("csi.v1.csi_secret").ok_or("no option csi_secret is defined")?;
    let (mut text, mut redacted) = (String::new(), Vec::new());
    for message in pool.all_messages() {
        let secret = |field: &_| is_secret(field, &secret);
        if !message.fields().any(|field| secret(&field)) {
            continue;
        }
        redacted.push(message.full_name().to_owned());
        let name = message.name();
        writeln!(text, "impl std::fmt::Debug for {name} {{")?;
        writeln!(text, "    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {{")?;
        writeln!(text, "        f.debug_struct({name:?})")?;
        for field in message.fields() {
            let name = field.name();
            let value = if secret(&field) { "&\"(not shown)\"".to_owned() } else { format!("&self.{name}") };
            writeln!(text, "            .field({name:?}, {value})")?;
        }
        writeln!(text, "            .finish()\n    }}\n}}")?;
    }
    std::fs::write(std::path::Path::new(&std::env::var("OUT_DIR")?).join("redacted.rs"), text)?;
    tonic_prost_build::configure().skip_debug(redacted).compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

fn is_secret(field: &FieldDescriptor, secret: &ExtensionDescriptor) -> bool {
    field.options().get_extension(secret).as_bool().unwrap_or(false)
}
