//! What goes through a forward pass beside the hidden states: what the layers share, and what is told of them.

use burn::tensor::Tensor;

use crate::rope::RopeTable;

/// What all layers of one forward pass over whole sequences share: positions and documents.
#[derive(Clone, Debug)]
pub struct Context {
    /// Cosines and sines of the positions.
    pub rope: RopeTable,
    /// `[batch · seq]`: where in its row the document of a token starts.
    pub document_starts: Vec<u32>,
    /// MLA: read no more than the first `kv_rank` numbers of each latent; `None`: all that are there. Differs from a cut model
    /// ([`CausalLm::with_kv_ranks`](crate::CausalLm::with_kv_ranks)) only in that gradients arrive in the whole one's parameters.
    pub kv_rank: Option<usize>,
}

/// Intermediate results of a forward pass, for verification and for a look at a model's health.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Input of each block, then the output of the final norm: `[batch, seq, d]`.
    pub hidden: Vec<Tensor<3>>,
    /// Output of each block's attention after W_O: `[batch, seq, d]`.
    pub attn_out: Vec<Tensor<3>>,
    /// MLA: normalised latent of each block, `[batch, seq, L]`.
    pub latent: Vec<Tensor<3>>,
    /// MLA: rotated shared key of each block, `[batch, seq, R]`, half-split order.
    pub k_pe: Vec<Tensor<3>>,
    /// Largest attention logit of each block, `[1]`.
    pub max_logit: Vec<Tensor<1>>,
    records: Records,
}

/// What of a pass is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Records {
    #[default]
    All,
    Hidden,
    /// Part of the graph that the pass has.
    Attention,
}

impl Trace {
    /// One that records [`Trace::hidden`] and nothing else, which costs nothing.
    pub fn of_hidden() -> Self {
        Self { records: Records::Hidden, ..Self::default() }
    }

    /// One that records [`Trace::attn_out`] and nothing else, which costs nothing.
    pub(crate) fn of_attention() -> Self {
        Self { records: Records::Attention, ..Self::default() }
    }

    /// Whether the inputs of blocks are recorded.
    pub(crate) fn has_hidden(&self) -> bool {
        self.records != Records::Attention
    }

    /// Whether what blocks make of them is recorded.
    pub(crate) fn has_blocks(&self) -> bool {
        self.records != Records::Hidden
    }

    /// Whether the outputs of the attention are all that is recorded.
    pub(crate) fn is_of_attention(&self) -> bool {
        self.records == Records::Attention
    }
}
