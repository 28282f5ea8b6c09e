//! The rules of the house that a compiler does not keep: who may name what, and what belongs beside what.

use std::fs;
use std::path::{Path, PathBuf};

const CRATES: [&str; 5] = [".", "engine", "shaders", "transport", "placement"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A source file: where, and its text with comments blanked, line by line.
struct Source {
    path: String,
    text: String,
    code: String,
}

/// Every file with the extension under a folder of the repository.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.map(|entry| entry.expect("a folder's entry").path()) {
            if entry.is_dir() && !entry.ends_with("target") {
                open.push(entry);
            } else if entry.extension().is_some_and(|e| e == extension) {
                found.push(entry);
            }
        }
    }
    found.sort();
    found
}

/// The Rust files of a folder.
fn rust(folder: &str) -> Vec<Source> {
    files(folder, "rs")
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a source file");
            let name = path.strip_prefix(root()).expect("inside the repository");
            let path = name.to_string_lossy().replace('\\', "/");
            Source { path, code: without_comments(&text), text }
        })
        .collect()
}

/// All that ships: `src/` of every crate and the examples.
fn shipped() -> Vec<Source> {
    let sources = CRATES.iter().flat_map(|krate| rust(&format!("{krate}/src"))).chain(rust("examples"));
    let sources: Vec<_> = sources.collect();
    assert!(sources.len() > 20, "the sources are where this test looks");
    sources
}

/// Blanks line and block comments, keeping strings and line numbers.
fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let letters: Vec<char> = text.chars().collect();
    let mut i = 0;
    while i < letters.len() {
        let rest = &letters[i..];
        if rest.starts_with(&['/', '/']) {
            i += rest.iter().position(|c| *c == '\n').unwrap_or(rest.len());
        } else if rest.starts_with(&['/', '*']) {
            let mut depth = 0;
            while i < letters.len() {
                let rest = &letters[i..];
                let step = if rest.starts_with(&['/', '*']) {
                    depth += 1;
                    2
                } else if rest.starts_with(&['*', '/']) {
                    depth -= 1;
                    2
                } else {
                    out.extend(rest.first().filter(|c| **c == '\n'));
                    1
                };
                i += step;
                if depth == 0 {
                    break;
                }
            }
        } else {
            let end = literal(rest);
            out.extend(&rest[..end]);
            i += end;
        }
    }
    out
}

/// How many letters belong together here: a whole string or character literal, else one.
fn literal(rest: &[char]) -> usize {
    let hashes = rest.iter().skip(1).take_while(|c| **c == '#').count();
    if rest[0] == 'r' && rest.get(1 + hashes) == Some(&'"') {
        let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
        let body = &rest[2 + hashes..];
        let end = body.windows(close.len()).position(|w| w == close).unwrap_or(body.len());
        return (2 + hashes + end + close.len()).min(rest.len());
    }
    match rest {
        ['\'', '\\', _, tail @ ..] => 3 + tail.iter().position(|c| *c == '\'').map_or(0, |at| at + 1),
        ['\'', _, '\'', ..] => 3,
        ['"', tail @ ..] => {
            let mut escaped = false;
            let end = tail.iter().position(|c| {
                let ends = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                ends
            });
            end.map_or(rest.len(), |at| at + 2)
        }
        _ => 1,
    }
}

/// Blanks the items under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut out = code.to_string();
    while let Some(at) = out.find("#[cfg(test)]") {
        let rest: Vec<char> = out[at..].chars().collect();
        let (mut depth, mut i) = (0, 0);
        while i < rest.len() {
            match rest[i] {
                '{' => depth += 1,
                '}' if depth == 1 => break,
                '}' => depth -= 1,
                ';' if depth == 0 => break,
                _ => {}
            }
            i += literal(&rest[i..]);
        }
        let length: usize = rest[..(i + 1).min(rest.len())].iter().map(|c| c.len_utf8()).sum();
        let blank: String = out[at..at + length].chars().filter(|c| *c == '\n').collect();
        out.replace_range(at..at + length, &blank);
    }
    out
}

/// Whether a line of code names a crate: in a path, a `use`, or an `extern crate`.
fn names(line: &str, krate: &str) -> bool {
    line.match_indices(krate).any(|(at, _)| {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let (before, after) = (&line[..at], &line[at + krate.len()..]);
        let whole = !before.ends_with(word) && !after.starts_with(word);
        let lead = before.trim_end();
        whole && (after.starts_with("::") || lead.ends_with("use") || lead.ends_with("extern crate"))
    })
}

/// Reports every line of code that `broken` objects to.
fn no_line(sources: &[Source], rule: &str, broken: impl Fn(&str) -> bool) {
    let found: Vec<String> = sources
        .iter()
        .flat_map(|source| {
            let lines = source.code.lines().enumerate().filter(|(_, line)| broken(line));
            lines.map(|(n, line)| format!("{}:{}: {}", source.path, n + 1, line.trim())).collect::<Vec<_>>()
        })
        .collect();
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

#[test]
fn the_scanner_sees_what_it_should() {
    let code = without_comments("a // b\n/* c /* d */\n e */ f \"// g\" r#\"/* \" */\"# '\"' h // \"");
    assert_eq!(code, "a \n\n f \"// g\" r#\"/* \" */\"# '\"' h ");
    let code = without_tests("a\n#[cfg(test)]\nmod t {\n b('}') \"}\" {}\n}\nc\n#[cfg(test)]\nuse d;\ne");
    assert_eq!(code, "a\n\n\n\n\nc\n\n\ne");
    assert!(
        names("use wgpu;", "wgpu")
            && names("let x: wgpu::Buffer", "wgpu")
            && names("pub use wgpu as w", "wgpu")
    );
    assert!(!names("let wgpu_hal = my_wgpu::x", "wgpu") && !names("\"no wgpu adapter\"", "wgpu"));
}

#[test]
fn each_outside_crate_is_named_in_its_own_place_only() {
    for (krate, home) in [
        ("wgpu", "engine/src/gpu/"),
        ("quinn", "transport/src/quic/"),
        ("rustls", "transport/"),
        ("rcgen", "transport/"),
        ("naga", "shaders/"),
        ("wesl", "shaders/"),
    ] {
        let mut sources = shipped();
        assert!(
            sources.iter().any(|s| s.code.lines().any(|line| names(line, krate))),
            "{krate} is used somewhere"
        );
        sources.retain(|source| {
            !source.path.starts_with(home) && source.path != format!("{}.rs", home.trim_end_matches('/'))
        });
        no_line(&sources, &format!("{krate} is named in {home} only"), |line| names(line, krate));
    }
}

#[test]
fn crates_depend_in_one_direction() {
    let depends = |krate: &str| -> Vec<String> {
        let text = fs::read_to_string(root().join(krate).join("Cargo.toml")).expect("Cargo.toml");
        let start = text.find("\n[dependencies]").map_or(text.len(), |at| at + 1);
        let table = text[start..].lines().skip(1).take_while(|line| !line.starts_with('['));
        table.filter_map(|line| line.split(['.', ' ', '=']).next()).map(str::to_string).collect()
    };
    for (krate, may) in [
        ("placement", &[][..]),
        ("shaders", &[][..]),
        ("transport", &["exflow-placement"][..]),
        ("engine", &["exflow-placement", "exflow-shaders", "exflow-transport"][..]),
    ] {
        let ours: Vec<_> = depends(krate).into_iter().filter(|name| name.starts_with("exflow")).collect();
        assert_eq!(
            ours.len(),
            ours.iter().filter(|name| may.contains(&name.as_str())).count(),
            "{krate}: {ours:?}"
        );
    }
    for (outside, owner) in
        [("wgpu", "engine"), ("quinn", "transport"), ("naga", "shaders"), ("wesl", "shaders")]
    {
        for krate in CRATES {
            let has = depends(krate).iter().any(|name| name == outside);
            assert_eq!(has, krate == owner, "{outside} is a dependency of {owner}, not of {krate}");
        }
    }
}

#[test]
fn pure_crates_touch_no_clock_socket_or_environment() {
    let mut sources = rust("placement/src");
    sources.extend(rust("transport/src/proto"));
    sources.iter_mut().for_each(|source| source.code = without_tests(&source.code));
    assert!(sources.len() > 8);
    // The one adapter that hands time in; the options of a solve take it or another.
    sources.retain(|source| source.path != "placement/src/clock.rs");
    for word in [
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "ToSocketAddrs",
        "std::env",
        "Instant::now",
        "SystemTime",
        "thread::sleep",
        "tokio::",
        "rand::",
    ] {
        no_line(&sources, &format!("{word} is passed in, not reached for"), |line| line.contains(word));
    }
}

#[test]
fn no_kernel_text_in_rust() {
    for mark in
        ["@compute", "@workgroup_size", "@group(", "@binding(", "var<storage", "var<workgroup", "var<uniform"]
    {
        let mut sources = shipped();
        sources.iter_mut().for_each(|source| source.code = without_tests(&source.code));
        no_line(&sources, "kernel text lives in shaders/wgsl", |line| line.contains(mark));
    }
}

#[test]
fn no_unwrap_outside_tests() {
    let mut sources = shipped();
    // A module of tests may be a file of its own.
    let of_tests = ["tests.rs", "/flow/made_up.rs"];
    sources.retain(|source| !of_tests.iter().any(|end| source.path.ends_with(end)));
    sources.retain(|source| !source.path.contains("/tests/"));
    sources.iter_mut().for_each(|source| source.code = without_tests(&source.code));
    let panics = |line: &str| line.contains(".unwrap()") || line.contains(".expect(");
    no_line(&sources, "an error is handed on or explained", panics);
}

#[test]
fn the_architecture_names_every_folder_and_nothing_that_is_not_there() {
    let page = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("the page");
    let mut folders: Vec<String> = Vec::new();
    let mut sources: Vec<String> = Vec::new();
    for top in ["src", "engine", "shaders", "transport", "placement", "examples", "tests", "tools", "scripts"]
    {
        for file in ["rs", "wgsl", "sh", "py"].iter().flat_map(|extension| files(top, extension)) {
            let file = file.strip_prefix(root()).expect("inside the repository");
            sources.push(file.to_string_lossy().replace('\\', "/"));
            let folder = file.parent().expect("a folder").to_string_lossy().replace('\\', "/");
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    assert!(folders.len() > 50, "the sources are where this test looks");
    let named: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    let ends = |path: &str, name: &str| path == name || path.ends_with(&format!("/{name}"));
    for folder in &folders {
        let is_named = |name: &&str| name.strip_suffix('/').is_some_and(|name| ends(folder, name));
        assert!(named.iter().any(is_named), "{folder}/ is not named");
    }
    let there = |name: &str| match name.strip_suffix('/') {
        Some(name) => root().join(name).is_dir() || folders.iter().any(|folder| ends(folder, name)),
        None => sources.iter().any(|source| ends(source, name)),
    };
    let is_path = |name: &&&str| {
        let extension = Path::new(name).extension();
        !name.contains(' ') && (name.ends_with('/') || extension.is_some_and(|e| e == "rs" || e == "wgsl"))
    };
    // `expert_*.wgsl` stands for several.
    for name in named.iter().filter(is_path).filter(|name| !name.contains('*')) {
        assert!(there(name), "{name} is not there");
    }
}

#[test]
fn every_kernel_has_a_twin() {
    let kernels: Vec<_> = files("shaders/wgsl", "wgsl")
        .into_iter()
        .filter(|path| !path.components().any(|c| c.as_os_str() == "shared"))
        .collect();
    assert!(kernels.len() >= 8, "the kernels are where this test looks: {kernels:?}");
    for kernel in &kernels {
        let name = kernel.file_stem().expect("a name").to_string_lossy();
        let text = fs::read_to_string(kernel).expect("a kernel");
        assert!(
            text.contains("@compute"),
            "{name}.wgsl is a kernel; what kernels share lies in shaders/wgsl/shared"
        );
        let twin = root().join(format!("shaders/src/reference/{name}.rs"));
        assert!(twin.is_file(), "{name}.wgsl has no twin {}", twin.display());
    }
}

#[test]
fn every_file_says_what_lives_there_and_every_exception_why() {
    let sources = shipped();
    // A twin is one function, named as its file and documented itself.
    let twin = |path: &str| path.starts_with("shaders/src/reference/") && !path.ends_with("mod.rs");
    let speaks = |s: &&Source| s.text.starts_with("//!") || (twin(&s.path) && s.text.contains("\n/// "));
    let silent: Vec<_> = sources.iter().filter(|s| !speaks(s)).map(|s| &s.path).collect();
    assert!(silent.is_empty(), "the first line of a file says what lives there: {silent:?}");
    let attribute = |line: &str| line.contains("allow(") && line.trim_start().starts_with("#");
    for source in &sources {
        let code: Vec<_> = source.code.lines().collect();
        for (n, _) in code.iter().enumerate().filter(|(_, line)| attribute(line)) {
            let whole: String = code[n..].iter().take(4).copied().collect();
            let whole = whole.split(']').next().unwrap_or_default().to_string();
            assert!(whole.contains("reason"), "{}:{}: an exception gives its reason", source.path, n + 1);
        }
    }
}

#[test]
fn every_workspace_crate_takes_the_lints() {
    for krate in CRATES {
        let text = fs::read_to_string(root().join(krate).join("Cargo.toml")).expect("Cargo.toml");
        assert!(text.contains("\n[lints]\nworkspace = true"), "{krate}/Cargo.toml");
    }
}
