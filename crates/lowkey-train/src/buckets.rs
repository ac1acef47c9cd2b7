//! Many tensors as a few flat buckets, which is how gradients travel between the members of a world.

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Numbers of a bucket, 64 MiB: long enough that the start of a transfer costs nothing beside it.
pub(crate) const BUCKET: usize = 1 << 24;

/// Tensors one after the other in flat buckets of at most `most` numbers, but one tensor at least.
pub(crate) fn packed(tensors: Vec<Tensor<1>>, most: usize) -> Vec<Tensor<1>> {
    let (mut buckets, mut open, mut length) = (Vec::new(), Vec::new(), 0);
    for tensor in tensors {
        let more = tensor.dims()[0];
        if length + more > most && !open.is_empty() {
            buckets.push(Tensor::cat(std::mem::take(&mut open), 0));
            length = 0;
        }
        length += more;
        open.push(tensor);
    }
    if !open.is_empty() {
        buckets.push(Tensor::cat(open, 0));
    }
    buckets
}

/// The tensors of [`packed`] again.
pub(crate) fn unpacked(buckets: Vec<Tensor<1>>, lengths: impl Iterator<Item = usize>) -> Vec<Tensor<1>> {
    let mut buckets = buckets.into_iter();
    let (mut bucket, mut at) = (None, 0);
    let mut tensors = Vec::new();
    for length in lengths {
        if bucket.as_ref().is_none_or(|bucket: &Tensor<1>| at + length > bucket.dims()[0]) {
            (bucket, at) = (buckets.next(), 0);
        }
        if let Some(bucket) = &bucket {
            tensors.push(bucket.clone().narrow(0, at, length));
            at += length;
        }
    }
    tensors
}

pub(crate) fn read(bucket: Tensor<1>) -> Result<Vec<f32>> {
    bucket.try_into_vec_as::<f32>().map_err(|e| Error::Device { what: "gradients", why: format!("{e:?}") })
}

/// The sum of the replicas' buckets, in the order of the replicas.
pub(crate) fn sums(parts: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        for (total, part) in total.iter_mut().zip(part) {
            total.par_iter_mut().zip(part).for_each(|(total, x)| *total += x);
        }
    }
    total
}
