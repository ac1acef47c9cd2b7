//! One layer of multi-head or grouped-query attention as matrices in f64.

use faer::Mat;
use lowkey_model::attention::{Attention, Grouped, GroupedDims};

use crate::error::{Error, Result};
use crate::matrix::{affine, to_mat};

/// The maps of a layer. Those of the hidden state have its d columns and one more, the bias: they act on (x, 1).
#[derive(Clone, Debug)]
pub(crate) struct Heads {
    pub(crate) dims: GroupedDims,
    /// `[H·D, d+1]`
    pub(crate) query: Mat<f64>,
    /// `[G·D, d+1]`
    pub(crate) key: Mat<f64>,
    /// `[G·D, d+1]`
    pub(crate) value: Mat<f64>,
    /// `[d, H·D]`
    pub(crate) out: Mat<f64>,
    /// `[d, 1]`
    pub(crate) out_bias: Mat<f64>,
}

impl Heads {
    pub(crate) fn of(grouped: &Grouped) -> Result<Self> {
        let out = to_mat(grouped.o_proj.matrix(), "o_proj")?;
        let out_bias = match grouped.o_proj.bias() {
            Some(bias) => to_mat(bias.unsqueeze_dim(1), "o_proj.bias")?,
            None => Mat::zeros(out.nrows(), 1),
        };
        Ok(Self {
            dims: grouped.dims.clone(),
            query: affine(&grouped.q_proj, "q_proj")?,
            key: affine(&grouped.k_proj, "k_proj")?,
            value: affine(&grouped.v_proj, "v_proj")?,
            out,
            out_bias,
        })
    }

    /// The key head of a query head.
    pub(crate) fn group(&self, head: usize) -> usize {
        head / (self.dims.heads / self.dims.kv_heads)
    }

    /// Frequencies of a head's rotated part.
    pub(crate) fn frequencies(&self) -> usize {
        self.dims.rotary_dim / 2
    }

    /// The two rows of a head that turn together with frequency `at`: real and imaginary part of a complex number.
    pub(crate) fn pair(&self, head: usize, at: usize) -> [usize; 2] {
        let first = head * self.dims.head_dim + at;
        [first, first + self.frequencies()]
    }
}

/// The full keys and values of each layer.
///
/// # Errors
/// [`Error::Unsupported`] where a layer has latents already.
pub(crate) fn grouped(model: &lowkey_model::CausalLm) -> Result<Vec<&Grouped>> {
    let each = model.model.layers.iter().map(|block| match &block.self_attn {
        Attention::Grouped(grouped) => Ok(grouped),
        Attention::Mla(_) => {
            let why = "it has latents already; those can be cut".to_owned();
            Err(Error::Unsupported { what: "making it latent attention", why })
        }
    });
    each.collect()
}
