//! Memory that is free goes back to the kernel.
//!
//! Loading the programs reads the types of the whole kernel: some 16 MB, once. The C library keeps what is freed of
//! it, as its heap never shrinks below what is still in use at its end.

/// Gives back what the C library keeps and nobody uses.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}
