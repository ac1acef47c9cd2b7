//! Where the program's memory comes from.
//!
//! Training takes and frees the same tensors all the time. The system's allocator gives each back to the kernel at once, and getting
//! cleared pages anew cost a quarter of the quickstart's time, so what is freed is kept. Then it matters who may use it again: activations
//! are freed while gradients of other sizes come, on whichever thread. mimalloc, the best there is for small blocks, keeps blocks of
//! different sizes and threads apart, and a training step held up to a third more than it used. So what is large comes from one heap for
//! all threads, in which free neighbours join (talc, after Lea's allocator).
//!
//! Nothing here may allocate by itself, and what locks must not either: the standard library's mutex does not.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mimalloc::MiMalloc;
use talc::base::{Talc, binning::Binning};
use talc::source::Source;

/// Small blocks from mimalloc, large ones from a heap of all threads.
pub(crate) struct Allocator {
    large: Mutex<Talc<Spans, Bins>>,
}

/// Bytes from which on a block is large: below, there are so many that threads would wait for each other.
const LARGE: usize = 1 << Bins::LEAST_LOG;

impl Allocator {
    pub(crate) const fn new() -> Self {
        Self { large: Mutex::new(Talc::new(Spans::NONE)) }
    }

    fn large(&self) -> MutexGuard<'_, Talc<Spans, Bins>> {
        self.large.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A large block, of which the bytes from the returned place on were never written to, but for what [`MARKS`] says.
    fn take(&self, layout: Layout) -> Option<(NonNull<u8>, usize)> {
        let mut heap = self.large();
        let layout = rounded(layout);
        // SAFETY: the size is not zero.
        let block = unsafe { heap.allocate(layout) }?;
        let unwritten = heap.source.written_to(block.addr().get() + layout.size());
        Some((block, unwritten))
    }
}

// SAFETY: each block comes from one of two allocators, and goes back to the same one: its size says which it was. Both return what a
// layout asks for, or null. Neither unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() < LARGE {
            // SAFETY: as this function.
            return unsafe { MiMalloc.alloc(layout) };
        }
        self.take(layout).map_or(null_mut(), |(block, _)| block.as_ptr())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() < LARGE {
            // SAFETY: as this function.
            return unsafe { MiMalloc.alloc_zeroed(layout) };
        }
        let Some((block, unwritten)) = self.take(layout) else { return null_mut() };
        let size = layout.size();
        // Pages that nobody has used stay the kernel's until somebody does: long caches are asked for whole.
        let dirty = (unwritten.saturating_sub(block.addr().get()) + MARKS).min(size);
        let tail = size.saturating_sub(MARKS).max(dirty);
        // SAFETY: both parts lie in the block.
        unsafe {
            block.write_bytes(0, dirty);
            block.add(tail).write_bytes(0, size - tail);
        }
        block.as_ptr()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() < LARGE {
            // SAFETY: as this function; blocks of this size are mimalloc's.
            return unsafe { MiMalloc.dealloc(block, layout) };
        }
        // SAFETY: blocks of this size are the heap's, taken with the same layout.
        unsafe { self.large().deallocate(block, rounded(layout)) };
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if layout.size().max(new_size) < LARGE {
            // SAFETY: as this function; blocks of this size are mimalloc's.
            return unsafe { MiMalloc.realloc(block, layout, new_size) };
        }
        // SAFETY: the caller's `new_size` is not zero, and does not overflow with the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if layout.size().min(new_size) >= LARGE {
            let (old, new) = (rounded(layout), rounded(new));
            let mut heap = self.large();
            // SAFETY: the block was taken with this layout.
            if unsafe { heap.try_realloc_in_place(block, old, new.size()) } {
                heap.source.written_to(block.addr() + new.size());
                return block;
            }
        }
        // SAFETY: as this function; the two blocks do not overlap, and both hold what is copied.
        unsafe {
            let copy = self.alloc(new);
            if !copy.is_null() {
                copy.copy_from_nonoverlapping(block, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            copy
        }
    }
}

/// The heap's own marks at either end of free memory, in bytes, rounded up.
const MARKS: usize = 64;

/// The layout that a large block is taken with: sizes are rounded up to the smallest of a bin, 1.6 % at most, so that a block that was
/// freed serves the next one of its size. What is free of a bin may else be too small for what would lie in it.
fn rounded(layout: Layout) -> Layout {
    /// What the heap adds, rounded up.
    const TAIL: usize = 16;
    let size = layout.size().saturating_add(TAIL);
    let step = 1 << (size.ilog2() - Bins::PARTS_LOG);
    let size = size.checked_next_multiple_of(step).map_or(layout.size(), |size| size - TAIL);
    Layout::from_size_align(size, layout.align()).unwrap_or(layout)
}

/// Free memory by its size, in 64 steps from each power of two to the next.
struct Bins;

impl Bins {
    const LEAST_LOG: u32 = 14;
    const PARTS_LOG: u32 = 8;
}

impl Binning for Bins {
    /// Up to 16 GiB; more is looked for one by one.
    type AvailabilityBitField = [u64; 80];
    const BIN_COUNT: u32 = 80 * 64 - 1;

    fn size_to_bin(size: usize) -> u32 {
        let log = size.max(1).ilog2();
        if log < Self::LEAST_LOG {
            return 0;
        }
        let part = (size >> (log - Self::PARTS_LOG)) as u32 - (1 << Self::PARTS_LOG);
        1 + ((log - Self::LEAST_LOG) << Self::PARTS_LOG) + part
    }
}

/// The memory of the heap: spans of addresses from mimalloc, which become memory as they are used, and stay.
#[derive(Clone, Copy, Debug)]
struct Spans {
    /// Those in use, in the order in which they were taken.
    spans: [Span; Spans::MOST],
    count: usize,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    base: usize,
    end: usize,
    /// The end of the last block that ever was in it: nothing behind was written to.
    unwritten: usize,
}

impl Spans {
    /// Far more than there are; of more than these it is not known what was written to.
    const MOST: usize = 128;
    /// Bytes of a span, by preference; the later ones where addresses are limited. No block lies in two of them, and what does not fit into
    /// the rest of one leaves it free: a step over 8,192 tokens took 1,055 MiB with spans of 1 GiB, and 672 with a longer one.
    const SIZES: &[usize] = if cfg!(all(unix, target_pointer_width = "64")) {
        &[16 << 30, 1 << 30, 256 << 20]
    } else {
        // Elsewhere what is reserved counts as used.
        &[256 << 20]
    };
    const SMALLEST_STEP: usize = 4 << 20;
    const ALIGN: usize = 2 << 20;
    const NONE: Self = Self { spans: [Span { base: 0, end: 0, unwritten: 0 }; Self::MOST], count: 0 };

    /// A block that ends at `end` is in use. Returns the address from which on its memory was never written to.
    fn written_to(&mut self, end: usize) -> usize {
        let of_it = |span: &&mut Span| span.base < end && end <= span.end;
        match self.spans[..self.count].iter_mut().find(of_it) {
            Some(span) => {
                let unwritten = span.unwritten;
                span.unwritten = unwritten.max(end);
                unwritten
            }
            // One too many: nothing is known of it.
            None => end,
        }
    }
}

// SAFETY: what is claimed is never given back, and nothing else has it.
unsafe impl Source for Spans {
    fn acquire<B: Binning>(heap: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        /// More than the tables of the heap and its marks.
        const BESIDE: usize = 64 << 10;
        let needed = layout.size().checked_add(layout.align()).and_then(|size| size.checked_add(BESIDE)).ok_or(())?;
        for size in Self::SIZES.iter().chain([&0]) {
            let size = needed.max(*size).checked_next_multiple_of(Self::SMALLEST_STEP).ok_or(())?;
            let layout = Layout::from_size_align(size, Self::ALIGN).map_err(|_| ())?;
            // SAFETY: the size is not zero; the span is the heap's alone from here on.
            let claimed = unsafe {
                let base = MiMalloc.alloc_zeroed(layout);
                if base.is_null() {
                    continue;
                }
                heap.claim(base, size).map(|_| base.addr())
            };
            let base = claimed.ok_or(())?;
            let source = &mut heap.source;
            if let Some(span) = source.spans.get_mut(source.count) {
                *span = Span { base, end: base + size, unwritten: base + BESIDE };
                source.count += 1;
            }
            return Ok(());
        }
        Err(())
    }
}

/// Has mimalloc keep freed memory for the next step instead of handing it back after a second.
pub(crate) fn keep_freed_memory() {
    /// `mi_option_purge_delay` of `mimalloc.h`, and its default.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    const DEFAULT_MS: std::ffi::c_long = 1000;
    const NEVER: std::ffi::c_long = -1;
    // SAFETY: both functions only read and write an integer in the allocator's table of options. The default is compared so
    // that a later version that numbers its options anew is left alone, as is a user's own MIMALLOC_PURGE_DELAY.
    unsafe {
        if libmimalloc_sys::mi_option_get(PURGE_DELAY) == DEFAULT_MS {
            libmimalloc_sys::mi_option_set(PURGE_DELAY, NEVER);
        }
    }
}

#[cfg(test)]
mod tests;
