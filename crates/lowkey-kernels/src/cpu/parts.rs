//! Work in parallel pieces: how large they are, and one buffer with several writers.

/// Elements per parallel piece: large enough to hide the cost of handing it out.
pub(crate) const PIECE: usize = 1 << 14;

/// A buffer whose parts are written by several tasks, each its own ranges.
pub(crate) struct Parts<'a> {
    start: *mut f32,
    len: usize,
    buffer: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Parts` only hands out ranges through `Parts::range`, whose callers promise that no two of them overlap.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    pub(crate) fn new(buffer: &'a mut [f32]) -> Self {
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: std::marker::PhantomData }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// While the returned slice lives, no other range that overlaps it may be asked for.
    #[expect(clippy::mut_from_ref, reason = "tasks write disjoint ranges of one buffer")]
    pub(crate) unsafe fn range(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at <= self.len && len <= self.len - at, "range exceeds its buffer");
        // SAFETY: in bounds by the assertion, of a buffer borrowed mutably for longer than `self`, and unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
    /// Where rows of `width` numbers begin, `stride` apart, the first at `at`. All of them lie in the buffer; who writes there answers
    /// for no two tasks using the same ones.
    pub(crate) fn rows(&self, at: usize, [count, width]: [usize; 2], stride: usize) -> *mut f32 {
        let end = at + count.saturating_sub(1) * stride + width;
        assert!(count == 0 || width == 0 || end <= self.len && width <= stride, "rows exceed their buffer");
        // In bounds by the assertion where anything is written at all.
        self.start.wrapping_add(at)
    }
}
