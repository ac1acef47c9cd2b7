//! The model with its cache: what one chunk of tokens goes through.

use std::cell::OnceCell;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use lowkey_kernels::Precision;
use lowkey_kernels::device::{awake, cpu_bf16, is_cpu};
use lowkey_kernels::precision::scope;
use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{
    CausalLm,
    attention::{Cached, FusedMla, Mask, Seen},
    ids_tensor,
};

use crate::cache::Cache;
use crate::cache_dtype::CacheDtype;
use crate::error::{Error, Result};
use crate::form::Form;

/// A model and the cache of the sequences that it continues.
#[derive(Debug)]
pub struct Decoder {
    model: CausalLm,
    cache: Cache,
    form: Form,
    /// One per layer where there are any, else none.
    fused: Vec<Option<FusedMla>>,
    device: Device,
    precision: Precision,
}

impl Decoder {
    /// A decoder for `batch` sequences of up to `capacity` tokens, all empty, with a cache in the format of the weights.
    ///
    /// The model's tensors are shared, not copied, but for matrices that an adapter is multiplied into ([`CausalLm::settled`]); of a
    /// model that records gradients the plain one is used.
    ///
    /// # Errors
    /// As [`Cache::new`].
    pub fn new(model: &CausalLm, batch: usize, capacity: usize, form: Form, device: &Device) -> Result<Self> {
        Self::with_cache(model, [batch, capacity], CacheDtype::F32, form, device)
    }

    /// The same with `[batch, capacity]` and a cache that stores its numbers in another format. Where it and the model's matrices are in
    /// bf16 ([`CausalLm::packed_to_read`]), so are products where the processor is faster with them.
    ///
    /// # Errors
    /// As [`Cache::new`].
    pub fn with_cache(
        model: &CausalLm,
        [batch, capacity]: [usize; 2],
        dtype: CacheDtype,
        form: Form,
        device: &Device,
    ) -> Result<Self> {
        let model = if model.model.embed_tokens.table().is_autodiff() { model.valid() } else { model.clone() };
        // Each token asks for what no token changes.
        let model = model.settled();
        let device = device.clone().inner();
        let cache = Cache::new(&model, batch, capacity, dtype, &device)?;
        let in_bf16 = model.quantization() == Some(Quantization::Bf16) && dtype == CacheDtype::Bf16;
        let faster = is_cpu(&device) && cpu_bf16().is_some();
        let precision = if in_bf16 && faster { Precision::Bf16 } else { Precision::F32 };
        Ok(Self { model, cache, form, fused: Vec::new(), device, precision })
    }

    /// Gives layers their attention with the up-projections multiplied out, one entry per layer, for the forms
    /// [`Form::Fused`] and [`Form::Auto`].
    ///
    /// # Errors
    /// [`Error::Fused`] where the number of entries is not that of the layers, or a shape or number format not that of its layer.
    pub fn with_fused(mut self, layers: Vec<Option<FusedMla>>) -> Result<Self> {
        let blocks = &self.model.model.layers;
        let refuse = |why| Err(Error::Fused { why });
        if layers.len() != blocks.len() {
            return refuse(format!("weights of {} layers for {}", layers.len(), blocks.len()));
        }
        for (i, (fused, block)) in layers.iter().zip(blocks).enumerate() {
            let Some(fused) = fused else { continue };
            let fuses = self.model.config.attention().fuses();
            let Some(mla) = block.self_attn.latent().filter(|_| fuses) else {
                return refuse(format!("layer {i} has no latent attention that can be fused"));
            };
            let (expected, dtype) = (mla.fused_shapes(), mla.o_proj.dtype());
            for (name, weight, expected) in
                [("query", &fused.query, expected[0]), ("output", &fused.output, expected[1])]
            {
                let found = (weight.dims(), weight.dtype());
                if found != (expected, dtype) {
                    let (shape, of) = found;
                    let wanted = format!("{expected:?} of {dtype:?}");
                    return refuse(format!("{name} of layer {i} is {shape:?} of {of:?}, expected {wanted}"));
                }
            }
        }
        self.fused = layers;
        Ok(self)
    }

    /// What the sequences have left behind so far.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// [`Cache::fill_at_random`].
    ///
    /// # Errors
    /// [`Error::Capacity`] where the tokens do not fit.
    pub fn fill_at_random(&mut self, tokens: usize) -> Result<()> {
        self.cache.fill_at_random(tokens)
    }

    /// How MLA attention is computed.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Computes MLA attention in another form from the next chunk on. What lies in the cache serves every form.
    pub fn set_form(&mut self, form: Form) {
        self.form = form;
    }

    /// Appends `rows[b]` to sequence `b`, in chunks of at most `chunk` tokens, and returns the logits that follow each row's
    /// last token. Rows may differ in length. A later call goes on where this one ended.
    ///
    /// A smaller chunk needs less memory for activations (rows · chunk), and in the expanded form rebuilds keys and values more often; the
    /// result is the same. On the CPU memory grows with the length alone, not with its square.
    ///
    /// # Shapes
    /// → `[batch, vocab]`
    ///
    /// # Errors
    /// Before anything is computed: [`Error::Rows`], [`Error::NoToken`] and [`Error::Token`] for rows that are not
    /// one non-empty list of known tokens per sequence, [`Error::Capacity`] where one does not fit, [`Error::Setting`] where
    /// `chunk` is 0, [`Error::NoFused`] where the form is [`Form::Fused`] and no layer has fused weights.
    pub fn prefill(&mut self, rows: &[&[u32]], chunk: usize) -> Result<Tensor<2>> {
        if chunk == 0 {
            return Err(Error::setting("prefill_chunk", &chunk, "at least 1"));
        }
        let mut prefill = Prefill::new(self, rows)?;
        loop {
            if let Some(logits) = prefill.advance(self, chunk)? {
                return Ok(logits);
            }
        }
    }

    /// Appends `rows[b]` to sequence `b` in one chunk and returns the logits that follow every token. Where a row is shorter than
    /// the longest, the numbers past its end mean nothing.
    ///
    /// # Shapes
    /// → `[batch, longest row, vocab]`
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    pub fn forward(&mut self, rows: &[&[u32]]) -> Result<Tensor<3>> {
        self.check(rows)?;
        let hidden = self.advance(rows)?;
        Ok(self.model.logits(hidden))
    }

    /// Appends one token to each sequence and returns the logits that follow it.
    ///
    /// # Shapes
    /// → `[batch, vocab]`
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    pub fn step(&mut self, tokens: &[u32]) -> Result<Tensor<2>> {
        let rows: Vec<&[u32]> = tokens.chunks(1).collect();
        self.check(&rows)?;
        let on_cpu = is_cpu(&self.device);
        let mut step = || {
            let hidden = self.advance(&rows)?;
            Ok(self.logits(hidden))
        };
        if on_cpu { awake(step) } else { step() }
    }

    /// Keeps the sequences at the given indices, in that order, and drops the others and their memory.
    ///
    /// # Errors
    /// [`Error::Setting`] where `rows` is empty or names a sequence that is not there.
    pub fn keep(&mut self, rows: &[usize]) -> Result<()> {
        if rows.is_empty() || rows.iter().any(|row| *row >= self.cache.batch()) {
            return Err(Error::setting("rows", &format!("{rows:?}"), "at least one index, each below the batch size"));
        }
        self.cache.keep(rows);
        Ok(())
    }

    /// Takes over the sequences of another decoder of the same model, behind its own.
    pub(crate) fn join(&mut self, other: Self) {
        self.cache.join(other.cache);
    }

    /// Refuses what the model cannot take, so that nothing fails half-way with the cache half-written.
    fn check(&self, rows: &[&[u32]]) -> Result<()> {
        if rows.len() != self.cache.batch() {
            return Err(Error::Rows { expected: self.cache.batch(), found: rows.len() });
        }
        check_tokens(&self.model, rows)?;
        check_form(&self.model, self.form, &self.fused)?;
        self.cache.span(rows.iter().map(|row| row.len()).collect()).map(drop)
    }

    /// Runs one chunk through all layers; hidden states after the final norm. A row may be shorter than the longest, or empty:
    /// its positions past the end hold numbers without meaning, which no other position sees.
    ///
    /// # Shapes
    /// → `[batch, longest row, d]`
    pub(crate) fn advance(&mut self, rows: &[&[u32]]) -> Result<Tensor<3>> {
        let Self { model, cache, form, fused, device, precision } = self;
        let _computed = scope(*precision);
        let span = cache.span(rows.iter().map(|row| row.len()).collect())?;
        let queries = span.width();
        let ids: Vec<u32> =
            rows.iter().flat_map(|row| (0..queries).map(|i| row.get(i).copied().unwrap_or(0))).collect();
        // Rows at the same offset share one set of positions and one mask.
        let offsets = span.common_offset().map_or(span.offsets.clone(), |offset| vec![offset]);
        let positions: Vec<Vec<usize>> = offsets.iter().map(|offset| (*offset..offset + queries).collect()).collect();
        let rope = model.rope_table(&positions, device);
        // Made where a layer asks for it: on the CPU for single tokens in the expanded form alone.
        let mask = OnceCell::new();
        let mask = || mask.get_or_init(|| Mask::cached(&offsets, queries, span.filled(), device)).clone();
        let mut x = model.model.embed_tokens.forward(ids_tensor(&ids, rows.len(), queries, device));
        for (i, (block, layer)) in model.model.layers.iter().zip(cache.layers_mut()).enumerate() {
            let append = &mut |buffer, new| layer.append(buffer, new, &span);
            let way = form.way(block, fused.get(i).and_then(Option::as_ref), queries, span.filled());
            let seen = Cached { rope: &rope, append, offsets: &span.offsets, mask: &mask, way };
            x = block.forward(x, Seen::Cache(seen), None);
        }
        cache.commit(&span);
        Ok(model.model.norm.forward(x))
    }

    /// `[batch, 1, d]` → `[batch, vocab]`.
    fn logits(&self, hidden: Tensor<3>) -> Tensor<2> {
        self.model.logits(hidden).squeeze_dim::<2>(1)
    }
}

/// Prompts on their way into a decoder, a chunk at a time.
#[derive(Debug)]
pub(crate) struct Prefill {
    rows: Vec<Vec<u32>>,
    /// Tokens of each row that are read, or would be if it were longer.
    read: usize,
    /// The hidden state of each row's last token so far, `[1, 1, d]`.
    last: Vec<Option<Tensor<3>>>,
}

impl Prefill {
    /// # Errors
    /// As [`Decoder::prefill`].
    pub(crate) fn new(decoder: &Decoder, rows: &[&[u32]]) -> Result<Self> {
        decoder.check(rows)?;
        Ok(Self { rows: rows.iter().map(|row| row.to_vec()).collect(), read: 0, last: vec![None; rows.len()] })
    }

    /// Reads `chunk` tokens more of each row; after the last of the longest, the logits that follow each row's last token,
    /// `[batch, vocab]`.
    pub(crate) fn advance(&mut self, decoder: &mut Decoder, chunk: usize) -> Result<Option<Tensor<2>>> {
        let (from, to) = (self.read, self.read.saturating_add(chunk));
        let parts: Vec<&[u32]> = self.rows.iter().map(|row| &row[from.min(row.len())..to.min(row.len())]).collect();
        let hidden = decoder.advance(&parts)?;
        let [_, _, width] = hidden.dims();
        for (row, part) in parts.iter().enumerate() {
            if !part.is_empty() {
                self.last[row] = Some(hidden.clone().slice([row..row + 1, part.len() - 1..part.len(), 0..width]));
            }
        }
        self.read = to;
        if self.rows.iter().any(|row| row.len() > to) {
            return Ok(None);
        }
        // Only the rows' last positions meet the output head, which is the widest matrix of a small model.
        let last = self.last.iter_mut().filter_map(Option::take).collect();
        Ok(Some(decoder.logits(Tensor::cat(last, 0))))
    }
}

/// One non-empty list of known tokens per row.
pub(crate) fn check_tokens(model: &CausalLm, rows: &[&[u32]]) -> Result<()> {
    let vocab_size = model.config.vocab_size;
    for (row, tokens) in rows.iter().enumerate() {
        if tokens.is_empty() {
            return Err(Error::NoToken { row });
        }
        if let Some(token) = tokens.iter().copied().find(|token| *token as usize >= vocab_size) {
            return Err(Error::Token { row, token, vocab_size });
        }
    }
    Ok(())
}

/// The fused form needs weights for at least one layer that can have them. Other kinds of attention have no such form.
pub(crate) fn check_form(model: &CausalLm, form: Form, fused: &[Option<FusedMla>]) -> Result<()> {
    let fuses = model.config.layers.iter().any(|layer| layer.attention.fuses());
    if form == Form::Fused && fuses && !fused.iter().any(Option::is_some) {
        return Err(Error::NoFused);
    }
    Ok(())
}
