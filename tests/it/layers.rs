//! Which module of src/ may use which: no circles, and no edge that nobody decided on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules from top to bottom, each with those that it uses. A module uses only modules below its own
/// line, so there are no circles. A new module is a line here; so is a new edge a word.
const LAYERS: &[(&str, &str)] = &[
    (
        "cli",
        "agent operator proxy relay hubble cni api encryption endpoint telemetry flow kube policy identity datapath netlink \
         tables model settings signals yaml error",
    ),
    (
        "agent",
        "hubble endpoint encryption cni api telemetry flow kube policy node egress service identity datapath netlink tables \
         model settings signals backoff files error",
    ),
    ("operator", "hubble telemetry kube service model settings signals error"),
    ("proxy", "netlink model settings"),
    ("relay", "hubble telemetry signals settings error"),
    ("hubble", "api telemetry flow kube policy datapath tables model settings yaml error"),
    ("endpoint", "cni telemetry ipam netlink tables model files"),
    ("encryption", "netlink model settings files error"),
    ("cni", "api netlink model settings files"),
    ("api", "telemetry flow policy datapath model"),
    ("telemetry", "flow datapath model error"),
    ("flow", "datapath tables model settings error"),
    ("kube", "policy identity tables model settings yaml backoff files error"),
    ("policy", "identity tables model"),
    ("node", "tables model"),
    ("egress", "tables model"),
    ("service", "tables model settings"),
    ("identity", "model"),
    ("datapath", "model settings error"),
    ("netlink", "model"),
    ("ipam", ""),
    ("tables", ""),
    ("model", ""),
    ("settings", ""),
    ("signals", ""),
    ("yaml", ""),
    ("backoff", ""),
    ("files", ""),
    ("error", ""),
];

/// For each edge between modules, the files that need it.
type Edges = BTreeMap<(String, String), BTreeSet<PathBuf>>;

#[test]
fn modules_use_only_what_is_below_them() {
    let place = |name: &str| LAYERS.iter().position(|(module, _)| *module == name);
    let allowed = |from: &str, to: &str| {
        let (_, uses) = LAYERS.iter().find(|(module, _)| *module == from)?;
        uses.split_whitespace().any(|module| module == to).then_some(())
    };
    let mut faults = Vec::new();
    for (from, uses) in LAYERS {
        for to in uses.split_whitespace().filter(|to| place(to) <= place(from)) {
            faults.push(format!("LAYERS: {to} must be below {from}"));
        }
    }
    let edges = edges();
    for ((from, to), files) in &edges {
        if allowed(from, to).is_none() {
            faults.push(format!(
                "{from} uses {to}: in {files:?}. Decided? Then add it to LAYERS in {}",
                file!()
            ));
        }
    }
    for (from, uses) in LAYERS {
        for to in uses.split_whitespace().filter(|to| !edges.contains_key(&((*from).into(), (*to).into()))) {
            faults.push(format!("{from} does not use {to}: take it out of LAYERS in {}", file!()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn paths_are_found_in_all_their_forms() {
    let text = "use crate::api::{self, Client};\n// use crate::comment;\n/// [crate::doc]\nuse crate::{error, \
                flow::{Names, Query}, kube};\nfn f() -> crate::model::Pod { /* crate::block */ }\n#[cfg(test)]\n\
                mod tests { use crate::tests_only; }\n";
    let found = used_modules(text);
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["api", "error", "flow", "kube", "model"]);
}

fn edges() -> Edges {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut edges = Edges::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("src can be read") {
            let path = entry.expect("src can be read").path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let inside = path.strip_prefix(&root).expect("below src").to_owned();
            let Some(module) = module_of(&inside) else { continue };
            let text = fs::read_to_string(&path).expect("a source file is text");
            for used in used_modules(&text).into_iter().filter(|used| *used != module) {
                edges.entry((module.clone(), used)).or_default().insert(inside.clone());
            }
        }
    }
    edges
}

/// The module that a file belongs to; none for tests, the crate's root and the programs.
fn module_of(file: &Path) -> Option<String> {
    let is_test =
        file.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests.rs" | "tests")));
    let first = file.components().next()?.as_os_str().to_str()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    let is_rust = file.extension().is_some_and(|extension| extension == "rs");
    (is_rust && !is_test && !["lib", "bin"].contains(&module)).then(|| module.to_owned())
}

/// The modules that stand behind `crate::`, outside of comments and tests.
fn used_modules(text: &str) -> BTreeSet<String> {
    let code = without_comments(text.split("#[cfg(test)]\nmod ").next().unwrap_or_default());
    let mut used = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let names = match rest.strip_prefix('{') {
            Some(group) => top_level(group),
            None => vec![rest],
        };
        let word = |name: &str| {
            let end =
                name.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(name.len());
            name[..end].to_owned()
        };
        used.extend(names.into_iter().map(str::trim).map(word).filter(|name| !name.is_empty()));
    }
    used
}

/// The parts of `a, b::{c, d}, e}...` that stand between its outermost commas.
fn top_level(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (place, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => {
                parts.push(&group[start..place]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[start..place]);
                start = place + 1;
            }
            _ => {}
        }
    }
    parts
}

fn without_comments(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        code.push_str(line.split("//").next().unwrap_or_default());
        code.push('\n');
    }
    while let Some(start) = code.find("/*") {
        let end = code[start..].find("*/").map_or(code.len(), |end| start + end + 2);
        code.replace_range(start..end, "");
    }
    code
}
