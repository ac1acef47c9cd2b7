//! The memory of a sequence, allocated once.

use std::mem;

use burn::tensor::{Device, Distribution, Int, Slice, Tensor};
use lowkey_model::{AttentionConfig, CausalLm};

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
}

/// The buffers of one layer.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[batch, heads, capacity, width]` each. MLA: one buffer, latent and rotated key side by side (width L + R), shared by all
    /// heads (`heads` = 1). Otherwise: keys and values (`heads` = G, width D).
    buffers: Vec<Tensor<4>>,
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

impl Cache {
    /// An empty cache of `batch` rows with `capacity` slots each, in the number format of the weights.
    ///
    /// # Errors
    /// [`Error::Setting`] where `batch` or `capacity` is 0, [`Error::Positions`] where `capacity` exceeds the model's
    /// `max_position_embeddings`.
    pub fn new(model: &CausalLm, batch: usize, capacity: usize, device: &Device) -> Result<Self> {
        for (field, size) in [("batch", batch), ("capacity", capacity)] {
            if size == 0 {
                return Err(Error::setting(field, &size, "at least 1"));
            }
        }
        let limit = model.config.max_position_embeddings;
        if capacity > limit {
            return Err(Error::Positions { needed: capacity, limit });
        }
        let (heads, widths) = match &model.config.attention {
            AttentionConfig::Mla(mla) => (1, vec![mla.kv_lora_rank + mla.qk_rope_head_dim]),
            AttentionConfig::Grouped(grouped) => (grouped.num_key_value_heads, vec![grouped.head_dim; 2]),
        };
        let options = (&device.clone().inner(), model.model.embed_tokens.weight.val().dtype());
        let layer = || LayerCache {
            buffers: widths
                .iter()
                // Zeros, not uninitialised memory: a shorter row's empty slots are read with weight 0, and 0·NaN is NaN.
                .map(|width| Tensor::zeros([batch, heads, capacity, *width], options))
                .collect(),
        };
        Ok(Self {
            layers: (0..model.config.num_hidden_layers).map(|_| layer()).collect(),
            lengths: vec![0; batch],
            capacity,
        })
    }

    /// Bytes of the allocated tensors.
    pub fn bytes(&self) -> usize {
        let buffers = self.layers.iter().flat_map(|layer| &layer.buffers);
        buffers.map(|buffer| buffer.shape().num_elements() * buffer.dtype().size()).sum()
    }

    /// Fills `tokens` slots of every row with standard normal numbers, in place of a prompt: for measurements, where what lies in
    /// the cache does not matter and a long prompt would take longer than all that follows.
    ///
    /// # Errors
    /// [`Error::Capacity`] where they do not fit.
    pub fn fill_at_random(&mut self, tokens: usize) -> Result<()> {
        if tokens > self.capacity {
            return Err(Error::Capacity { row: 0, needed: tokens, capacity: self.capacity });
        }
        let counts = vec![tokens; self.batch()];
        let span = Span { offsets: vec![0; self.batch()], counts };
        for layer in &mut self.layers {
            for part in 0..layer.buffers.len() {
                let [batch, heads, _, width] = layer.buffers[part].dims();
                let options = (&layer.buffers[part].device(), layer.buffers[part].dtype());
                let noise = Tensor::random([batch, heads, tokens, width], Distribution::Normal(0.0, 1.0), options);
                layer.append(part, noise, &span);
            }
        }
        self.lengths = vec![tokens; self.batch()];
        Ok(())
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Slots per row.
    pub fn capacity(&self) -> usize {
        self.capacity
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

    /// Keeps the rows at the given indices, in that order, and drops the others.
    pub(crate) fn keep(&mut self, rows: &[usize]) {
        let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        for buffer in self.layers.iter_mut().flat_map(|layer| &mut layer.buffers) {
            let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &buffer.device());
            *buffer = buffer.clone().select(0, indices);
        }
        self.lengths = rows.iter().map(|row| self.lengths[*row]).collect();
    }

    /// Whether every buffer belongs to this cache alone, so that the next append writes into it instead of copying it.
    #[cfg(test)]
    pub(crate) fn owns_its_buffers(&self) -> bool {
        self.layers.iter().flat_map(|layer| &layer.buffers).all(Tensor::can_mut)
    }
}

impl LayerCache {
    /// Writes a chunk into buffer `part` and returns the buffer's filled slots.
    ///
    /// # Shapes
    /// `new [batch, heads, seq, width]` → `[batch, heads, span.filled(), width]`.
    pub(crate) fn append(&mut self, part: usize, new: Tensor<4>, span: &Span) -> Tensor<4> {
        let buffer = &mut self.buffers[part];
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
        buffer.clone().narrow(2, 0, span.filled())
    }
}
