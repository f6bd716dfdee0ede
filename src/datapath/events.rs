//! Reads the ring buffer of events. The programs wake nobody up, so the reader
//! is called every few milliseconds; it never blocks. It maps the buffer itself:
//! libbpf's consumer wants its callback at creation, and calls it without a bound.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle, libbpf_sys};
use nix::libc::{MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::abi::{Event, Plain};

/// The one reader of the ring buffer. Dropping it stops the reading, not the writing.
pub struct EventReader {
    /// Keeps the map alive.
    _map: OwnedFd,
    /// One page, ours to write: how far we have read.
    consumer: Mapping,
    /// One page, how far the programs have written; then the data, twice in a row.
    producer: Mapping,
    page: usize,
    size: usize,
    malformed: u64,
}

impl EventReader {
    pub(super) fn new(map: &MapHandle) -> Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| usize::try_from(size).ok());
        let page = page.context("asking for the page size")?;
        let size = map.max_entries() as usize;
        let consumer = Mapping::new(map, PROT_READ | PROT_WRITE, page, 0)?;
        let producer = Mapping::new(map, PROT_READ, page + 2 * size, page)?;
        let descriptor = map.as_fd().try_clone_to_owned().context("keeping the ring buffer")?;
        Ok(Self { _map: descriptor, consumer, producer, page, size, malformed: 0 })
    }

    /// Calls `each` for what is there now, in order, at most one buffer full; how many.
    pub fn consume(&mut self, mut each: impl FnMut(&Event)) -> Result<usize> {
        self.consume_bytes(|bytes| Event::from_bytes(bytes).map(|event| each(&event)).is_some())
    }

    /// The same of records of any kind, while `each` understands them.
    pub fn consume_bytes(&mut self, mut each: impl FnMut(&[u8]) -> bool) -> Result<usize> {
        let mut position = self.consumer_position().load(Ordering::Relaxed);
        let end = position.saturating_add(self.size as u64);
        let mut count = 0;
        while position < end && position < self.producer_position().load(Ordering::Acquire) {
            let header = self.header(position).load(Ordering::Acquire);
            if header & libbpf_sys::BPF_RINGBUF_BUSY_BIT != 0 {
                break;
            }
            let length = (header & !libbpf_sys::BPF_RINGBUF_DISCARD_BIT) as usize;
            if header & libbpf_sys::BPF_RINGBUF_DISCARD_BIT == 0 {
                match self.record(position, length).is_some_and(&mut each) {
                    true => count += 1,
                    false => self.malformed += 1,
                }
            }
            let taken = libbpf_sys::BPF_RINGBUF_HDR_SZ as usize + length;
            position += taken.next_multiple_of(8) as u64;
            self.consumer_position().store(position, Ordering::Release);
        }
        Ok(count)
    }

    /// Records that were no events; never more than 0 unless the contract is broken.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Bytes that wait to be read.
    pub fn backlog_bytes(&self) -> u64 {
        let written = self.producer_position().load(Ordering::Acquire);
        written.saturating_sub(self.consumer_position().load(Ordering::Relaxed))
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the page begins with the position; it is mapped as long as self
        // lives, aligned, and shared with the kernel, which treats it as atomic.
        unsafe { self.consumer.start.cast().as_ref() }
    }

    fn producer_position(&self) -> &AtomicU64 {
        // SAFETY: as above; we only read it.
        unsafe { self.producer.start.cast().as_ref() }
    }

    fn header(&self, position: u64) -> &AtomicU32 {
        let offset = self.page + (position as usize & (self.size - 1));
        // SAFETY: the offset is within the mapping, and records are aligned to 8 bytes.
        unsafe { self.producer.start.byte_add(offset).cast().as_ref() }
    }

    /// The bytes behind the header at `position`.
    fn record(&self, position: u64, length: usize) -> Option<&[u8]> {
        let header = libbpf_sys::BPF_RINGBUF_HDR_SZ as usize;
        let offset = self.page + (position as usize & (self.size - 1)) + header;
        if length > self.size {
            return None;
        }
        // SAFETY: the data is mapped twice in a row, so a record of at most `size`
        // bytes that begins in the first half is contiguous; the kernel does not
        // touch it before the consumer's position passes it.
        Some(unsafe {
            std::slice::from_raw_parts(self.producer.start.byte_add(offset).as_ptr().cast(), length)
        })
    }
}

/// A piece of the ring buffer in our memory.
struct Mapping {
    start: NonNull<std::ffi::c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(map: &MapHandle, access: i32, length: usize, offset: usize) -> Result<Self> {
        let (descriptor, offset) = (map.as_fd().as_raw_fd(), i64::try_from(offset)?);
        // SAFETY: the kernel chooses a free range; the descriptor is the ring buffer's.
        let start = unsafe { mmap(std::ptr::null_mut(), length, access, MAP_SHARED, descriptor, offset) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != MAP_FAILED => Ok(Self { start, length }),
            _ => Err(io::Error::last_os_error()).context("mapping the ring buffer"),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference outlives self.
        if unsafe { munmap(self.start.as_ptr(), self.length) } != 0 {
            tracing::warn!("the ring buffer stays mapped");
        }
    }
}
