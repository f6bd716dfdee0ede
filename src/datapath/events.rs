//! Reads the ring buffer of events. The programs wake nobody up, so the reader
//! is called every few milliseconds; it never blocks. It maps the buffer itself:
//! libbpf's consumer wants its callback at creation, and calls it without a bound.
//! Of the data only a window is mapped, which moves on with the reading: every page
//! that is mapped counts as memory of the agent, and libbpf maps the data twice.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle, libbpf_sys};
use nix::libc::{MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::abi::{Event, Plain};

/// What stands before each record.
const HEADER: usize = libbpf_sys::BPF_RINGBUF_HDR_SZ as usize;
/// So much of the data is mapped at once: some thousands of events.
const WINDOW: usize = 512 << 10;
/// The longest record of any ring buffer; a window has room for it behind its first page.
const LONGEST: usize = 2048;

/// The one reader of the ring buffer. Dropping it stops the reading, not the writing.
pub struct EventReader {
    map: OwnedFd,
    /// One page, ours to write: how far we have read.
    consumer: Mapping,
    /// One page: how far the programs have written.
    producer: Mapping,
    /// The data from a position on, which is a multiple of the page size.
    window: Option<(u64, Mapping)>,
    page: usize,
    size: usize,
    malformed: u64,
}

impl EventReader {
    pub(super) fn new(map: &MapHandle) -> Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| usize::try_from(size).ok());
        let page = page.context("asking for the page size")?;
        let size = map.max_entries() as usize;
        let map = map.as_fd().try_clone_to_owned().context("keeping the ring buffer")?;
        let consumer = Mapping::new(&map, PROT_READ | PROT_WRITE, page, 0)?;
        let producer = Mapping::new(&map, PROT_READ, page, page)?;
        Ok(Self { map, consumer, producer, window: None, page, size, malformed: 0 })
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
            let header = self.header(position)?.load(Ordering::Acquire);
            if header & libbpf_sys::BPF_RINGBUF_BUSY_BIT != 0 {
                break;
            }
            let length = (header & !libbpf_sys::BPF_RINGBUF_DISCARD_BIT) as usize;
            if header & libbpf_sys::BPF_RINGBUF_DISCARD_BIT == 0 {
                match self.record(position, length)?.is_some_and(&mut each) {
                    true => count += 1,
                    false => self.malformed += 1,
                }
            }
            let taken = HEADER + length;
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

    fn header(&mut self, position: u64) -> Result<&AtomicU32> {
        let start = self.mapped(position, HEADER)?;
        // SAFETY: the header is within the mapping, which is not changed while self is borrowed, and records are
        // aligned to 8 bytes.
        Ok(unsafe { start.cast().as_ref() })
    }

    /// The bytes behind the header at `position`; `None` if no record is that long.
    fn record(&mut self, position: u64, length: usize) -> Result<Option<&[u8]>> {
        if length > LONGEST {
            return Ok(None);
        }
        let start = self.mapped(position, HEADER + length)?;
        // SAFETY: so many bytes are mapped, and the mapping is not changed while self is borrowed; the kernel does
        // not touch them before the consumer's position passes them.
        Ok(Some(unsafe { std::slice::from_raw_parts(start.byte_add(HEADER).as_ptr().cast(), length) }))
    }

    /// Where `length` bytes from `position` on are in our memory; the window moves there if it must. The data stands
    /// twice in a row in the file, so that a window may go beyond its end.
    fn mapped(&mut self, position: u64, length: usize) -> Result<NonNull<std::ffi::c_void>> {
        let end = position + length as u64;
        let is_in =
            |(start, mapping): &(u64, Mapping)| *start <= position && end <= start + mapping.length as u64;
        let (start, mapping) = match self.window.take().filter(is_in) {
            Some(window) => self.window.insert(window),
            None => {
                let start = position - position % self.page as u64;
                let offset = 2 * self.page + (start as usize & (self.size - 1));
                let length = WINDOW.min(self.size).max(2 * self.page);
                let mapping = Mapping::new(&self.map, PROT_READ, length, offset)?;
                self.window.insert((start, mapping))
            }
        };
        // SAFETY: the position is within the mapping, by what was asked or by where the window was put: it is longer
        // than a page and a record.
        Ok(unsafe { mapping.start.byte_add((position - *start) as usize) })
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
    fn new(map: &OwnedFd, access: i32, length: usize, offset: usize) -> Result<Self> {
        let (descriptor, offset) = (map.as_raw_fd(), i64::try_from(offset)?);
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
