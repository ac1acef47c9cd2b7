//! Causal attention on matrix units: the algorithm of [`super::tiles`] with operands of 16 bits and sums of 32.
//!
//! A plane owns `m` rows of a product (queries, or keys for the gradients of keys and values) and a cube several planes, which share
//! the block on the other side in shared memory. Sums of outputs and gradients stay in the units' registers all the way; only scores
//! go through shared memory, where each row's softmax is taken in f32.
//!
//! What a matrix unit's register holds of which row is the device's secret, so a growing maximum cannot rescale the sums in place. It
//! seldom has to: the maximum that the exponentials refer to follows only when a row outgrows it by [`SLACK`], as any reference near
//! the maximum gives the same quotient (the rescaling that FlashAttention-4 skips). Only then do the sums go through shared memory.

pub(super) mod backward;
pub(super) mod forward;
mod geometry;
mod parts;

pub(super) use geometry::{Geometry, Widths, geometries};
