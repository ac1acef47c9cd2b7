//! Masked softmax attention with unequal key and value widths.

use burn::tensor::{Bool, Device, Tensor, TensorData, activation::softmax};

use crate::reference::product;

/// Which keys a query must not see; `true` marks a forbidden pair.
///
/// Built on the host, for queries against a cache and for the reference; training needs none.
#[derive(Clone, Debug)]
pub struct Mask {
    /// `[batch or 1, 1, queries, keys]`
    forbidden: Tensor<4, Bool>,
}

impl Mask {
    /// Causal: query `i` sits at position `offset + i` and sees keys `0..=offset + i` of `keys`.
    pub fn causal(queries: usize, keys: usize, offset: usize, device: &Device) -> Self {
        Self::from_fn([1, queries, keys], device, |_, q, k| k > offset + q)
    }

    /// Causal within documents: `document_starts[row · seq + t]` is the position in its row at which the document of
    /// token `t` begins, and `t` sees `j` iff `document_starts ≤ j ≤ t`.
    ///
    /// Rows that hold one document each share one causal mask.
    pub fn documents(document_starts: &[u32], seq: usize, device: &Device) -> Self {
        if document_starts.iter().all(|start| *start == 0) {
            return Self::causal(seq, seq, 0, device);
        }
        let rows = document_starts.len() / seq;
        Self::from_fn([rows, seq, seq], device, |row, q, k| k > q || (k as u32) < document_starts[row * seq + q])
    }

    /// Keys of a cache with different fill per row: query `i` of row `b` sits at `offsets[b] + i`.
    pub fn cached(offsets: &[usize], queries: usize, keys: usize, device: &Device) -> Self {
        Self::from_fn([offsets.len(), queries, keys], device, |row, q, k| k > offsets[row] + q)
    }

    /// The same for the first `keys` keys alone.
    pub(crate) fn first_keys(self, keys: usize) -> Self {
        Self { forbidden: self.forbidden.narrow(3, 0, keys) }
    }

    fn from_fn(shape: [usize; 3], device: &Device, forbidden: impl Fn(usize, usize, usize) -> bool) -> Self {
        let [rows, queries, keys] = shape;
        let mut values = Vec::with_capacity(rows * queries * keys);
        for row in 0..rows {
            for q in 0..queries {
                values.extend((0..keys).map(|k| forbidden(row, q, k)));
            }
        }
        let data = TensorData::new(values, [rows, 1, queries, keys]);
        Self { forbidden: Tensor::from_data(data, device) }
    }
}

/// Masked scores `scale · q kᵀ`, with −∞ where the mask forbids.
///
/// With fewer key heads than query heads (`G` divides `H`), query head `h` reads key head `h / (H/G)`. Keys are not copied
/// per query head: the heads of a group become further query rows.
///
/// # Shapes
/// `q [batch, H, queries, d_qk]`, `k [batch, G, keys, d_qk]` → `[batch, G, H/G · queries, keys]`.
pub fn scores(q: Tensor<4>, k: Tensor<4>, mask: &Mask, scale: f64) -> Tensor<4> {
    let [batch, heads, queries, width] = q.dims();
    let [_, groups, keys, _] = k.dims();
    let per_group = heads / groups;
    // The scale goes onto the query: it is the smallest of the three tensors.
    let q = (q * scale).reshape([batch, groups, per_group * queries, width]);
    let forbidden = mask.forbidden.clone();
    let forbidden = if per_group == 1 {
        forbidden
    } else {
        let rows = forbidden.dims()[0];
        forbidden.expand([rows, per_group, queries, keys]).reshape([rows, 1, per_group * queries, keys])
    };
    let forbidden = forbidden.expand([batch, groups, per_group * queries, keys]);
    products(q, k.swap_dims(2, 3)).mask_fill(forbidden, f32::NEG_INFINITY)
}

/// `softmax(scale · q kᵀ + mask) v`. Every query must be allowed at least one key.
///
/// # Shapes
/// `q [batch, H, queries, d_qk]`, `k [batch, G, keys, d_qk]`, `v [batch, G, keys, d_v]` → `[batch, H, queries, d_v]`;
/// `G` divides `H`, and `d_v` need not equal `d_qk`.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: &Mask, scale: f64) -> Tensor<4> {
    let [batch, heads, queries, _] = q.dims();
    let d_v = v.dims()[3];
    products(softmax(scores(q, k, mask, scale), 3), v).reshape([batch, heads, queries, d_v])
}

/// `a · b` of as many matrices each, in f32 whatever units a GPU has.
pub(crate) fn products(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "gpu")]
    if let Some(out) = crate::gpu::product::batched(&a, &b) {
        return out;
    }
    product(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::plain_device;
    use burn::tensor::{Distribution, Tolerance};

    fn random(shape: [usize; 4]) -> Tensor<4> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &plain_device())
    }

    #[test]
    fn a_packed_row_equals_its_documents_alone() {
        let device = plain_device();
        device.seed(3);
        let (q, k, v) = (random([1, 2, 7, 6]), random([1, 2, 7, 6]), random([1, 2, 7, 5]));
        let packed =
            attention(q.clone(), k.clone(), v.clone(), &Mask::documents(&[0, 0, 0, 3, 3, 3, 3], 7, &device), 0.3);
        for (start, len) in [(0, 3), (3, 4)] {
            let part = |t: &Tensor<4>| t.clone().narrow(2, start, len);
            let alone = attention(part(&q), part(&k), part(&v), &Mask::causal(len, len, 0, &device), 0.3);
            alone.into_data().assert_approx_eq::<f32>(&part(&packed).into_data(), Tolerance::absolute(1e-6));
        }
    }

    #[test]
    fn the_first_query_returns_the_first_value() {
        let device = plain_device();
        let v = random([1, 1, 3, 4]);
        let out =
            attention(random([1, 1, 3, 2]), random([1, 1, 3, 2]), v.clone(), &Mask::causal(3, 3, 0, &device), 1.0);
        let first = |t: Tensor<4>| t.narrow(2, 0, 1).into_data();
        first(out).assert_approx_eq::<f32>(&first(v), Tolerance::absolute(1e-6));
    }

    #[test]
    fn a_cached_mask_lets_a_query_see_its_row_up_to_its_own_position() {
        let mask = Mask::cached(&[0, 2], 2, 4, &plain_device());
        let seen: Vec<bool> = mask.forbidden.into_data().iter::<bool>().map(|f| !f).collect();
        let rows = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]];
        let expected: Vec<bool> = rows.iter().flatten().map(|x| *x == 1).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn grouped_heads_equal_repeated_keys() {
        let device = plain_device();
        device.seed(5);
        let (q, k, v) = (random([2, 6, 3, 4]), random([2, 2, 5, 4]), random([2, 2, 5, 3]));
        let mask = Mask::cached(&[2, 1], 3, 5, &device);
        let repeat = |t: &Tensor<4>| {
            let [b, g, s, d] = t.dims();
            t.clone().unsqueeze_dim::<5>(2).expand([b, g, 3, s, d]).reshape([b, g * 3, s, d])
        };
        let grouped = attention(q.clone(), k.clone(), v.clone(), &mask, 0.5);
        let repeated = attention(q, repeat(&k), repeat(&v), &mask, 0.5);
        grouped.into_data().assert_approx_eq::<f32>(&repeated.into_data(), Tolerance::absolute(1e-6));
    }
}
