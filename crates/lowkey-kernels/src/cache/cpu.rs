//! The operations on a cache on the CPU, which reads it where it lies.

mod absorbed;
mod chunk;
mod numbers;

use burn::backend::Flex;
use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;
use half::{bf16, f16};

use self::numbers::{Numbers, Vectors};
use super::autodiff::CacheOps;
use crate::cpu::bf16::Unit;
use crate::cpu::tensors::{dims, integers, new};
use crate::latent_attention::arguments::MlaDims;
use crate::precision::Precision;

/// Vectors `[.., keys, width]` that lie side by side in `outer` stretches, `distance` vectors from start to start. A cache is a
/// long buffer of which the filled part is a view: it is read where it lies.
struct Stretches {
    tensor: FlexTensor,
    outer: usize,
    keys: usize,
    width: usize,
    distance: usize,
}

impl Stretches {
    fn new(tensor: &FlexTensor) -> Self {
        let shape = tensor.layout().shape().clone();
        let rank = shape.num_dims();
        let (keys, width) = (shape[rank - 2], shape[rank - 1]);
        let outer = (0..rank - 2).map(|axis| shape[axis]).product();
        let (tensor, distance) = match distance_of(tensor) {
            Some(distance) => (tensor.clone(), distance),
            None => (tensor.to_contiguous(), keys),
        };
        Self { tensor, outer, keys, width, distance }
    }

    /// From the first vector on.
    fn numbers(&self) -> Numbers<'_> {
        let start = self.tensor.layout().start_offset();
        match self.tensor.dtype() {
            DType::BF16 => Numbers::Bf16(&self.tensor.storage::<bf16>()[start..]),
            DType::F16 => Numbers::F16(&self.tensor.storage::<f16>()[start..]),
            _ => Numbers::F32(&self.tensor.storage()[start..]),
        }
    }
}

/// Vectors from the start of one stretch to the next, where there is one such distance.
fn distance_of(tensor: &FlexTensor) -> Option<usize> {
    let (shape, strides) = (tensor.layout().shape(), tensor.layout().strides());
    let rank = shape.num_dims();
    let (keys, width) = (shape[rank - 2], shape[rank - 1]);
    let beside = |axis: usize, stride: usize| shape[axis] == 1 || strides[axis] == stride as isize;
    if !beside(rank - 1, 1) || !beside(rank - 2, width) {
        return None;
    }
    let mut distance: Option<(usize, usize)> = None;
    for axis in (0..rank - 2).rev().filter(|axis| shape[*axis] > 1) {
        let stride = usize::try_from(strides[axis]).ok()?;
        match &mut distance {
            None => distance = Some((stride, shape[axis])),
            Some((first, count)) if stride == *first * *count => *count *= shape[axis],
            Some(_) => return None,
        }
    }
    let stride = distance.map_or(keys * width, |(stride, _)| stride);
    stride.is_multiple_of(width).then_some(stride / width)
}

/// Integers with their scales, over stretches of one distance.
struct Quantised {
    codes: Stretches,
    scales: Stretches,
    split: usize,
}

impl Quantised {
    fn new(codes: &FlexTensor, scales: &FlexTensor, split: usize) -> Self {
        let (mut codes, mut scales) = (Stretches::new(codes), Stretches::new(scales));
        if codes.distance != scales.distance {
            codes = Stretches::new(&codes.tensor.to_contiguous());
            scales = Stretches::new(&scales.tensor.to_contiguous());
        }
        Self { codes, scales, split }
    }

    fn numbers(&self) -> Numbers<'_> {
        let start = |tensor: &FlexTensor| tensor.layout().start_offset();
        let (codes, scales) = (&self.codes.tensor, &self.scales.tensor);
        Numbers::Int8 {
            codes: &codes.storage::<i8>()[start(codes)..],
            scales: &scales.storage::<f32>()[start(scales)..],
            split: self.split,
        }
    }
}

fn attend(
    q: &FlexTensor,
    numbers: Numbers,
    cache: &Stretches,
    kv_b: &FlexTensor,
    offsets: &FlexTensor,
    mla: MlaDims,
    unit: Option<Unit>,
) -> FlexTensor {
    let (q, kv_b, offsets) = (q.to_contiguous(), kv_b.to_contiguous(), integers(offsets));
    let [batch, seq, ..] = dims::<4>(&q);
    let maps = (dims::<2>(&kv_b)[0] > 0).then(|| kv_b.storage());
    let vectors = Vectors { numbers, width: cache.width };
    let slots = absorbed::Slots { vectors, keys: cache.keys, row: cache.distance };
    let MlaDims { heads, nope, rope, value, rank, scale, .. } = mla;
    let shape = absorbed::Shape { seq, heads, nope, rope, value, rank, scale: scale as f32 };
    let mut out = new([batch, seq, heads * if maps.is_some() { value } else { rank }]);
    absorbed::forward(shape, q.storage(), slots, maps, &offsets, unit, out.storage_mut());
    out
}

/// All vectors of a view as a new tensor of its shape.
fn widened(numbers: Numbers, cache: &Stretches) -> FlexTensor {
    let shape = cache.tensor.layout().shape().clone();
    let mut out = new(shape);
    let vectors = Vectors { numbers, width: cache.width };
    let out_rows = out.storage_mut::<f32>().chunks_exact_mut(cache.keys * cache.width).take(cache.outer);
    for (i, out) in out_rows.enumerate() {
        numbers::widen(vectors, i * cache.distance, out);
    }
    out
}

impl CacheOps for Flex {
    fn absorbed_attention(
        q: FlexTensor,
        cache: FlexTensor,
        kv_b: FlexTensor,
        offsets: FlexTensor,
        mla: MlaDims,
        precision: Precision,
    ) -> FlexTensor {
        let cache = Stretches::new(&cache);
        // Nothing is gained by rounding where it takes as long.
        let unit = (precision == Precision::Bf16).then(Unit::here).filter(|unit| *unit == Unit::Tiles);
        attend(&q, cache.numbers(), &cache, &kv_b, &offsets, mla, unit)
    }

    fn absorbed_attention_int8(
        q: FlexTensor,
        codes: FlexTensor,
        scales: FlexTensor,
        kv_b: FlexTensor,
        offsets: FlexTensor,
        mla: MlaDims,
    ) -> FlexTensor {
        let cache = Quantised::new(&codes, &scales, mla.rank);
        attend(&q, cache.numbers(), &cache.codes, &kv_b, &offsets, mla, None)
    }

    fn chunk_attention(
        q: FlexTensor,
        own: FlexTensor,
        shared: FlexTensor,
        values: FlexTensor,
        offsets: FlexTensor,
        width: usize,
        scale: f64,
    ) -> FlexTensor {
        chunk::attend([&q, &own, &shared, &values], &offsets, width, scale)
    }

    fn expanded_attention(
        q: FlexTensor,
        latents: FlexTensor,
        kv_b: FlexTensor,
        offsets: FlexTensor,
        mla: MlaDims,
    ) -> FlexTensor {
        chunk::attend_made(&q, &latents, &kv_b, &offsets, mla)
    }

    fn largest_logits(
        q: FlexTensor,
        own: FlexTensor,
        shared: FlexTensor,
        starts: FlexTensor,
        width: usize,
        scale: f64,
    ) -> FlexTensor {
        chunk::largest([&q, &own, &shared], &starts, width, scale)
    }

    fn widen(x: FlexTensor) -> FlexTensor {
        let cache = Stretches::new(&x);
        widened(cache.numbers(), &cache)
    }

    fn widen_int8(codes: FlexTensor, scales: FlexTensor, split: usize) -> FlexTensor {
        let cache = Quantised::new(&codes, &scales, split);
        widened(cache.numbers(), &cache.codes)
    }

    fn quantise(x: FlexTensor, split: usize) -> (FlexTensor, FlexTensor) {
        let x = x.to_contiguous();
        let shape = x.layout().shape().clone();
        let (last, width) = (shape.num_dims() - 1, shape[shape.num_dims() - 1]);
        let mut of_scales: Vec<usize> = (0..last).map(|axis| shape[axis]).collect();
        of_scales.push(Numbers::parts(width, split));
        let mut codes = FlexTensor::empty(shape, DType::I8);
        let mut scales = new(Shape::from(of_scales));
        numbers::quantise(x.storage(), width, split, codes.storage_mut(), scales.storage_mut());
        (codes, scales)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filled_part_of_a_cache_is_read_where_it_lies() {
        let whole = FlexTensor::zeros(Shape::from(vec![2, 3, 10, 4]), DType::F32);
        assert_eq!(distance_of(&whole), Some(10));
        assert_eq!(distance_of(&whole.narrow(2, 0, 7)), Some(10));
        assert_eq!(distance_of(&whole.narrow(0, 1, 1).narrow(1, 2, 1).narrow(2, 0, 7)), Some(7));
        assert_eq!(distance_of(&whole.narrow(1, 0, 2)), None, "heads of two rows with a hole between");
        assert_eq!(distance_of(&whole.narrow(3, 0, 2)), None);
        assert_eq!(distance_of(&whole.transpose(2, 3)), None);
    }
}
