//! One bit for each token: whether it is learnt.

use std::ops::Range;

/// Bits that are collected one after the other, the lowest of a byte first.
#[derive(Debug, Default)]
pub(super) struct Mask {
    bytes: Vec<u8>,
    length: usize,
}

impl Mask {
    /// Appends bits.
    pub(super) fn extend(&mut self, bits: impl Iterator<Item = bool>) {
        for bit in bits {
            if self.length.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= u8::from(bit) << (self.length % 8);
            }
            self.length += 1;
        }
    }

    /// The bytes, the last filled up with 0.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// The bytes that hold the bits in `range`.
pub(super) fn bytes(range: Range<usize>) -> Range<usize> {
    range.start / 8..range.end.div_ceil(8)
}

/// `count` bits of `bytes`, from bit number `first` on.
pub(super) fn bits(bytes: &[u8], first: usize, count: usize) -> impl Iterator<Item = bool> {
    (first..first + count).map(|i| bytes.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1))
}
