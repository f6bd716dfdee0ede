//! Loads every program and reads what the verifier says about it, for `weir
//! verify` and the table of `make verify`.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use libbpf_rs::{AsRawLibbpf, OpenObject, libbpf_sys};
use serde::Serialize;

use super::load::{load_object, prepare};
use super::loaded_program::LoadedProgram;
use super::probe;
use super::settings::{AttachMode, MapSizes, Settings};

/// What the verifier needed for one program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Its name.
    pub program: String,
    /// Instructions that the verifier looked at; the kernel's limit is a million.
    pub verified_instructions: u64,
    /// Instructions of the program as loaded, without the branches that settings turn off.
    pub loaded_instructions: u64,
    /// States that the verifier held at once.
    pub peak_states: u64,
    /// Time that it took.
    pub verification_microseconds: u64,
    /// Bytes of stack that the deepest chain of calls takes, each frame in steps of 32 as Linux 6.1
    /// counts them; the kernel's limit is 512.
    pub stack_bytes: u32,
    /// The deepest chain: `from_pod 160 > flow_open 64 > ...`.
    pub stack_chain: String,
}

/// What the deepest chain of calls may take: the kernel's 512 bytes, less room for what is to come.
pub const STACK_LIMIT_BYTES: u32 = 512 - 96;

/// The verifier prints its statistics and nothing else.
const LOG_LEVEL_STATISTICS: u32 = 4;

/// Room for the statistics, or for the end of a refusal.
const LOG_BYTES: usize = 64 * 1024;

/// Loads every program with the given settings and maps of its own; sorted by name.
pub fn verify(settings: &Settings) -> Result<Vec<Verification>> {
    probe::check_requirements()?;
    let features = probe::probe(AttachMode::Auto)?;
    let mut object = prepare(settings, &small_maps(), None, &features)?.object;
    let logs = request_statistics(&mut object);
    let object = match load_object(object) {
        Ok(object) => object,
        // Once more without buffers of ours: then libbpf says where the verifier stopped.
        Err(error) => {
            load_object(prepare(settings, &small_maps(), None, &features)?.object)?;
            return Err(error);
        }
    };
    let mut rows = Vec::new();
    for program in object.progs().filter(|program| program.autoload()) {
        let name = program.name().to_string_lossy().into_owned();
        let Some(log) = logs.get(&name) else { continue };
        let text = CStr::from_bytes_until_nul(log).unwrap_or_default().to_string_lossy();
        let loaded = LoadedProgram::read(program.as_fd())
            .with_context(|| format!("reading the loaded program {name}"))?;
        let (stack_bytes, stack_chain) = loaded.deepest_chain(&stack_depths(&text));
        let loaded_instructions = loaded.instructions.len() as u64;
        rows.push(Verification {
            program: name,
            loaded_instructions,
            stack_bytes,
            stack_chain,
            ..parse(&text)
        });
    }
    rows.sort_by(|a, b| a.program.cmp(&b.program));
    Ok(rows)
}

/// Preallocated maps need not be large to be verified against.
fn small_maps() -> MapSizes {
    ["connections", "nat"].iter().fold(MapSizes::default(), |sizes, map| sizes.with(map, 1024))
}

/// Gives every program a log of its own. The logs must outlive the loading.
fn request_statistics(object: &mut OpenObject) -> BTreeMap<String, Vec<u8>> {
    let mut logs = BTreeMap::new();
    for mut program in object.progs_mut() {
        let mut log = vec![0_u8; LOG_BYTES];
        program.set_log_level(LOG_LEVEL_STATISTICS);
        // SAFETY: the program is open; the buffer is on the heap, so it stays where
        // it is when the vector moves, and the caller keeps it until after the load.
        unsafe {
            libbpf_sys::bpf_program__set_log_buf(
                program.as_libbpf_object().as_ptr(),
                log.as_mut_ptr().cast(),
                LOG_BYTES as libbpf_sys::size_t,
            );
        }
        logs.insert(program.name().to_string_lossy().into_owned(), log);
    }
    logs
}

/// The stack of each function in bytes, in the order of the functions' first instructions.
fn stack_depths(log: &str) -> Vec<u32> {
    let depths = log.lines().find_map(|line| line.strip_prefix("stack depth ")).unwrap_or_default();
    depths.trim().split('+').map_while(|depth| depth.parse().ok()).collect()
}

fn parse(log: &str) -> Verification {
    let number_after = |key: &str| {
        let tail = log.split_once(key).map(|(_, tail)| tail.trim_start()).unwrap_or_default();
        tail.split(|c: char| !c.is_ascii_digit()).next().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    Verification {
        verified_instructions: number_after("processed "),
        peak_states: number_after("peak_states "),
        verification_microseconds: number_after("verification time "),
        ..Verification::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_statistics_are_read() {
        let log = "\
verification time 1742 usec
stack depth 200+16
processed 5121 insns (limit 1000000) max_states_per_insn 6 total_states 311 peak_states 190 mark_read 0
";
        assert_eq!(
            parse(log),
            Verification {
                verified_instructions: 5121,
                peak_states: 190,
                verification_microseconds: 1742,
                ..Verification::default()
            }
        );
        assert_eq!(stack_depths(log), [200, 16]);
        assert_eq!((parse(""), stack_depths("")), (Verification::default(), Vec::new()));
    }
}
