//! The memory of a sequence, allocated once.

use std::mem;

use burn::tensor::kind::Basic;
use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Slice, Tensor};
use lowkey_kernels::device::is_cpu;
use lowkey_model::{
    CausalLm, ModelConfig,
    attention::{CacheBuffer, Stored},
    config::LayerConfig,
};

use crate::cache_dtype::CacheDtype;
use crate::error::{Error, Result};

/// What earlier tokens leave behind for later ones, for all layers and rows.
///
/// Every row starts at slot 0 and has a length of its own. Nothing here depends on the [`Form`](crate::Form): both forms of MLA
/// read the same latents.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    capacity: usize,
    dtype: CacheDtype,
    /// The format of the weights, which numbers come and go in.
    of_weights: DType,
}

/// The buffers of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[batch, heads, capacity, width]` each. MLA: one buffer, latent and rotated key side by side (width L + R), shared by all
    /// heads (`heads` = 1); of a cut latent only what is kept. Otherwise: keys and values (`heads` = G, width D).
    buffers: Vec<Stored<4>>,
}

/// Where a chunk goes: row `b` appends its first `counts[b]` tokens at slot `offsets[b]`.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) offsets: Vec<usize>,
    pub(crate) counts: Vec<usize>,
}

impl Span {
    /// Slots in use after the append, over all rows: as much of the cache as attention has to read.
    pub(crate) fn filled(&self) -> usize {
        self.offsets.iter().zip(&self.counts).map(|(offset, count)| offset + count).max().unwrap_or(0)
    }

    /// Length of the chunk that the shorter rows are padded to.
    pub(crate) fn width(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }

    /// The one offset of all rows, where they agree.
    pub(crate) fn common_offset(&self) -> Option<usize> {
        all_equal(&self.offsets)
    }
}

fn all_equal(values: &[usize]) -> Option<usize> {
    let first = *values.first()?;
    values.iter().all(|value| *value == first).then_some(first)
}

/// Scales of a vector in a buffer of int8.
fn scales_of(buffer: CacheBuffer) -> usize {
    if buffer.split < buffer.width { 2 } else { 1 }
}

impl CacheDtype {
    /// Bytes that a token takes in the caches of all layers, scales included, of a model in f32.
    pub fn bytes_per_token(self, config: &ModelConfig) -> usize {
        let of_buffer = |buffer: CacheBuffer| match self {
            Self::F32 => 4 * buffer.width,
            Self::Bf16 | Self::F16 => 2 * buffer.width,
            Self::Int8 => buffer.width + 4 * scales_of(buffer),
        };
        let all = config.layers.iter().flat_map(|layer| layer.attention.cache_buffers());
        all.map(|buffer| buffer.heads * of_buffer(buffer)).sum()
    }
}

impl Cache {
    /// An empty cache of `batch` rows with `capacity` slots each.
    ///
    /// # Errors
    /// [`Error::Setting`] where `batch` or `capacity` is 0, or where the device has no numbers of this format, [`Error::Positions`] where `capacity` exceeds the model's
    /// `max_position_embeddings`.
    pub fn new(model: &CausalLm, batch: usize, capacity: usize, dtype: CacheDtype, device: &Device) -> Result<Self> {
        for (field, size) in [("batch", batch), ("capacity", capacity)] {
            if size == 0 {
                return Err(Error::setting(field, &size, "at least 1"));
            }
        }
        let stored = match dtype {
            CacheDtype::F32 => DType::F32,
            CacheDtype::Bf16 => DType::BF16,
            CacheDtype::F16 => DType::F16,
            CacheDtype::Int8 => DType::I8,
        };
        if !is_cpu(device) && !device.supports_dtype(stored) {
            return Err(Error::setting("cache_dtype", &dtype, "a format that this device has, such as f32"));
        }
        let limit = model.config.max_position_embeddings;
        if capacity > limit {
            return Err(Error::Positions { needed: capacity, limit });
        }
        let (device, of_weights) = (device.clone().inner(), model.model.embed_tokens.table().dtype());
        // Zeros, not uninitialised memory: a shorter row's empty slots are read with weight 0, and 0·NaN is NaN.
        let floats = |heads, width, dtype| Tensor::zeros([batch, heads, capacity, width], (&device, dtype));
        let stored_in = |buffer: CacheBuffer| {
            let CacheBuffer { heads, width, split } = buffer;
            match dtype {
                CacheDtype::F32 => Stored::Float(floats(heads, width, of_weights)),
                CacheDtype::Bf16 | CacheDtype::F16 => Stored::Float(floats(heads, width, stored)),
                CacheDtype::Int8 => {
                    let codes = Tensor::zeros([batch, heads, capacity, width], (&device, stored));
                    Stored::Int8 { codes, scales: floats(heads, scales_of(buffer), DType::F32), split }
                }
            }
        };
        let layer = |layer: &LayerConfig| LayerCache {
            buffers: layer.attention.cache_buffers().into_iter().map(stored_in).collect(),
        };
        Ok(Self {
            layers: model.config.layers.iter().map(layer).collect(),
            lengths: vec![0; batch],
            capacity,
            dtype,
            of_weights,
        })
    }

    /// Bytes of the allocated tensors, scales included.
    pub fn bytes(&self) -> usize {
        fn bytes<K: Basic>(tensor: &Tensor<4, K>) -> usize {
            tensor.shape().num_elements() * tensor.dtype().size()
        }
        let buffers = self.layers.iter().flat_map(|layer| &layer.buffers);
        let each = buffers.map(|buffer| match buffer {
            Stored::Float(numbers) => bytes(numbers),
            Stored::Int8 { codes, scales, .. } => bytes(codes) + bytes(scales),
        });
        each.sum()
    }

    /// How numbers are stored.
    pub fn dtype(&self) -> CacheDtype {
        self.dtype
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens that each row holds.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The layers, first to last.
    pub(crate) fn layers_mut(&mut self) -> &mut [LayerCache] {
        &mut self.layers
    }

    /// Where a chunk with `counts[b]` new tokens in row `b` goes.
    ///
    /// # Errors
    /// [`Error::Capacity`] naming the first row that would not fit.
    pub(crate) fn span(&self, counts: Vec<usize>) -> Result<Span> {
        for (row, (length, count)) in self.lengths.iter().zip(&counts).enumerate() {
            let needed = length + count;
            if needed > self.capacity {
                return Err(Error::Capacity { row, needed, capacity: self.capacity });
            }
        }
        Ok(Span { offsets: self.lengths.clone(), counts })
    }

    /// Makes the tokens of a span, now written to every layer, part of the past.
    pub(crate) fn commit(&mut self, span: &Span) {
        for (length, count) in self.lengths.iter_mut().zip(&span.counts) {
            *length += count;
        }
    }

    /// Appends the rows of a cache of the same layers, capacity and format.
    pub(crate) fn join(&mut self, other: Self) {
        fn join<K: Basic>(mine: &mut Tensor<4, K>, others: Tensor<4, K>) {
            *mine = Tensor::cat(vec![mine.clone(), others], 0);
        }
        let buffers = self.layers.iter_mut().flat_map(|layer| &mut layer.buffers);
        for (mine, others) in buffers.zip(other.layers.into_iter().flat_map(|layer| layer.buffers)) {
            match (mine, others) {
                (Stored::Float(mine), Stored::Float(others)) => join(mine, others),
                (Stored::Int8 { codes, scales, .. }, Stored::Int8 { codes: more, scales: of_more, .. }) => {
                    join(codes, more);
                    join(scales, of_more);
                }
                (Stored::Float(_), Stored::Int8 { .. }) | (Stored::Int8 { .. }, Stored::Float(_)) => {
                    unreachable!("caches of one scheduler have one format")
                }
            }
        }
        self.lengths.extend(other.lengths);
    }

    /// Keeps the rows at the given indices, in that order, and drops the others.
    pub(crate) fn keep(&mut self, rows: &[usize]) {
        let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        fn keep<K: Basic>(buffer: &mut Tensor<4, K>, indices: &[i32]) {
            let indices = Tensor::<1, Int>::from_data(indices, &buffer.device());
            *buffer = buffer.clone().select(0, indices);
        }
        for buffer in self.layers.iter_mut().flat_map(|layer| &mut layer.buffers) {
            match buffer {
                Stored::Float(numbers) => keep(numbers, &indices),
                Stored::Int8 { codes, scales, .. } => {
                    keep(codes, &indices);
                    keep(scales, &indices);
                }
            }
        }
        self.lengths = rows.iter().map(|row| self.lengths[*row]).collect();
    }

    /// Fills every row up to `length` tokens with numbers from a standard normal distribution, whatever lay there: for measurements
    /// of a long past that nobody waits for. They come from the device's own generator ([`Device::seed`]).
    ///
    /// # Errors
    /// [`Error::Capacity`] where a row would not fit.
    pub fn fill_at_random(&mut self, length: usize) -> Result<()> {
        /// Tokens at a time, so that a large cache is not made a second time beside itself.
        const PART: usize = 4096;
        if length > self.capacity {
            return Err(Error::Capacity { row: 0, needed: length, capacity: self.capacity });
        }
        let batch = self.batch();
        for layer in &mut self.layers {
            for part in 0..layer.buffers.len() {
                let ([_, heads, _, width], device) = match &layer.buffers[part] {
                    Stored::Float(numbers) => (numbers.dims(), numbers.device()),
                    Stored::Int8 { codes, .. } => (codes.dims(), codes.device()),
                };
                for from in (0..length).step_by(PART) {
                    let len = PART.min(length - from);
                    let span = Span { offsets: vec![from; batch], counts: vec![len; batch] };
                    let options = (&device, self.of_weights);
                    let new = Tensor::random([batch, heads, len, width], Distribution::Normal(0.0, 1.0), options);
                    drop(layer.append(part, new, &span));
                }
            }
        }
        self.lengths.fill(length);
        Ok(())
    }

    /// Whether every buffer belongs to this cache alone, so that the next append writes into it instead of copying it.
    #[cfg(test)]
    pub(crate) fn owns_its_buffers(&self) -> bool {
        self.layers.iter().flat_map(|layer| &layer.buffers).all(|buffer| match buffer {
            Stored::Float(numbers) => numbers.can_mut(),
            Stored::Int8 { codes, scales, .. } => codes.can_mut() && scales.can_mut(),
        })
    }
}

impl LayerCache {
    /// Writes a chunk into buffer `part`, in the buffer's format, and returns the buffer's filled slots.
    ///
    /// # Shapes
    /// `new [batch, heads, seq, width]` → `[batch, heads, span.filled(), width]`.
    pub(crate) fn append(&mut self, part: usize, new: Tensor<4>, span: &Span) -> Stored<4> {
        let filled = span.filled();
        match &mut self.buffers[part] {
            Stored::Float(numbers) => {
                let new = match numbers.dtype() {
                    DType::BF16 => new.cast(FloatDType::BF16),
                    DType::F16 => new.cast(FloatDType::F16),
                    _ => new,
                };
                write(numbers, new, span);
                Stored::Float(numbers.clone().narrow(2, 0, filled))
            }
            Stored::Int8 { codes, scales, split } => {
                // Only the new tokens are quantised.
                if let Stored::Int8 { codes: new_codes, scales: new_scales, .. } = Stored::quantise(new, *split) {
                    write(codes, new_codes, span);
                    write(scales, new_scales, span);
                }
                let (codes, scales) = (codes.clone().narrow(2, 0, filled), scales.clone().narrow(2, 0, filled));
                Stored::Int8 { codes, scales, split: *split }
            }
        }
    }
}

/// Writes a chunk into the slots that a span names.
fn write<K: Basic>(buffer: &mut Tensor<4, K>, new: Tensor<4, K>, span: &Span) {
    let [batch, heads, seq, width] = new.dims();
    let range = |from: usize, len: usize| Slice::from(from..from + len);
    let region = |row, rows, offset, len| [range(row, rows), range(0, heads), range(offset, len), range(0, width)];
    // The buffer is moved out and back, never cloned: with one owner, slice_assign writes into it.
    let mut whole = mem::replace(buffer, new.clone());
    #[cfg(test)]
    assert!(whole.can_mut(), "an append would copy the cache");
    // Rows in step with each other are one region of the buffer.
    if let Some(offset) = span.common_offset()
        && all_equal(&span.counts).is_some()
    {
        whole = whole.slice_assign(region(0, batch, offset, seq), new);
    } else {
        for (row, (offset, count)) in span.offsets.iter().zip(&span.counts).enumerate() {
            if *count > 0 {
                let part = new.clone().slice(region(row, 1, 0, *count));
                whole = whole.slice_assign(region(row, 1, *offset, *count), part);
            }
        }
    }
    *buffer = whole;
}
