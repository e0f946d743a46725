//! Our interface definitions against upstream's, so that no name, number or type differs.
//!
//! `upstream.txt` is what `tests/csi/contract` prints of the descriptors in upstream's Go modules, whose versions its
//! go.mod pins. `upstream_is_what_the_modules_say` prints it anew.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto};

/// What upstream defines and we leave out, since we do not advertise it. Callers get UNIMPLEMENTED.
const NOT_SERVED: [&str; 2] =
    ["csi.v1.Controller/ControllerPublishVolume", "csi.v1.Controller/ControllerUnpublishVolume"];

fn upstream() -> BTreeSet<String> {
    include_str!("upstream.txt").lines().map(str::to_owned).collect()
}

fn ours() -> BTreeSet<String> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = protox::compile(["csi.proto", "pluginregistration.proto"], [proto]).unwrap();
    let mut lines = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package() != "google.protobuf") {
        file.message_type.iter().for_each(|message| add_message(&mut lines, file.package(), message));
        file.enum_type.iter().for_each(|item| add_enum(&mut lines, file.package(), item));
        for service in &file.service {
            for method in &service.method {
                let (input, output) =
                    (method.input_type().trim_start_matches('.'), method.output_type().trim_start_matches('.'));
                lines.insert(format!(
                    "rpc {}.{}/{} {input} -> {output}",
                    file.package(),
                    service.name(),
                    method.name()
                ));
            }
        }
    }
    lines
}

fn add_message(lines: &mut BTreeSet<String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    lines.insert(format!("message {name}"));
    for field in &message.field {
        let entry = message.nested_type.iter().find(|nested| {
            nested.options.as_ref().is_some_and(|options| options.map_entry())
                && field.type_name() == format!(".{name}.{}", nested.name())
        });
        let kind = match entry {
            Some(entry) => format!("map {} {}", type_of(&entry.field[0]), type_of(&entry.field[1])),
            None => {
                let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
                let oneof = field.oneof_index.map(|index| message.oneof_decl[index as usize].name());
                format!("{repeated}{}{}", type_of(field), oneof.map_or(String::new(), |oneof| format!(" in {oneof}")))
            }
        };
        lines.insert(format!("field {name}.{} = {} {kind}", field.name(), field.number()));
    }
    for nested in &message.nested_type {
        if !nested.options.as_ref().is_some_and(|options| options.map_entry()) {
            add_message(lines, &name, nested);
        }
    }
    message.enum_type.iter().for_each(|item| add_enum(lines, &name, item));
}

fn add_enum(lines: &mut BTreeSet<String>, scope: &str, item: &EnumDescriptorProto) {
    let name = format!("{scope}.{}", item.name());
    lines.insert(format!("enum {name}"));
    for value in &item.value {
        lines.insert(format!("value {name}.{} = {}", value.name(), value.number()));
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_ascii_lowercase(),
    }
}

#[test]
fn everything_of_ours_is_upstreams() {
    let (ours, upstream) = (ours(), upstream());
    assert!(ours.len() > 150, "only {} facts were read from our definitions", ours.len());
    let wrong: Vec<_> = ours.difference(&upstream).collect();
    assert!(wrong.is_empty(), "upstream knows nothing of {wrong:#?}");
}

#[test]
fn what_we_define_we_define_whole() {
    let (ours, upstream) = (ours(), upstream());
    let missing: Vec<_> = upstream
        .difference(&ours)
        .filter(|line| {
            // A member belongs to what its name says up to the last dot.
            let member = line.split_once(' ').filter(|(kind, _)| ["field", "value"].contains(kind));
            let owner = member.and_then(|(_, rest)| rest.split(' ').next()?.rsplit_once('.')).map(|(owner, _)| owner);
            owner.is_some_and(|owner| {
                ours.contains(&format!("message {owner}")) || ours.contains(&format!("enum {owner}"))
            })
        })
        .collect();
    assert!(missing.is_empty(), "we lack {missing:#?}");
}

#[test]
fn what_is_left_out_is_listed() {
    let (ours, upstream) = (ours(), upstream());
    let left_out: BTreeSet<&str> =
        upstream.difference(&ours).filter_map(|line| line.strip_prefix("rpc ")?.split(' ').next()).collect();
    assert_eq!(left_out, BTreeSet::from(NOT_SERVED));
}

/// Whatever is a secret by the interface's own word is none of a log's business.
#[test]
fn secrets_are_not_shown() {
    let secrets = || [("password".to_owned(), "hunter2".to_owned())].into();
    let create =
        keelway_csi::csi::CreateVolumeRequest { name: "pvc-1".into(), secrets: secrets(), ..Default::default() };
    let stage = keelway_csi::csi::NodeStageVolumeRequest { secrets: secrets(), ..Default::default() };
    let shown = format!("{create:?} {stage:#?}");
    assert!(shown.contains("pvc-1") && shown.contains("staging_target_path"), "{shown}");
    assert!(!shown.contains("hunter2") && !shown.contains("password"), "{shown}");
    // In each message that has such a field.
    let proto = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/csi.proto")).unwrap();
    let fields = proto.lines().filter(|line| line.contains("secrets = "));
    assert!(fields.clone().count() > 15 && fields.clone().all(|line| line.contains("(csi_secret) = true")));
}

#[test]
#[ignore = "needs Go and the Go module proxy"]
fn upstream_is_what_the_modules_say() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/csi/contract");
    let output = Command::new("go").args(["run", "."]).current_dir(program).output();
    let output = match output {
        Ok(output) => output,
        Err(error) => return eprintln!("skipped: go cannot be run: {error}"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), include_str!("upstream.txt"));
}
