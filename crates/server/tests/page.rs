//! The chat page: what is sent, of which type, and that it asks nobody else for anything.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{Answer, Server};

/// Everything in the folder `web`: name and text.
fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn path_of(name: &str) -> String {
    if name == "index.html" { "/".into() } else { format!("/web/{name}") }
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    let prefix = format!("{name}: ");
    answer
        .head
        .lines()
        .find_map(|l| l.strip_prefix(&prefix))
        .unwrap_or_else(|| panic!("no {name}: {}", answer.head))
}

fn ask(server: &Server, method: &str, path: &str, tag: &str) -> Answer {
    let head =
        format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nif-none-match: {tag}\r\n\r\n");
    server.raw(head.as_bytes())
}

/// What stands between each `begin` and the next `end`.
fn between<'a>(text: &'a str, begin: &str, end: char) -> Vec<&'a str> {
    text.split(begin).skip(1).filter_map(|rest| rest.split(end).next()).collect()
}

#[test]
fn every_file_is_served_with_its_type_and_a_strict_policy() {
    let server = Server::loading();
    for (name, text) in files() {
        let answer = server.get(&path_of(&name));
        assert_eq!((answer.status, &answer.body), (200, &text), "{name}");
        let kind = match name.rsplit('.').next().unwrap() {
            "html" => "text/html; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "svg" => "image/svg+xml",
            other => panic!("what is a {other}?"),
        };
        assert_eq!(header(&answer, "content-type"), kind, "{name}");
        assert_eq!(header(&answer, "x-content-type-options"), "nosniff");
        assert_eq!(header(&answer, "referrer-policy"), "no-referrer");
        let policy = header(&answer, "content-security-policy");
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ] {
            assert!(policy.split(';').any(|r| r.trim() == rule), "{rule} in {policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains("http") && !policy.contains('*'), "{policy}");
    }
}

#[test]
fn a_browser_that_has_a_file_is_told_so() {
    let server = Server::loading();
    for (name, _) in files() {
        let path = path_of(&name);
        let first = server.get(&path);
        assert_eq!(header(&first, "cache-control"), "no-cache");
        let tag = header(&first, "etag");
        for known in [tag.to_string(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".into()] {
            let again = ask(&server, "GET", &path, &known);
            assert_eq!(
                (again.status, again.body.as_str(), header(&again, "etag")),
                (304, "", tag),
                "{known}"
            );
            header(&again, "content-security-policy");
        }
        assert_eq!(ask(&server, "GET", &path, "\"0123456789abcdef\"").status, 200);
    }
}

#[test]
fn only_files_of_the_page_are_there() {
    let server = Server::loading();
    for path in [
        "/web/",
        "/web/none.js",
        "/web/../Cargo.toml",
        "/web/%2e%2e%2fCargo.toml",
        "/web/app.js/x",
        "/web/index.html",
    ] {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
    let head = ask(&server, "HEAD", "/web/app.js", "\"\"");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert_eq!(ask(&server, "POST", "/", "\"\"").status, 405);
}

/// What the policy would stop, and what it could not: texts that become HTML.
#[test]
fn no_script_or_style_is_inline_and_nothing_parses_html() {
    for (name, text) in files() {
        if name.rsplit_once('.').is_some_and(|(_, kind)| kind == "html") {
            for script in between(&text, "<script", '<') {
                assert!(
                    script.contains("src=\"/web/") && script.trim_end().ends_with('>'),
                    "{name}: {script}"
                );
            }
            for tag in between(&text, "<", '>') {
                let handler = tag.split_whitespace().skip(1).any(|a| a.starts_with("on") && a.contains('='));
                assert!(!handler && !tag.contains("style=") && !tag.starts_with("style"), "{name}: {tag}");
            }
        }
        for word in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "Function(",
        ] {
            assert!(!text.contains(word), "{name}: {word}");
        }
    }
}

#[test]
fn what_the_page_names_is_there_and_nothing_is_elsewhere() {
    let files = files();
    let names: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    let mut used = BTreeSet::from(["index.html"]);
    for (name, text) in &files {
        for (begin, end) in [("=\"/web/", '"'), ("from './", '\''), ("url(", ')'), ("@import", ';')] {
            used.extend(between(text, begin, end));
        }
        // A picture's name space is an address that nobody asks.
        let outside = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!outside.contains("http://") && !outside.contains("https://"), "{name}");
    }
    assert_eq!(used, names);
    let bytes: usize = files.iter().map(|(_, text)| text.len()).sum();
    assert!(bytes < 90_000, "{bytes} bytes; a page that loads at once is small");
}
