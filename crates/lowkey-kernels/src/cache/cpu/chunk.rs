//! Attention of a chunk on the CPU: the forward pass of the causal attention, with keys before its queries.

use burn_flex::FlexTensor;

use crate::causal_attention::cpu::forward::{self, Keys, Latents, Reads, Sizes, Vectors};
use crate::cpu::tensors::{dims, integers, new};
use crate::latent_attention::arguments::MlaDims;
use crate::precision::Precision;

/// A tensor of `[batch, heads, tokens, width]` or the like, with the axes that it is read along.
struct View {
    tensor: FlexTensor,
    /// Strides of rows, heads and tokens.
    strides: [usize; 3],
}

impl View {
    /// `axes`: those of rows, of heads if there are any, and of tokens. A tensor whose vectors do not lie in one piece is copied.
    fn new(tensor: &FlexTensor, axes: [Option<usize>; 3]) -> Self {
        let read = |tensor: &FlexTensor| {
            let strides = tensor.layout().strides();
            let [row, head, token] = axes.map(|axis| axis.map_or(Some(0), |axis| usize::try_from(strides[axis]).ok()));
            let within = *strides.last()? == 1 || tensor.layout().shape().as_slice().last() == Some(&1);
            within.then_some([row?, head?, token?])
        };
        match read(tensor) {
            Some(strides) => Self { tensor: tensor.clone(), strides },
            None => {
                let tensor = tensor.to_contiguous();
                // The strides of a contiguous tensor are not negative.
                let strides = read(&tensor).unwrap_or_default();
                Self { tensor, strides }
            }
        }
    }

    fn vectors(&self) -> Vectors<'_> {
        let [row, head, token] = self.strides;
        let data: &[f32] = self.tensor.storage();
        Vectors { data: &data[self.tensor.layout().start_offset()..], row, head, token }
    }
}

/// Queries and keys, and what their sizes are.
struct Arguments {
    q: View,
    own: View,
    shared: View,
    sizes: Sizes,
}

impl Arguments {
    /// `q [batch, seq, heads, own+shared]`, `own [batch, groups, keys, own]`, `shared [batch, keys, width]`.
    fn new([q, own, shared]: [&FlexTensor; 3], width: usize, scale: f64) -> Self {
        let [batch, seq, heads, _] = dims::<4>(q);
        let [_, groups, keys, of_own] = dims::<4>(own);
        let (scale, precision) = (scale as f32, Precision::F32);
        Self {
            q: queries(q),
            own: View::new(own, [Some(0), Some(1), Some(2)]),
            shared: View::new(shared, [Some(0), None, Some(1)]),
            sizes: Sizes { batch, seq, keys, heads, groups, own: of_own, shared: width, value: 0, scale, precision },
        }
    }

    fn keys<'a>(&'a self, values: Vectors<'a>) -> Keys<'a> {
        Keys::Given { own: self.own.vectors(), shared: self.shared.vectors(), values }
    }
}

fn queries(q: &FlexTensor) -> View {
    View::new(q, [Some(0), Some(2), Some(1)])
}

/// `[batch, seq, heads · value]`: query `t` of row `b` sees the keys up to `offsets[b] + t`.
fn chunk(sizes: Sizes, q: &View, keys: Keys, offsets: &FlexTensor) -> FlexTensor {
    let Sizes { batch, seq, heads, value, .. } = sizes;
    let (starts, offsets) = (vec![0; batch * seq], integers(offsets));
    let (mut out, mut lse) = (new([batch, seq, heads * value]), vec![0.0; batch * heads * seq]);
    let reads = Reads { q: q.vectors(), keys, starts: &starts, offsets: &offsets };
    forward::forward(sizes, reads, Some(out.storage_mut()), &mut lse);
    out
}

/// `[batch, seq, heads · value]`; `shared` has `width` numbers, or is not read where that is 0.
pub(super) fn attend(
    [q, own, shared, values]: [&FlexTensor; 4],
    offsets: &FlexTensor,
    width: usize,
    scale: f64,
) -> FlexTensor {
    let arguments = Arguments::new([q, own, shared], width, scale);
    let sizes = Sizes { value: dims::<4>(values)[3], ..arguments.sizes };
    let values = View::new(values, [Some(0), Some(1), Some(2)]);
    chunk(sizes, &arguments.q, arguments.keys(values.vectors()), offsets)
}

/// The same of keys and values made of `latents [batch, (1,) keys, L+R]` by `kv_b [heads(N+V), L]`.
pub(super) fn attend_made(
    q: &FlexTensor,
    latents: &FlexTensor,
    kv_b: &FlexTensor,
    offsets: &FlexTensor,
    mla: MlaDims,
) -> FlexTensor {
    let ([batch, seq, ..], of_keys) = (dims::<4>(q), latents.layout().shape().num_dims() - 2);
    let keys = latents.layout().shape()[of_keys];
    let MlaDims { heads, nope, rope, value, rank, scale, .. } = mla;
    let (scale, precision) = (scale as f32, Precision::F32);
    let sizes = Sizes { batch, seq, keys, heads, groups: heads, own: nope, shared: rope, value, scale, precision };
    let (latents, kv_b) = (View::new(latents, [Some(0), None, Some(of_keys)]), kv_b.to_contiguous());
    let latents = Latents::new(sizes, latents.vectors(), rank, kv_b.storage());
    chunk(sizes, &queries(q), Keys::Made(&latents), offsets)
}

/// The largest score of each query, `[batch, heads, seq]`.
pub(super) fn largest(arguments: [&FlexTensor; 3], starts: &FlexTensor, width: usize, scale: f64) -> FlexTensor {
    let arguments = Arguments::new(arguments, width, scale);
    let (sizes, starts) = (arguments.sizes, integers(starts));
    let mut top = new([sizes.batch, sizes.heads, sizes.seq]);
    // Values are not read.
    let keys = arguments.keys(arguments.own.vectors());
    let reads = Reads { q: arguments.q.vectors(), keys, starts: &starts, offsets: &[] };
    forward::forward(sizes, reads, None, top.storage_mut());
    top
}
