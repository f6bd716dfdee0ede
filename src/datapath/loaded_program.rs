//! A program as the kernel has it after verification: its instructions, its functions, and which
//! function calls which.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use libbpf_rs::btf::{Btf, BtfType, TypeId};
use libbpf_rs::libbpf_sys;

/// Codes of instructions: include/uapi/linux/bpf.h.
const CALL: u8 = 0x85;
const LOAD_ADDRESS: u8 = 0x18;
const PSEUDO_CALL: u8 = 1;
const PSEUDO_FUNCTION: u8 = 4;

/// Linux 6.1 counts a frame in steps of so many bytes; later kernels take 16.
const FRAME_STEP: u32 = 32;

/// What the kernel says of a loaded program.
pub(super) struct LoadedProgram {
    /// The instructions that are left after verification.
    pub(super) instructions: Vec<libbpf_sys::bpf_insn>,
    /// First instruction and name of each function, in order.
    functions: Vec<(usize, String)>,
}

impl LoadedProgram {
    /// Asks the kernel.
    pub(super) fn read(program: BorrowedFd<'_>) -> Result<Self> {
        let mut info = libbpf_sys::bpf_prog_info::default();
        ask(program, &mut info)?;
        let mut instructions = vec![libbpf_sys::bpf_insn::default(); info.xlated_prog_len as usize / 8];
        let mut functions = vec![libbpf_sys::bpf_func_info::default(); info.nr_func_info as usize];
        let mut info = libbpf_sys::bpf_prog_info {
            xlated_prog_len: info.xlated_prog_len,
            xlated_prog_insns: instructions.as_mut_ptr().expose_provenance() as u64,
            nr_func_info: info.nr_func_info,
            func_info_rec_size: size_of::<libbpf_sys::bpf_func_info>() as u32,
            func_info: functions.as_mut_ptr().expose_provenance() as u64,
            ..libbpf_sys::bpf_prog_info::default()
        };
        ask(program, &mut info)?;
        let types = Btf::from_prog_id(info.id).context("reading the program's types")?;
        let name = |id: u32| {
            let function = types.type_by_id::<BtfType<'_>>(TypeId::from(id));
            let name = function.and_then(|function| function.name()?.to_str().map(str::to_owned));
            name.unwrap_or_else(|| format!("function {id}"))
        };
        let functions =
            functions.iter().map(|function| (function.insn_off as usize, name(function.type_id))).collect();
        Ok(Self { instructions, functions })
    }

    /// The chain of calls that takes most stack: its bytes, and its functions with their frames.
    pub(super) fn deepest_chain(&self, depths: &[u32]) -> (u32, String) {
        let mut chains = BTreeMap::new();
        self.chain_from(0, &self.calls(), depths, &mut chains);
        chains.remove(&0).unwrap_or_default()
    }

    /// The deepest chain that begins with a function; the verifier allows no recursion.
    fn chain_from(
        &self,
        function: usize,
        calls: &[Vec<usize>],
        depths: &[u32],
        chains: &mut BTreeMap<usize, (u32, String)>,
    ) {
        if chains.contains_key(&function) {
            return;
        }
        let mut deepest = (0, String::new());
        for callee in calls.get(function).into_iter().flatten() {
            self.chain_from(*callee, calls, depths, chains);
            if let Some(chain) = chains.get(callee).filter(|chain| chain.0 > deepest.0) {
                deepest = chain.clone();
            }
        }
        let frame = depths.get(function).copied().unwrap_or(0).max(1).next_multiple_of(FRAME_STEP);
        let name = self.functions.get(function).map_or("?", |(_, name)| name);
        let called = if deepest.1.is_empty() { String::new() } else { format!(" > {}", deepest.1) };
        chains.insert(function, (frame + deepest.0, format!("{name} {frame}{called}")));
    }

    /// For each function those that it calls, itself or by way of a helper such as bpf_loop.
    fn calls(&self) -> Vec<Vec<usize>> {
        let function_at = |instruction: usize| {
            self.functions.partition_point(|(start, _)| *start <= instruction).saturating_sub(1)
        };
        let mut calls = vec![Vec::new(); self.functions.len()];
        for (at, instruction) in self.instructions.iter().enumerate() {
            let distance = match (instruction.code, instruction.src_reg()) {
                // The kernel leaves the distance in `off` when it has compiled the program.
                (CALL, PSEUDO_CALL) => i64::from(instruction.off),
                (LOAD_ADDRESS, PSEUDO_FUNCTION) => i64::from(instruction.imm),
                _ => continue,
            };
            let Ok(target) = usize::try_from(at as i64 + distance + 1) else { continue };
            let (caller, callee) = (function_at(at), function_at(target));
            if caller != callee && !calls[caller].contains(&callee) {
                calls[caller].push(callee);
            }
        }
        calls
    }
}

fn ask(program: BorrowedFd<'_>, info: &mut libbpf_sys::bpf_prog_info) -> Result<()> {
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: info is as long as the length says; its pointers are null, or lead to vectors that have
    // as many elements as their lengths say and outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(program.as_raw_fd(), std::ptr::from_mut(info).cast(), &mut length)
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result)).context("asking the kernel about a program");
    }
    Ok(())
}
