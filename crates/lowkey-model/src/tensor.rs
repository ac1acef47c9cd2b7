//! What each tensor of a model is: its name in files, its shape and what it is for.

/// What a tensor does. Weight decay, the choice of an optimiser and counts go by this, never by a name.
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
    /// A tensor of an adapter.
    Adapter(Part),
}

/// What a tensor of an adapter is to the map that it stands beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// A matrix that reads what the map reads: LoRA's A.
    Reads,
    /// A matrix that writes what the map writes: LoRA's B.
    Writes,
    /// A number for each row of the map's matrix, such as its length.
    Rows,
}

/// What a tensor has before anything is trained. Each is drawn from a stream of its own, derived from a seed and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// From N(0, 0.02²), or N(0, `initializer_range`²).
    Table,
    /// From N(0, 1/d_in), or N(0, `initializer_range`²).
    FanIn,
    /// The same with a variance by 2·layers smaller.
    FanInByDepth,
    /// Evenly from ±1/√d_in (Kaiming's bound with a = √5).
    Even,
    /// From N(0, 1).
    Normal,
    /// Ones.
    Ones,
    /// Zeros.
    Zeros,
    /// The lengths of the rows of the matrix that it stands beside.
    RowLengths,
}

impl Start {
    /// That of a tensor of which nothing else is said.
    fn of(role: Role) -> Self {
        match role {
            Role::Embedding | Role::Head => Self::Table,
            Role::Matrix => Self::FanIn,
            Role::Residual => Self::FanInByDepth,
            Role::Norm => Self::Ones,
            Role::Bias | Role::Adapter(_) => Self::Zeros,
        }
    }
}

impl Role {
    /// Whether it is a matrix: what weight decay applies to.
    pub fn is_matrix(self) -> bool {
        match self {
            Self::Embedding | Self::Head | Self::Matrix | Self::Residual => true,
            Self::Adapter(Part::Reads | Part::Writes) => true,
            Self::Norm | Self::Bias | Self::Adapter(Part::Rows) => false,
        }
    }

    /// Whether it is a matrix between hidden states: neither the embedding nor the output head, nor a factor of an adapter.
    pub fn is_hidden_matrix(self) -> bool {
        match self {
            Self::Matrix | Self::Residual => true,
            Self::Embedding | Self::Head | Self::Norm | Self::Bias => false,
            Self::Adapter(_) => false,
        }
    }

    /// Whether it belongs to an adapter.
    pub fn is_adapter(self) -> bool {
        match self {
            Self::Adapter(_) => true,
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
    /// What it has before anything is trained.
    pub start: Start,
    /// Whether it is trained: what is frozen costs no gradient and no optimiser's state.
    pub trainable: bool,
}

impl TensorSpec {
    /// A tensor that is trained and begins as those of its role do.
    pub(crate) fn new(name: String, shape: Vec<usize>, role: Role, head_rows: HeadRows) -> Self {
        Self { name, shape, role, head_rows, start: Start::of(role), trainable: true }
    }

    /// The same with another beginning.
    pub(crate) fn starting(self, start: Start) -> Self {
        Self { start, ..self }
    }
}

/// The layer that a tensor or map of this name belongs to, counted from 0; none for embedding, last norm and output head.
pub fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
