//! One layer of latent attention as matrices in f64.

use faer::Mat;
use lowkey_model::attention::Mla;

use super::norms::Norms;
use crate::error::Result;
use crate::matrix::{affine, rows, to_mat};

/// The maps of a layer. Those of the hidden state have its d columns and one more, the bias: they act on (x, 1).
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// H, N, R and V.
    pub(crate) sizes: [usize; 4],
    /// `[H(N+R), d+1]`
    pub(crate) query: Mat<f64>,
    /// The latent as it is read, `[r, d+1]`.
    pub(crate) latent: Mat<f64>,
    /// W_KR `[R, d+1]`
    pub(crate) shared: Mat<f64>,
    /// `[H(N+V), r]`
    pub(crate) up: Mat<f64>,
    /// `[d, H·V]`
    pub(crate) out: Mat<f64>,
    /// `[d, 1]`
    pub(crate) out_bias: Mat<f64>,
    /// For each frequency the two rows of a rotated part that turn together: real and imaginary part of a complex number.
    pub(crate) pairs: Vec<[usize; 2]>,
}

impl Layer {
    /// With constants in the place of the norms' denominators.
    pub(crate) fn of(mla: &Mla, norms: Norms) -> Result<Self> {
        let dims = &mla.dims;
        let (rank, whole) = (dims.rank, mla.kv_a_layernorm.gain().dims()[0]);
        let down = affine(&mla.kv_a_proj_with_mqa, "kv_a_proj_with_mqa")?;
        let gain = to_mat(mla.kv_a_layernorm.gain().unsqueeze_dim(1), "kv_a_layernorm")?;
        let out = to_mat(mla.o_proj.matrix(), "o_proj")?;
        let out_bias = match mla.o_proj.bias() {
            Some(bias) => to_mat(bias.unsqueeze_dim(1), "o_proj.bias")?,
            None => Mat::zeros(out.nrows(), 1),
        };
        let half = dims.rope / 2;
        let pair = |p: usize| if dims.interleave { [2 * p, 2 * p + 1] } else { [p, p + half] };
        Ok(Self {
            sizes: [dims.heads, dims.nope, dims.rope, dims.value],
            query: queries(mla, norms.query)?,
            latent: scaled(&rows(&down, 0, rank), &gain, norms.latent),
            shared: rows(&down, whole, whole + dims.rope),
            up: to_mat(mla.kv_b_proj.matrix(), "kv_b_proj")?,
            out,
            out_bias,
            pairs: (0..half).map(pair).collect(),
        })
    }

    /// The rows of a head's queries without position, `[N, d+1]`.
    pub(crate) fn query_still(&self, head: usize) -> Mat<f64> {
        let [_, nope, rope, _] = self.sizes;
        let first = head * (nope + rope);
        rows(&self.query, first, first + nope)
    }

    /// The rotated rows of a head's queries, `[R, d+1]`.
    pub(crate) fn query_turning(&self, head: usize) -> Mat<f64> {
        let [_, nope, rope, _] = self.sizes;
        let first = head * (nope + rope) + nope;
        rows(&self.query, first, first + rope)
    }

    /// W_UK and W_UV of a head, `[N, r]` and `[V, r]`.
    pub(crate) fn readers(&self, head: usize) -> [Mat<f64>; 2] {
        let [_, nope, _, value] = self.sizes;
        let first = head * (nope + value);
        [rows(&self.up, first, first + nope), rows(&self.up, first + nope, first + nope + value)]
    }

    /// The columns of W_O that read a head, `[d, V]`.
    pub(crate) fn out_of(&self, head: usize) -> Mat<f64> {
        let [.., value] = self.sizes;
        self.out.subcols(head * value, value).to_owned()
    }
}

/// Queries as a map of the hidden state, `[H(N+R), d+1]`.
fn queries(mla: &Mla, constant: f64) -> Result<Mat<f64>> {
    let (Some(down), Some(norm), Some(up)) = (&mla.q_a_proj, &mla.q_a_layernorm, &mla.q_b_proj) else {
        return mla.q_proj.as_ref().map_or_else(|| Ok(Mat::zeros(0, 0)), |map| affine(map, "q_proj"));
    };
    let gain = to_mat(norm.gain().unsqueeze_dim(1), "q_a_layernorm")?;
    let latent = scaled(&affine(down, "q_a_proj")?, &gain, constant);
    let up = affine(up, "q_b_proj")?;
    let (width, d) = (latent.nrows(), latent.ncols() - 1);
    let mut query = up.subcols(0, width) * &latent;
    for i in 0..query.nrows() {
        query[(i, d)] += up[(i, width)];
    }
    Ok(query)
}

/// Each row times its gain and the constant.
fn scaled(map: &Mat<f64>, gain: &Mat<f64>, constant: f64) -> Mat<f64> {
    Mat::from_fn(map.nrows(), map.ncols(), |i, j| constant * gain[(i, 0)] * map[(i, j)])
}
