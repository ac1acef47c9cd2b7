//! Attention of a chunk of new queries over keys and values of every head, those of the chunk among them.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::autodiff::CacheOps;
use crate::causal_attention::starts_tensor;
use crate::device::facts::is_cpu;
use crate::masked_attention::{Mask, attention, scores};

/// Queries of a row from which on blocks of scores pay: below, laying out the keys for them would take longer than the products.
const FEWEST: usize = 2;

/// Keys and values of every head. Views are read where they lie: the filled part of a cache is one.
#[derive(Clone, Debug)]
pub struct Keys {
    /// What a head has to itself of its keys, `[batch, G, keys, N]`.
    pub own: Tensor<4>,
    /// What all heads share, `[batch, keys, R]`; it follows `own` in a key.
    pub shared: Option<Tensor<3>>,
    /// `[batch, G, keys, V]`
    pub values: Tensor<4>,
}

impl Keys {
    /// Whole keys, `[batch, G, keys, N+R]`.
    pub fn whole(&self) -> Tensor<4> {
        let [batch, groups, keys, _] = self.own.dims();
        match &self.shared {
            None => self.own.clone(),
            Some(shared) => {
                let [.., width] = shared.dims();
                let shared = shared.clone().unsqueeze_dim::<4>(1).expand([batch, groups, keys, width]);
                Tensor::cat(vec![self.own.clone(), shared], 3)
            }
        }
    }

    /// The shared part as an operation takes it; where there is none, a single number stands in for it and is not read.
    fn shared_or_none(&self) -> (Tensor<3>, usize) {
        let none = || (Tensor::zeros([1, 1, 1], &self.own.device()), 0);
        self.shared.clone().map_or_else(none, |shared| (shared.clone(), shared.dims()[2]))
    }

    fn check(&self, q: &Tensor<4>, rows: usize, what: &str) {
        let [batch, _, heads, width] = q.dims();
        let [_, groups, keys, own] = self.own.dims();
        let (_, shared) = self.shared_or_none();
        assert!(
            self.own.dims()[0] == batch
                && self.values.dims()[..3] == [batch, groups, keys]
                && self.shared.as_ref().is_none_or(|shared| shared.dims()[..2] == [batch, keys])
                && width == own + shared
                && heads.is_multiple_of(groups)
                && rows == batch,
            "{what}: q {:?}, keys {:?} and {shared} shared, values {:?}, {rows} rows do not fit",
            q.dims(),
            self.own.dims(),
            self.values.dims(),
        );
    }
}

/// Softmax attention of a chunk: query `t` of row `b` sees the keys `0..=offsets[b] + t`, as far as there are any. Query head `h` of `H`
/// reads key head `h / (H/G)`. On the CPU no score outlives its block, as in [`crate::causal_attention`]; elsewhere, and for a single
/// query, it is [`attention`] under `mask`. No gradient flows through it.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, `offsets` of length `batch` → `[batch, seq, H·V]`.
pub fn chunk_attention(q: Tensor<4>, keys: Keys, offsets: &[usize], mask: &dyn Fn() -> Mask, scale: f64) -> Tensor<3> {
    let [batch, seq, heads, _] = q.dims();
    keys.check(&q, offsets.len(), "chunk_attention");
    if !is_cpu(&q.device()) || q.dtype() != DType::F32 || seq < FEWEST {
        let [.., value] = keys.values.dims();
        let out = attention(q.swap_dims(1, 2), keys.whole(), keys.values, &mask(), scale);
        return out.swap_dims(1, 2).reshape([batch, seq, heads * value]);
    }
    let ((shared, width), at) = (keys.shared_or_none(), offsets_tensor(offsets, &q.device()));
    let (own, values) = (keys.own.into_dispatch(), keys.values.into_dispatch());
    let (q, shared, at) = (q.into_dispatch(), shared.into_dispatch(), at.into_dispatch());
    Tensor::from_dispatch(Dispatch::chunk_attention(q, own, shared, values, at, width, scale))
}

/// The largest attention logit of whole rows, `[1]`: of query `t` and a key `document_starts[t] ≤ j ≤ t`. On the CPU no score outlives
/// its block. No gradient flows through it.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, as many keys, `document_starts` of length `batch · seq`.
pub fn largest_logit(q: Tensor<4>, keys: Keys, document_starts: &[u32], scale: f64) -> Tensor<1> {
    let ([batch, seq, ..], device) = (q.dims(), q.device());
    keys.check(&q, batch, "largest_logit");
    assert_eq!(document_starts.len(), batch * seq, "largest_logit: document starts");
    if !is_cpu(&device) || q.dtype() != DType::F32 {
        let mask = Mask::documents(document_starts, seq, &device);
        return scores(q.swap_dims(1, 2), keys.whole(), &mask, scale).max();
    }
    let (shared, width) = keys.shared_or_none();
    let starts = starts_tensor(document_starts, [batch, seq], &device).into_dispatch();
    let (q, own, shared) = (q.into_dispatch(), keys.own.into_dispatch(), shared.into_dispatch());
    Tensor::<3>::from_dispatch(Dispatch::largest_logits(q, own, shared, starts, width, scale)).max()
}

/// Tokens of each row before a chunk, for a kernel.
pub(super) fn offsets_tensor(offsets: &[usize], device: &Device) -> Tensor<1, Int> {
    let at: Vec<i32> = offsets.iter().map(|offset| *offset as i32).collect();
    Tensor::from_data(TensorData::new(at, [offsets.len()]), device)
}
