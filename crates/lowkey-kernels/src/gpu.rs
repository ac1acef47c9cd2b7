//! What several operations share on GPUs: products of CubeK, the choice between kernels, and what their launches need.
//!
//! Everything on GPUs is asynchronous: a call returns as soon as its kernels are queued, and nothing reads back, but where the first use
//! of a shape measures which kernel is fastest.

pub(crate) mod pointwise;
pub(crate) mod product;
pub(crate) mod profile;
pub(crate) mod properties;
pub(crate) mod rows;
pub(crate) mod tensors;
pub(crate) mod tune;
