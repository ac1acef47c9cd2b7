//! The kinds of adapters, behind one face.
//!
//! A kind is a file in `kind/`: what a map gets of it with these keys, its tensors, what it computes, and its keys in PEFT's files. Here it
//! has a variant of each of three enums: its name, what was planned for a map, and the tensors of a map once they are built. Nothing
//! else in the crate knows one kind from another, but for sums of several adapters, which are sums of products.

mod low_rank;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use lowkey_kernels::adapted::AdaptedMatrix;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::low_rank::LowRank;
use self::low_rank::LowRankAdapter;
use super::config::AdapterConfig;
use super::dropout::Draws;
use super::files::Reader;
use super::plan::{AdapterPlan, Target};
use crate::error::Result;
use crate::input::Input;
use crate::layers::{Builder, Weight};
use crate::tensor::TensorSpec;

/// A kind of adapter, by PEFT's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeftType {
    /// Products of two narrow matrices (LoRA, rsLoRA, DoRA).
    #[default]
    #[serde(rename = "LORA")]
    Lora,
}

impl PeftType {
    /// Whether it is what is meant where none is named.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What each map gets.
    pub(super) fn plan(self, keys: &AdapterConfig, targets: &[Target]) -> Result<BTreeMap<String, Planned>> {
        match self {
            Self::Lora => LowRank::plan(keys, targets),
        }
    }

    /// Its own keys of `adapter_config.json` that say what is computed.
    pub(super) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Lora => &low_rank::KEYS,
        }
    }

    /// Refuses a file whose keys ask for something else than what is computed here, and puts PEFT's defaults where it leaves keys out.
    pub(super) fn read(self, keys: &mut Map<String, Value>) -> std::result::Result<(), String> {
        match self {
            Self::Lora => low_rank::read(keys),
        }
    }

    /// Makes of the keys of a configuration what PEFT asks of such a file.
    pub(super) fn write(
        self,
        keys: &mut Map<String, Value>,
        config: &AdapterConfig,
        plan: &AdapterPlan,
        reader: Reader,
    ) -> Result<()> {
        match self {
            Self::Lora => low_rank::write(keys, config, plan, reader),
        }
    }
}

/// The adapter of one map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Planned {
    /// The product of two narrow matrices.
    LowRank(LowRank),
}

impl Planned {
    /// Its tensors beside the map of that name, whose matrix has that shape, in the order in which they are built.
    pub(crate) fn tensors(&self, module: &str, shape: [usize; 2]) -> Vec<TensorSpec> {
        match self {
            Self::LowRank(low) => low.tensors(module, shape),
        }
    }

    /// Numbers that a token is multiplied by beside a matrix of that shape.
    pub(super) fn products(&self, shape: [usize; 2]) -> usize {
        match self {
            Self::LowRank(low) => low.products(shape),
        }
    }

    /// The product of two narrow matrices, where it is one: for what only these have.
    pub fn as_low_rank(&self) -> Option<&LowRank> {
        match self {
            Self::LowRank(low) => Some(low),
        }
    }
}

/// The tensors of one map's adapter, and what they compute.
#[derive(Module, Debug)]
pub enum Adapter {
    /// The product of two narrow matrices.
    LowRank(LowRankAdapter),
}

impl Adapter {
    /// That of the map of that name, whose matrix has these rows and columns.
    pub(crate) fn build(b: &mut Builder, name: &str, shape: [usize; 2], planned: &Planned) -> Self {
        match planned {
            Planned::LowRank(low) => Self::LowRank(LowRankAdapter::build(b, name, shape, low)),
        }
    }

    /// Whether gradients of it are wanted.
    pub(crate) fn is_trained(&self) -> bool {
        match self {
            Self::LowRank(low) => low.is_trained(),
        }
    }

    /// What a pass that trains leaves out from now on; `None`: nothing.
    pub(crate) fn set_draws(&mut self, draws: Option<Draws>) {
        match self {
            Self::LowRank(low) => low.set_draws(draws),
        }
    }

    /// Keeps what follows from weights alone, which no step will change any more.
    pub(crate) fn settle(&mut self, weight: &Weight) {
        match self {
            Self::LowRank(low) => low.settle(weight),
        }
    }

    /// W' `[d_out, d_in]` in place of W.
    pub(crate) fn matrix(&self, weight: Tensor<2>) -> Tensor<2> {
        match self {
            Self::LowRank(low) => low.matrix(weight),
        }
    }

    /// The matrices beside `weight` of which W' is made, where the kernels have an operation for both together.
    pub(crate) fn beside(&self, weight: &Weight) -> Option<AdaptedMatrix> {
        match self {
            Self::LowRank(low) => low.beside(weight),
        }
    }

    /// `residual + x W'ᵀ (+ b)`, without W'.
    ///
    /// # Shapes
    /// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `residual [batch, seq, d_out]`. Beside a packed matrix it is packed numbers that
    /// are multiplied.
    pub(crate) fn apply(
        &self,
        residual: Option<Tensor<3>>,
        x: Input,
        weight: &Weight,
        bias: Option<Tensor<1>>,
    ) -> Tensor<3> {
        match self {
            Self::LowRank(low) => low.apply(residual, x, weight, bias),
        }
    }

    /// The rows of an embedding at these ids, where without the adapter they were `rows [batch, seq, d]`.
    pub(crate) fn look_up(&self, rows: Tensor<3>, ids: Tensor<2, Int>) -> Tensor<3> {
        match self {
            Self::LowRank(low) => low.look_up(rows, ids),
        }
    }

    /// The table of an embedding, `[vocab, d]`, where without the adapter it was `table`.
    pub(crate) fn table(&self, table: Tensor<2>) -> Tensor<2> {
        match self {
            Self::LowRank(low) => low.table(table),
        }
    }
}
