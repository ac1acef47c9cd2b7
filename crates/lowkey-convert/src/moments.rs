//! What a text makes of a model's latents and queries: second moments, layer by layer.

use burn::tensor::{Device, Tensor};
use faer::{Mat, MatRef};
use lowkey_model::{
    CausalLm,
    attention::{Mla, MlaDims},
    model::Block,
    rope::RopeTable,
};

use crate::Observer;
use crate::error::{Error, Result};
use crate::matrix::to_mat;
use crate::stream::Stream;

/// Moments of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    /// E\[c\] of the normalised latent, `[L]`.
    pub(crate) mean: Vec<f64>,
    /// E\[c cᵀ\], `[L, L]`.
    pub(crate) latent: Mat<f64>,
    /// Per head E\[q qᵀ\] of the query's part without position, `[N, N]`.
    pub(crate) queries: Vec<Mat<f64>>,
    /// Share of the logits' variance over the keys that a query sees, which comes from the rotated part.
    pub(crate) rope_share: f64,
}

/// The sums that moments are made of.
struct Sums {
    mean: Mat<f64>,
    latent: Mat<f64>,
    queries: Vec<Mat<f64>>,
    rope: f64,
    nope: f64,
    tokens: usize,
}

/// The latent attention of each layer.
///
/// # Errors
/// [`Error::Unsupported`] where a layer has none.
pub(crate) fn attentions<'a>(model: &'a CausalLm, what: &'static str) -> Result<Vec<&'a Mla>> {
    let none = || {
        let why = format!("{} attention has no latent; only MLA models do", model.config.attention_name());
        Error::Unsupported { what, why }
    };
    if model.config.attention().latent().is_some_and(|mla| !mla.reads_linearly()) {
        let why = "what reads its latents is not a matter of weights alone".to_owned();
        return Err(Error::Unsupported { what, why });
    }
    model.model.layers.iter().map(|block| block.self_attn.latent().ok_or_else(none)).collect()
}

/// Checks that there is a text, and that the model knows its tokens and positions.
///
/// # Errors
/// [`Error::Text`].
pub(crate) fn check_text(model: &CausalLm, text: &[Vec<u32>]) -> Result<()> {
    let (vocab, longest) = (model.config.vocab_size, model.config.max_position_embeddings);
    let refuse = |why: String| Err(Error::Text { why });
    if text.iter().all(|ids| ids.len() < 2) {
        return refuse("no sequence of at least two tokens".into());
    }
    for (i, ids) in text.iter().enumerate() {
        if ids.len() > longest {
            return refuse(format!("sequence {i} has {} tokens, the model at most {longest}", ids.len()));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return refuse(format!("token {id} of sequence {i} is not in the vocabulary of {vocab}"));
        }
    }
    Ok(())
}

/// What each layer makes of a text, each sequence by itself.
pub(crate) fn measure(model: &CausalLm, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<Vec<Moments>> {
    let attentions = attentions(model, "measuring a latent")?;
    check_text(model, text)?;
    Stream::each_layer(model, text, device, ("moments", observe), |layer, block, stream| {
        of_layer(model, attentions[layer], block, stream, device)
    })
}

/// Those of a text that has come before `block`.
pub(crate) fn of_layer(
    model: &CausalLm,
    mla: &Mla,
    block: &Block,
    stream: &Stream,
    device: &Device,
) -> Result<Moments> {
    let mut sums = Sums::new(mla.dims);
    for x in stream.inputs(block) {
        let [_, seq, _] = x.dims();
        sums.add(mla, x, &model.rope_table(&[(0..seq).collect()], device))?;
    }
    Ok(sums.moments())
}

impl Sums {
    fn new(dims: MlaDims) -> Self {
        Self {
            mean: Mat::zeros(1, dims.rank),
            latent: Mat::zeros(dims.rank, dims.rank),
            queries: vec![Mat::zeros(dims.nope, dims.nope); dims.heads],
            rope: 0.0,
            nope: 0.0,
            tokens: 0,
        }
    }

    /// Adds one sequence; `x [1, seq, d]` is the attention's normed input.
    fn add(&mut self, mla: &Mla, x: Tensor<3>, rope: &RopeTable) -> Result<()> {
        let MlaDims { nope, rope: r, scale, .. } = mla.dims;
        let latent = mla.latent(x.clone(), rope);
        let c_kv = latent.c_kv().squeeze_dim::<2>(0);
        let [seq, _] = c_kv.dims();
        let columns = to_mat(c_kv, "a latent")?;
        self.mean += Mat::from_fn(1, columns.ncols(), |_, j| columns.col(j).sum());
        self.latent += squares(&columns);
        let queries = mla.queries(x, rope).squeeze_dim::<3>(0).swap_dims(0, 1);
        let (keys, _) = mla.expand(latent);
        let keys = keys.squeeze_dim::<3>(0);
        let of_head = |x: &Tensor<3>, head, what| to_mat(x.clone().narrow(0, head, 1).squeeze_dim::<2>(0), what);
        for (head, sum) in self.queries.iter_mut().enumerate() {
            let (q, k) = (of_head(&queries, head, "queries")?, of_head(&keys, head, "keys")?);
            *sum += squares(&q.subcols(0, nope).to_owned());
            self.nope += scale * scale * variance(q.subcols(0, nope), k.subcols(0, nope));
            self.rope += scale * scale * variance(q.subcols(nope, r), k.subcols(nope, r));
        }
        self.tokens += seq;
        Ok(())
    }

    fn moments(self) -> Moments {
        let n = self.tokens.max(1) as f64;
        let all = self.rope + self.nope;
        Moments {
            mean: (0..self.mean.ncols()).map(|i| self.mean[(0, i)] / n).collect(),
            latent: faer::Scale(1.0 / n) * &self.latent,
            queries: self.queries.iter().map(|sum| faer::Scale(1.0 / n) * sum).collect(),
            rope_share: if all > 0.0 { self.rope / all } else { 0.0 },
        }
    }
}

/// xᵀx. In f64, whatever the model computes in: the moments of a latent that does not use all its directions have eigenvalues of 0,
/// and sums of products that were rounded to f32 would turn them negative.
fn squares(x: &Mat<f64>) -> Mat<f64> {
    x.transpose() * x
}

/// Σ over queries of the variance of `q·k` over the keys that a query sees, all up to its own, for `q, k [seq, width]`: a softmax knows
/// nothing of what is the same for all keys. From the moments of the keys so far, so that no score is formed.
fn variance(q: MatRef<f64>, k: MatRef<f64>) -> f64 {
    let width = q.ncols();
    let row = |x: MatRef<f64>, t: usize| -> Vec<f64> { (0..width).map(|i| x[(t, i)]).collect() };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let (mut first, mut second) = (vec![0.0; width], vec![0.0; width * width]);
    let mut sum = 0.0;
    for t in 0..q.nrows() {
        let (q, k, seen) = (row(q, t), row(k, t), (t + 1) as f64);
        first.iter_mut().zip(&k).for_each(|(first, k)| *first += k);
        let mut square = 0.0;
        for ((second, ki), qi) in second.chunks_exact_mut(width.max(1)).zip(&k).zip(&q) {
            second.iter_mut().zip(&k).for_each(|(second, kj)| *second += ki * kj);
            square += qi * dot(second, &q);
        }
        sum += (square / seen - (dot(&first, &q) / seen).powi(2)).max(0.0);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the scores themselves.
    #[test]
    fn the_variance_of_scores_comes_from_the_moments_of_keys() {
        for (seq, width) in [(1, 3), (7, 1), (23, 6), (5, 0)] {
            let q = Mat::from_fn(seq, width, |t, i| ((t * 7 + i * 3) % 11) as f64 - 4.0);
            let k = Mat::from_fn(seq, width, |t, i| ((t * 5 + i * 2) % 13) as f64 + 20.0);
            let scores = &q * k.transpose();
            let of_query = |t: usize| {
                let seen: Vec<f64> = (0..=t).map(|s| scores[(t, s)]).collect();
                let mean = seen.iter().sum::<f64>() / seen.len() as f64;
                seen.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / seen.len() as f64
            };
            let expected: f64 = (0..seq).map(of_query).sum();
            let found = variance(q.as_ref(), k.as_ref());
            assert!((found - expected).abs() <= 1e-9 * expected.max(1.0), "{seq} × {width}: {found} {expected}");
        }
    }
}
