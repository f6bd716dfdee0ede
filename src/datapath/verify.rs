//! Loads every program and reads what the verifier says about it, for `weir
//! verify` and the table of `make verify`.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use libbpf_rs::{AsRawLibbpf, Object, OpenObject, libbpf_sys};
use serde::Serialize;

use super::load::{load_object, prepare};
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
    /// Deepest stack of each function in bytes, as the kernel prints it: `main+called+...`.
    pub stack_depth: String,
}

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
    let loaded = loaded_instructions(&object)?;
    let rows = logs.iter().filter(|(program, _)| loaded.contains_key(*program)).map(|(program, log)| {
        let text = CStr::from_bytes_until_nul(log).unwrap_or_default().to_string_lossy();
        let loaded_instructions = loaded.get(program).copied().unwrap_or(0);
        Verification { program: program.clone(), loaded_instructions, ..parse(&text) }
    });
    Ok(rows.collect())
}

/// Preallocated maps need not be large to be verified against.
fn small_maps() -> MapSizes {
    ["connections", "nat", "sockets", "fragments"]
        .iter()
        .fold(MapSizes::default(), |sizes, map| sizes.with(map, 1024))
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

fn loaded_instructions(object: &Object) -> Result<BTreeMap<String, u64>> {
    let mut loaded = BTreeMap::new();
    for program in object.progs().filter(|program| program.autoload()) {
        let mut info = libbpf_sys::bpf_prog_info::default();
        let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
        // SAFETY: info is as long as the length says.
        let result = unsafe {
            libbpf_sys::bpf_obj_get_info_by_fd(
                program.as_fd().as_raw_fd(),
                (&raw mut info).cast(),
                &mut length,
            )
        };
        if result != 0 {
            return Err(std::io::Error::from_raw_os_error(-result)).context("reading a loaded program");
        }
        loaded.insert(program.name().to_string_lossy().into_owned(), u64::from(info.xlated_prog_len) / 8);
    }
    Ok(loaded)
}

fn parse(log: &str) -> Verification {
    let number_after = |key: &str| {
        let tail = log.split_once(key).map(|(_, tail)| tail.trim_start()).unwrap_or_default();
        tail.split(|c: char| !c.is_ascii_digit()).next().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    let stack = log.lines().find_map(|line| line.strip_prefix("stack depth "));
    Verification {
        verified_instructions: number_after("processed "),
        peak_states: number_after("peak_states "),
        verification_microseconds: number_after("verification time "),
        stack_depth: stack.unwrap_or_default().trim().to_owned(),
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
                stack_depth: "200+16".to_owned(),
                ..Verification::default()
            }
        );
        assert_eq!(parse(""), Verification::default());
    }
}
