//! Compiles `bpf/*.bpf.c` with clang, links them into one object and makes its
//! skeleton: `$OUT_DIR/datapath.skel.rs`, whose types are the kernel contract.
//! Compiles `proto/` with protox, which needs no protoc.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::Linker;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=ui/dist");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = find_clang()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set: run cargo")?);
    compile_proto(&out)?;
    list_assets(&out)?;
    let object = out.join("datapath.bpf.o");
    let mut linker = Linker::new(&object)?;
    for source in sources()? {
        let stem = source.file_stem().and_then(|stem| stem.to_str()).context("naming an object")?;
        let compiled = out.join(stem).with_extension("o");
        SkeletonBuilder::new()
            .source(&source)
            .obj(&compiled)
            .clang(&clang)
            .clang_args(["-I", "bpf", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-mcpu=v3"])
            .build()
            .with_context(|| format!("compiling {} with {clang}", source.display()))?;
        linker.add_file(&compiled)?;
    }
    linker.link().context("linking the BPF objects")?;
    SkeletonBuilder::new()
        .obj(&object)
        .reference_obj(true)
        .generate(out.join("datapath.skel.rs"))
        .context("generating the skeleton")?;
    Ok(())
}

/// The messages and services of `proto/`, and their descriptors for JSON and reflection.
fn compile_proto(out: &Path) -> Result<()> {
    let files = ["flow/flow.proto", "observer/observer.proto", "peer/peer.proto", "relay/relay.proto"];
    let set = protox::compile(files, ["proto"]).context("compiling proto/")?;
    std::fs::write(out.join("hubble.fds"), prost::Message::encode_to_vec(&set))
        .context("writing the descriptors of proto/")?;
    // What a collector serves is no part of our own descriptors.
    let logs =
        protox::compile(["opentelemetry/logs.proto"], ["proto"]).context("compiling proto/opentelemetry")?;
    // An Envoy's wire is no part of them either.
    let envoy = protox::compile(["envoy/discovery.proto", "envoy/accesslog.proto"], ["proto"])
        .context("compiling proto/envoy")?;
    for set in [set, logs, envoy] {
        tonic_prost_build::configure()
            .build_transport(false)
            .emit_rerun_if_changed(false)
            .compile_fds(set)
            .context("generating code of proto/")?;
    }
    Ok(())
}

/// The files of the built page, which become part of the program; none where it was not built.
fn list_assets(out: &Path) -> Result<()> {
    let root = env::current_dir().context("finding this directory")?.join("ui/dist");
    let mut files = Vec::new();
    let mut directories = vec![root.clone()];
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir().into_iter().flatten() {
            let path = entry.context("listing ui/dist")?.path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    let mut text = "/// Path and content of every file.\nstatic ASSETS: &[(&str, &[u8])] = &[\n".to_owned();
    for file in files {
        let name = file.strip_prefix(&root).context("naming a file of ui/dist")?.display();
        text += &format!("    ({:?}, include_bytes!({:?})),\n", name.to_string(), file);
    }
    text += "];\n";
    std::fs::write(out.join("assets.rs"), text).context("listing the page's files")
}

fn sources() -> Result<Vec<PathBuf>> {
    let mut sources: Vec<PathBuf> = Path::new("bpf")
        .read_dir()
        .context("listing bpf/")?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.to_string_lossy().ends_with(".bpf.c"))
        .collect();
    sources.sort();
    Ok(sources)
}

/// The newest clang that is installed under a name that distributions use; `CLANG` overrides.
fn find_clang() -> Result<String> {
    if let Ok(clang) = env::var("CLANG") {
        return Ok(clang);
    }
    let candidates = (15..=22).rev().map(|version| format!("clang-{version}")).chain(["clang".to_owned()]);
    for clang in candidates {
        if Command::new(&clang).arg("--version").output().is_ok_and(|output| output.status.success()) {
            return Ok(clang);
        }
    }
    bail!("no clang found: run `make setup`, or set CLANG to a clang of version 15 or later")
}
