//! What each tensor of a model is: its name in files, its shape and what it is for.

/// What a tensor does. Initial values, weight decay, the choice of an optimiser and counts go by this, never by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The table of token embeddings; the output head, too, where the two are one.
    Embedding,
    /// The output head.
    Head,
    /// A matrix that reads the residual stream or a latent.
    Matrix,
    /// A matrix whose product is added to the residual stream.
    Residual,
    /// The gain of a norm.
    Norm,
    /// A bias.
    Bias,
    /// The matrix of an adapter that reads: A.
    LoraA,
    /// The matrix of an adapter that writes: B.
    LoraB,
    /// The lengths of an adapted matrix's rows.
    Magnitude,
}

impl Role {
    /// Whether it is a matrix: what weight decay applies to.
    pub fn is_matrix(self) -> bool {
        match self {
            Self::Embedding | Self::Head | Self::Matrix | Self::Residual | Self::LoraA | Self::LoraB => true,
            Self::Norm | Self::Bias | Self::Magnitude => false,
        }
    }

    /// Whether it is a matrix between hidden states: neither the embedding nor the output head, nor a factor of an adapter.
    pub fn is_hidden_matrix(self) -> bool {
        match self {
            Self::Matrix | Self::Residual => true,
            Self::Embedding | Self::Head | Self::Norm | Self::Bias => false,
            Self::LoraA | Self::LoraB | Self::Magnitude => false,
        }
    }

    /// Whether it belongs to an adapter.
    pub fn is_adapter(self) -> bool {
        match self {
            Self::LoraA | Self::LoraB | Self::Magnitude => true,
            Self::Embedding | Self::Head | Self::Matrix | Self::Residual | Self::Norm | Self::Bias => false,
        }
    }
}

/// Rows of the maps that are stacked in a tensor, top to bottom: the parts of a head (MLA's `kv_b_proj`: a key's and a value's), as
/// often as there are heads; or one part of all rows. Not written out, since a configuration may claim any number of heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Rows of each part of a head.
    pub parts: Vec<usize>,
    /// Number of heads.
    pub heads: usize,
}

impl HeadRows {
    /// One map of all rows.
    pub fn one(rows: usize) -> Self {
        Self { parts: vec![rows], heads: 1 }
    }

    /// All rows together.
    pub fn total(&self) -> usize {
        self.parts.iter().sum::<usize>() * self.heads
    }

    /// The rows of each map.
    pub fn each(&self) -> Vec<usize> {
        self.parts.repeat(self.heads)
    }
}

/// A tensor of a model before it has values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in a checkpoint, such as `model.layers.0.self_attn.kv_b_proj.weight`.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// The maps that are stacked in it.
    pub head_rows: HeadRows,
    /// Whether it is trained: what is frozen costs no gradient and no optimiser's state.
    pub trainable: bool,
}

/// The layer that a tensor or map of this name belongs to, counted from 0; none for embedding, last norm and output head.
pub fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
