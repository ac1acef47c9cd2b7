//! Work in pieces: how large they are, one buffer with several writers, and what a thread keeps from one piece to the next.

use std::cell::Cell;
use std::thread::LocalKey;

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

/// Parts of at most `most` of something, each with where it begins; of nothing one, which is empty.
pub(crate) fn parts(of: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..of.max(1)).step_by(most).map(move |from| (from, most.min(of - from)))
}

/// Works with what a thread keeps. It is taken away meanwhile: a thread that waits for others may begin the same work for another, and
/// makes its own.
pub(crate) fn with_kept<T, R>(
    kept: &'static LocalKey<Cell<Option<T>>>,
    make: impl FnOnce() -> T,
    work: impl FnOnce(&mut T) -> R,
) -> R {
    let mut room = kept.take().unwrap_or_else(make);
    let done = work(&mut room);
    kept.set(Some(room));
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_inside_other_work_has_room_of_its_own_and_what_is_kept_is_used_again() {
        thread_local!(static ROOM: Cell<Option<Vec<f32>>> = const { Cell::new(None) });
        with_kept(
            &ROOM,
            || vec![0.0; 40],
            |outer| {
                outer.fill(1.0);
                with_kept(&ROOM, || vec![0.0; 1000], |inner| inner.fill(2.0));
                assert!(outer.iter().all(|x| *x == 1.0) && outer.len() >= 40);
            },
        );
        with_kept(&ROOM, Vec::new, |room| assert_eq!(*room, [1.0; 40]));
    }

    #[test]
    fn parts_are_all_of_it_in_order() {
        assert!(parts(10, 4).eq([(0, 4), (4, 4), (8, 2)]) && parts(4, 4).eq([(0, 4)]) && parts(0, 4).eq([(0, 0)]));
    }
}
