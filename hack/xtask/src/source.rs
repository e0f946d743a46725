//! Finds I/O in Rust source by the paths that it names. Pure.
//!
//! Comments, strings and char literals are blanked first, then every path is collected: `a::b::c` as written, and the
//! leaves of `use` trees spelled out, so that `use std::{fmt, fs}` is seen as `std::fs`. A test module at the end of the
//! file may do as it likes.

/// Path prefixes that a pure module must not name: the world outside of its arguments.
const FORBIDDEN: &[&str] = &[
    "aya",
    "axum",
    "hyper_util",
    "k8s_openapi",
    "kube",
    "libc",
    "nix",
    "notify",
    "rtnetlink",
    "rustix",
    "std::env",
    "std::fs",
    "std::io::stdin",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "tokio",
    "tonic",
];

/// The forbidden paths that the source names, with their line numbers (from 1).
pub fn io_paths(source: &str) -> Vec<(usize, String)> {
    let blanked = blank(source);
    let mut found = paths(&tokens(without_tests(&blanked)));
    found.retain(|(_, path)| {
        FORBIDDEN.iter().any(|bad| path.strip_prefix(bad).is_some_and(|rest| rest.is_empty() || rest.starts_with("::")))
    });
    found
}

/// The text up to a `#[cfg(test)] mod`; clippy's `items_after_test_module` sees to it that nothing follows one.
fn without_tests(text: &str) -> &str {
    const TESTS: &str = "#[cfg(test)]";
    let is_module = |at: &usize| text[at + TESTS.len()..].trim_start().starts_with("mod ");
    text.match_indices(TESTS).map(|(at, _)| at).find(is_module).map_or(text, |at| &text[..at])
}

/// Replaces comments and literals by spaces; line breaks stay.
fn blank(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if first == '"' {
            quoted(rest)
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = hashes + 2;
            rest[open..].find(&close).map_or(rest.len(), |end| open + end + close.len())
        } else if rest.starts_with("'\\") || rest.chars().nth(2) == Some('\'') && first == '\'' {
            let body = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
            rest[body..].find('\'').map_or(rest.len(), |end| body + end + 1)
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        out.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[length..];
    }
    out
}

/// The length of the string literal that `text` starts with, quotes included.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The number of hashes when `text` starts a raw string (`r"`, `r#"`).
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// Words and single punctuation marks (`::` is one), each with its line.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    for (line, content) in text.lines().enumerate() {
        let mut rest = content.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let length = if word > 0 {
                word
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            found.push((line + 1, rest[..length].to_owned()));
            rest = rest[length..].trim_start();
        }
    }
    found
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Every path of the token stream; the leaves of a brace group carry the prefix of the group. Single words count only
/// in a `use`, since elsewhere they are names of variables, fields and functions.
fn paths(tokens: &[(usize, String)]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // The prefix of each open brace: a path for a group of a use tree, empty for any other block.
    let mut open: Vec<String> = Vec::new();
    let mut path = String::new();
    let mut in_use = false;
    let mut before = "";
    for (at, (line, token)) in tokens.iter().enumerate() {
        match token.as_str() {
            "use" => in_use = true,
            ";" => in_use = false,
            "{" => open.push(if before == "::" { path.clone() } else { String::new() }),
            "}" => {
                open.pop();
            }
            "::" if is_word(before) && before != "use" => path.push_str("::"),
            "::" => path.clear(),
            word if is_word(word) => {
                if before != "::" {
                    path = open.last().cloned().unwrap_or_default();
                }
                path.push_str(word);
                let ends = tokens.get(at + 1).is_none_or(|(_, next)| next != "::");
                if ends && (in_use || path.contains("::")) {
                    found.push((*line, path.clone()));
                }
            }
            _ => {}
        }
        before = token;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &str) -> Vec<String> {
        io_paths(source).into_iter().map(|(_, path)| path).collect()
    }

    #[test]
    fn plain_and_grouped_uses_are_seen() {
        assert_eq!(names("use std::fs;"), ["std::fs"]);
        assert_eq!(
            names("use std::{fmt, fs::File, net::{IpAddr, TcpStream}};"),
            ["std::fs::File", "std::net::TcpStream"]
        );
        assert_eq!(names("use std::{\n  collections::BTreeMap,\n  process,\n};"), ["std::process"]);
        assert_eq!(names("use ::tokio::net::UdpSocket;"), ["tokio::net::UdpSocket"]);
        assert_eq!(names("use aya as loader;"), ["aya"]);
    }

    #[test]
    fn paths_in_code_are_seen_with_their_line() {
        assert_eq!(io_paths("fn f() {\n    std::fs::read(\"x\");\n}"), [(2, "std::fs::read".to_owned())]);
        assert_eq!(names("mod m { fn f() { kube::Client::new() } }"), ["kube::Client::new"]);
    }

    #[test]
    fn addresses_comments_and_strings_are_not_io() {
        let source = "//! std::fs\n/* tokio::spawn */\nuse std::net::{IpAddr, Ipv4Addr};\nlet a = \"std::fs::read\";\n\
                      let b = r#\"aya \"tokio::x\" \"#; let c = '\"'; let kube_name = 1; let d = '\\n'; fn g<'a>(x: &'a str) {}";
        assert_eq!(names(source), Vec::<String>::new());
    }

    #[test]
    fn variables_and_test_modules_are_not_io() {
        assert_eq!(names("fn notify(kube: u8) { self.notify(kube); let tokio = 1; }"), Vec::<String>::new());
        assert_eq!(names("#[cfg(test)]\nmod tests { use std::fs; }"), Vec::<String>::new());
        assert_eq!(names("#[cfg(test)]\nuse std::fs;\nuse tokio;"), ["std::fs", "tokio"]);
    }

    #[test]
    fn a_literal_does_not_hide_what_follows() {
        assert_eq!(names("let a = \"x\\\"\"; tokio::spawn(b);"), ["tokio::spawn"]);
        assert_eq!(names("let a = '\"'; std::fs::read(b);"), ["std::fs::read"]);
    }
}
