//! Placeholder of the plugin's binary until its commands are in.
fn main() {}
