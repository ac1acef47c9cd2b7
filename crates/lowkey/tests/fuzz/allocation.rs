//! An allocator that counts what the current thread holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with a count for each thread: the readers do their work on the thread that calls them, and the
/// tests run side by side.
pub(crate) struct Counting;

#[derive(Clone, Copy)]
struct Count {
    /// Bytes taken and not yet given back since [`start`]; below 0 where older ones were given back.
    live: isize,
    peak: isize,
    largest: usize,
}

const NONE: Count = Count { live: 0, peak: 0, largest: 0 };

thread_local! {
    // Without a destructor and without a lazy start, so that the allocator may use it at any time.
    static COUNT: Cell<Count> = const { Cell::new(NONE) };
}

/// What a piece of work took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Taken {
    /// Most bytes held at a time.
    pub(crate) peak: usize,
    /// Largest single request.
    pub(crate) largest: usize,
}

impl Taken {
    pub(crate) fn max(self, other: Self) -> Self {
        Self { peak: self.peak.max(other.peak), largest: self.largest.max(other.largest) }
    }
}

/// Begins to count on this thread.
pub(crate) fn start() {
    COUNT.set(NONE);
}

/// What was taken on this thread since [`start`].
pub(crate) fn taken() -> Taken {
    let count = COUNT.get();
    Taken { peak: count.peak.max(0).unsigned_abs(), largest: count.largest }
}

fn take(bytes: usize) {
    let mut count = COUNT.get();
    count.live = count.live.saturating_add_unsigned(bytes);
    count.peak = count.peak.max(count.live);
    count.largest = count.largest.max(bytes);
    COUNT.set(count);
}

fn give_back(bytes: usize) {
    let mut count = COUNT.get();
    count.live = count.live.saturating_sub_unsigned(bytes);
    COUNT.set(count);
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new may exist at the same time.
        take(size);
        give_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
