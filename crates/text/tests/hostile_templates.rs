//! Templates that mean harm end soon and small (reliability.md, R11). To see each one's time and memory:
//! `cargo test --release -p oxseek-text --test hostile_templates -- --nocapture`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{fs, time::Instant};

use oxseek_text::ChatTemplate;
use serde_json::{Map, json};

/// Most memory that a hostile template may take.
const MEMORY_KIB_MAX: u64 = 64 << 10;

/// The most memory that this process had, or has now, as Linux counts it.
fn memory_kib(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|l| l.strip_prefix(line)).unwrap_or("0 kB");
    found.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A loop that stores `value`, made of what it stored before, in `s.x`, which begins as `first`.
fn grown(first: &str, times: usize, value: &str) -> String {
    format!(
        "{{% set s = namespace(x={first}) %}}{{% for i in range({times}) %}}{{% set s.x = {value} %}}{{% endfor %}}"
    )
}

/// A megabyte in `x`.
fn large(then: &str) -> String {
    format!("{{% set x = 'x' * 1000000 %}}{then}")
}

/// Each with what its error says.
#[allow(clippy::too_many_lines, reason = "a table")]
fn hostile() -> Vec<(String, &'static str)> {
    let loops = |inner: &str| {
        format!(
            "{{% for i in range(100000) %}}{{% for j in range(100000) %}}{inner}{{% endfor %}}{{% endfor %}}"
        )
    };
    let chain =
        |begin: &str, link: &str, links: usize, end: &str| begin.to_string() + &link.repeat(links) + end;
    let text = |s: &str| s.to_string();
    vec![
        // Time.
        (text("{% for i in range(1000000000) %}x{% endfor %}"), "template"),
        (loops("x"), "limit"),
        (loops("{% if i > j %}{% endif %}"), "limit"),
        (text("{% for i in range(400) %}{% set x = range(100000) %}{% endfor %}"), "limit"),
        (text("{% for i in range(100000) %}{% set y = range(100000)[1:] %}{% endfor %}"), "limit"),
        (text("{{ ([1] * 100000000).count(2) }}"), "limit"),
        (text("{% set x = [1] * 100000000 %}"), "limit"),
        (grown("[1]", 60, "s.x + s.x"), "limit"),
        (grown("[1]", 60, "[s.x, s.x]"), "limit"),
        (
            grown("[1]", 12, "[s.x, s.x]")
                + "{% for i in range(10000) %}{% if s.x == [i, s.x] %}{% endif %}{% endfor %}",
            "limit",
        ),
        (grown("[1]", 12, "[s.x, s.x]") + "{{ ([s.x] * 10000) | sort | length }}", "limit"),
        (text("{{ (range(100000) | list * 100) | groupby('a') | list | length }}"), "limit"),
        // Memory.
        (text("{{ 'x' * 1000000000 }}"), "template"),
        (text("{{ 'x' * 25000000 }}"), "limit"),
        (text("{{ ('x' * 30000000).replace('x', 'y' * 40) }}"), "limit"),
        (text("{{ ('x' * 1000000) | replace('x', 'y' * 1000) }}"), "limit"),
        (grown("'ab'", 60, "s.x + s.x"), "limit"),
        (grown("'ab'", 60, "s.x ~ s.x"), "limit"),
        (grown("'ab'", 60, "s.x.replace('a', 'aaaa')"), "limit"),
        (grown("[]", 400, "[s.x, range(90000)]"), "limit"),
        (large("{{ ''.join([x] * 1000) }}"), "limit"),
        (large("{{ ([x] * 1000) | join }}"), "limit"),
        (large("{{ ([x] * 1000) | tojson }}"), "limit"),
        (large("{{ ([x] * 1000) | pprint }}"), "limit"),
        (large("{{ ([x] * 1000) | string }}"), "limit"),
        (large("{{ ([x] * 1000) ~ '' }}"), "limit"),
        (large("{{ ([x] * 1000) | upper }}"), "template"),
        (large("{{ [[x] * 1000] | map('upper') | list }}"), "template"),
        (large("{% set y %}{{ [x] * 1000 }}{% endset %}"), "limit"),
        (large("{{ ('{0}' * 1000).format(x) }}"), "limit"),
        (large("{{ ('%(a)s' * 1000) | format(a=x) }}"), "limit"),
        (text("{{ '{:1000000000}'.format(1) }}"), "limit"),
        (text("{{ 'x' | indent(1000000000, true) }}"), "limit"),
        (text("{{ [1] | batch(1000000000, 'x') | list }}"), "limit"),
        (text("{{ [1] | slice(1000000000) | list }}"), "limit"),
        (text("{{ ('\\n' * 20000000).splitlines() | length }}"), "limit"),
        (text("{{ ('a,' * 10000000).split(',') | length }}"), "limit"),
        (text("{{ ('<' * 10000000) | e }}"), "limit"),
        (text("{{ strftime_now('%B' * 1000) }}"), "template"),
        (text("{% set x = (1, 2) * 50000000 %}"), "limit"),
        // Depth: what is nested is freed by recursion.
        (grown("[]", 100_000, "[s.x]"), "template"),
        (grown("{}", 100_000, "{'a': s.x}"), "template"),
        (grown("{}", 100_000, "dict(a=s.x)"), "template"),
        (grown("[1]", 100_000, "s.x | batch(1) | list"), "template"),
        (chain("{% set x = [] %}", "{%set x=[x]%}", 18_000, ""), "template"),
        (text("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), "template"),
        (text("{% macro f(x) %}{{ f([[[x]]]) }}{% endmacro %}{{ f(1) }}"), "template"),
        (
            text(
                "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            ),
            "template",
        ),
        (text("{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}"), "template"),
        (text("{% block a %}{{ self.a() }}{% endblock %}"), "template"),
        (chain("{{ 'x'", "|e", 90_000, " }}"), "template"),
        (chain("{{ x", "+x", 90_000, " }}"), "template"),
        (chain("{{ x", ".a", 90_000, " }}"), "template"),
        (chain("{{ x", "()", 90_000, " }}"), "template"),
        (chain("{{ ", "not ", 60_000, "x }}"), "template"),
        (chain("{{ ", "-", 90_000, "1 }}"), "template"),
        (chain("{% if a %}", "{%elif a%}", 20_000, "{% endif %}"), "template"),
        (chain("", "{% for a in b %}", 10_000, ""), "template"),
        (chain("", "{{ x }}", 90_000, ""), "limit"),
        // A ring is never freed.
        (text("{% set s = namespace() %}{% set s.x = s %}"), "template"),
        (text("{% set s = namespace() %}{% set s.x = [{'a': s}] %}"), "template"),
        (text("{% set s = namespace() %}{% set s.x = [s.items()] %}"), "template"),
        (text("{% set s = namespace(y=1) %}{% for i in [1] %}{% set s.x = loop %}{% endfor %}"), "template"),
        (text("{% set s = namespace() %}{% macro f() %}{{ s }}{% endmacro %}{% set s.x = f %}"), "template"),
        // What is not there.
        (text("{% include 'chat' %}"), "template"),
        (text("{% include '/etc/passwd' %}"), "template"),
        (text("{% import 'x' as y %}"), "template"),
        (text("{% extends 'chat' %}"), "template"),
        (text("{{ ''.__class__.__mro__ }}"), "template"),
        (text("{{ messages[0]['content']['a']['b'] }}"), "template"),
        (text("{{ (messages[0]).__init__.__globals__['os'].system('id') }}"), "template"),
        (text("{{ cycler.__init__ }}{{ joiner.x.y }}{{ lipsum() }}"), "template"),
        (text("{{ messages.append(messages) }}"), "template"),
        (text("{{ unknown_function() }}"), "template"),
        (text("{{ 1 / 0 }}"), "template"),
        (text("{{ strftime_now('%Q') }}"), "template"),
        (text("{{ messages | tojson(indent='x') }}"), "template"),
        (text("{{ [1, 2] | groupby('a') | tojson(x=1) }}"), "template"),
        (text("{% for m in messages %}"), "template"),
        (text("{{ raise_exception('only users may speak') }}"), "only users may speak"),
    ]
}

#[test]
fn hostile_templates_end_soon_and_small() {
    let cases = hostile();
    assert!(cases.len() >= 25);
    let before = memory_kib("VmRSS:");
    let (mut slowest, mut wrong) = ((0.0, String::new()), Vec::new());
    for (source, want) in cases {
        let name: String = source.chars().take(110).collect();
        let began = Instant::now();
        let messages = [json!({"role": "user", "content": "hi"})];
        let render = |t: ChatTemplate| t.render(&messages, None, true, "<b>", "<e>", &Map::new());
        let result = ChatTemplate::new(&source).and_then(render);
        let took = began.elapsed().as_secs_f64() * 1e3;
        println!("{took:>6.1} ms  {:>6} KiB at most so far  {name}", memory_kib("VmHWM:") - before);
        match result {
            Ok(_) => wrong.push(format!("{name} rendered")),
            Err(e) if !e.to_string().contains(want) => wrong.push(format!("{name}: {e}")),
            Err(_) => {}
        }
        if took > slowest.0 {
            slowest = (took, name);
        }
    }
    let most = memory_kib("VmHWM:") - before;
    println!("slowest: {:.1} ms, {}; most memory: {most} KiB", slowest.0, slowest.1);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(most <= MEMORY_KIB_MAX, "{most} KiB");
}
