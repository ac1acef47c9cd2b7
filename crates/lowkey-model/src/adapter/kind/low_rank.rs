//! Two small matrices beside a frozen one: LoRA, rsLoRA and DoRA.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use lowkey_files::printable;
use lowkey_kernels::adapted::{AdaptedMatrix, adapted_linear};
use lowkey_kernels::{add_linear, embed, linear};
use serde_json::{Map, Value, json};

use super::Planned;
use crate::adapter::by_matrix;
use crate::adapter::config::AdapterConfig;
use crate::adapter::dropout::{Draws, Dropout};
use crate::adapter::files::Reader;
use crate::adapter::plan::{AdapterPlan, Patterns, Target};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::layers::{Builder, Weight};
use crate::tensor::{HeadRows, Part, Role, Start, TensorSpec};

/// Its keys of `adapter_config.json` that say what is computed and that lowkey knows.
pub(super) const KEYS: [&str; 7] =
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"];

/// Refuses a file that asks for what is not computed here, and puts PEFT's default where it leaves one out.
pub(super) fn read(keys: &mut Map<String, Value>) -> std::result::Result<(), String> {
    by_matrix::read(keys)?;
    refuse_unknown_arithmetic(keys)?;
    keys.entry("lora_alpha").or_insert(json!(8));
    Ok(())
}

/// Keys of PEFT that change what an adapter computes, each with the value that changes nothing. A file that has another is not
/// understood here, and would compute something else in silence.
fn refuse_unknown_arithmetic(keys: &Map<String, Value>) -> std::result::Result<(), String> {
    let neutral = |key: &str, value: &Value| match key {
        "bias" => value == "none",
        "fan_in_fan_out" | "lora_bias" | "use_qalora" | "use_bdlora" | "monteclora_config" | "kasa_config"
        | "velora_config" => !value.as_bool().unwrap_or(!value.is_null()),
        "layer_replication"
        | "trainable_token_indices"
        | "alora_invocation_tokens"
        | "layers_pattern"
        | "megatron_config"
        | "arrow_config" => {
            value.is_null()
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(Map::is_empty)
        }
        _ => true,
    };
    match keys.iter().find(|(key, value)| !neutral(key, value)) {
        Some((key, value)) => Err(format!("{key} = {}: not understood here", printable(&value.to_string()))),
        None => Ok(()),
    }
}

/// What PEFT and the engines ask for beside the keys that are there; PEFT has to be told of some maps by their matrices.
pub(super) fn write(
    keys: &mut Map<String, Value>,
    config: &AdapterConfig,
    plan: &AdapterPlan,
    reader: Reader,
) -> Result<()> {
    keys.insert("init_lora_weights".into(), json!(true));
    for key in ["rank_pattern", "alpha_pattern"] {
        keys.entry(key).or_insert(json!({}));
    }
    match reader {
        Reader::Peft(model) => by_matrix::write(keys, config, plan, model),
        Reader::Engine => Ok(()),
    }
}

/// The adapter of one map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    /// Numbers between A and B.
    pub r: usize,
    /// s: α/r, or α/√r.
    pub scale: f64,
    /// Whether the lengths of the rows are trained, too.
    pub use_dora: bool,
    /// The chance that a number is left out in training.
    pub dropout: f64,
    /// Whether the map is the embedding, whose table stands on its side: `[d_in, d_out]`.
    pub embeds: bool,
}

impl LowRank {
    /// What each map gets by these keys.
    pub(super) fn plan(keys: &AdapterConfig, targets: &[Target]) -> Result<BTreeMap<String, Planned>> {
        if !(0.0..1.0).contains(&keys.lora_dropout) {
            return Err(Error::adapter("lora_dropout", &keys.lora_dropout, "must lie in 0 ≤ p < 1"));
        }
        if let Some(embedding) = targets.iter().find(|target| target.embeds && keys.use_dora) {
            let why = "use_dora is not for the embedding; leave one of them out";
            return Err(Error::adapter("target_modules", embedding.name, why));
        }
        let ranks = Patterns::new("rank_pattern", &keys.rank_pattern, targets)?;
        let alphas = Patterns::new("alpha_pattern", &keys.alpha_pattern, targets)?;
        let one = |Target { name, embeds }: &Target| {
            let (r, alpha) = (ranks.of(name).unwrap_or(keys.r), alphas.of(name).unwrap_or(keys.lora_alpha));
            if r == 0 || r > 1 << 16 {
                return Err(Error::adapter("r", &r, format!("of {name} must lie between 1 and {}", 1 << 16)));
            }
            if !(alpha.is_finite() && alpha > 0.0) {
                return Err(Error::adapter("lora_alpha", &alpha, format!("of {name} must be a finite number > 0")));
            }
            let per = if keys.use_rslora { (r as f64).sqrt() } else { r as f64 };
            let (use_dora, dropout) = (keys.use_dora, keys.lora_dropout);
            let low = Self { r, scale: alpha / per, use_dora, dropout, embeds: *embeds };
            Ok(((*name).to_owned(), Planned::LowRank(low)))
        };
        targets.iter().map(one).collect()
    }

    /// Its tensors beside the map of that name, whose matrix has that shape: A, B, and of DoRA the lengths of the rows.
    pub(super) fn tensors(&self, module: &str, shape: [usize; 2]) -> Vec<TensorSpec> {
        let (a, b, lengths) = (self.a(module, shape), self.b(module, shape), self.lengths(module, shape));
        [a, b].into_iter().chain(lengths).collect()
    }

    /// A map's numbers of what it writes and reads, `[d_out, d_in]`, of a matrix of that shape.
    fn widths(&self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        if self.embeds { [columns, rows] } else { [rows, columns] }
    }

    /// A, drawn as PEFT does: evenly, or of the embedding nothing at all.
    fn a(&self, module: &str, shape: [usize; 2]) -> TensorSpec {
        let ([_, d_in], r) = (self.widths(shape), self.r);
        // PEFT writes those of the embedding without `.weight`.
        let (end, start) =
            if self.embeds { ("lora_embedding_A", Start::Zeros) } else { ("lora_A.weight", Start::Even) };
        let (name, role) = (format!("{module}.{end}"), Role::Adapter(Part::Reads));
        TensorSpec::new(name, vec![r, d_in], role, HeadRows::one(r)).starting(start)
    }

    /// B, so that both together are nothing.
    fn b(&self, module: &str, shape: [usize; 2]) -> TensorSpec {
        let ([d_out, _], r) = (self.widths(shape), self.r);
        let (end, start) =
            if self.embeds { ("lora_embedding_B", Start::Normal) } else { ("lora_B.weight", Start::Zeros) };
        let (name, role) = (format!("{module}.{end}"), Role::Adapter(Part::Writes));
        TensorSpec::new(name, vec![d_out, r], role, HeadRows::one(d_out)).starting(start)
    }

    /// Of DoRA m, which begins as the lengths that the rows have.
    fn lengths(&self, module: &str, shape: [usize; 2]) -> Option<TensorSpec> {
        let ([d_out, _], role) = (self.widths(shape), Role::Adapter(Part::Rows));
        let name = format!("{module}.lora_magnitude_vector");
        let of = || TensorSpec::new(name, vec![d_out], role, HeadRows::one(d_out)).starting(Start::RowLengths);
        self.use_dora.then(of)
    }

    /// Numbers of the factors that a token is multiplied by: of the embedding not those of A, in which it is looked up.
    pub(super) fn products(&self, shape: [usize; 2]) -> usize {
        let [d_out, d_in] = self.widths(shape);
        if self.embeds { self.r * d_out } else { self.r * (d_out + d_in) }
    }
}

/// What is added to a matrix W `[d_out, d_in]`: s·B·A, and where there is a magnitude, the length of each row.
#[derive(Module, Debug)]
pub struct LowRankAdapter {
    /// A `[r, d_in]`
    lora_a: Param<Tensor<2>>,
    /// B `[d_out, r]`
    lora_b: Param<Tensor<2>>,
    /// m `[d_out]`
    magnitude: Option<Param<Tensor<1>>>,
    /// s
    #[module(skip)]
    scale: f64,
    /// What is left out in training.
    #[module(skip)]
    dropout: Dropout,
    /// What the rows are multiplied by, `[d_out]`, where nothing is trained any more.
    #[module(skip)]
    settled: Option<Tensor<1>>,
}

impl LowRankAdapter {
    /// That of a matrix of these rows and columns.
    pub(super) fn build(b: &mut Builder, name: &str, shape: [usize; 2], low_rank: &LowRank) -> Self {
        Self {
            lora_a: b.of(low_rank.a(name, shape)),
            lora_b: b.of(low_rank.b(name, shape)),
            magnitude: low_rank.lengths(name, shape).map(|lengths| b.of(lengths)),
            scale: low_rank.scale,
            dropout: Dropout::new(low_rank.dropout, name),
            settled: None,
        }
    }

    /// Whether gradients of it are wanted.
    pub(super) fn is_trained(&self) -> bool {
        self.lora_a.is_require_grad() || self.lora_b.is_require_grad()
    }

    /// What a pass that trains leaves out from now on; `None`: nothing.
    pub(super) fn set_draws(&mut self, draws: Option<Draws>) {
        self.dropout.set(draws);
    }

    /// Keeps what follows from weights alone, which no step will change any more.
    pub(super) fn settle(&mut self, weight: &Weight) {
        self.settled = self.row_factors(|| weight.matrix() + self.product(self.lora_a.val()));
    }

    /// W' `[d_out, d_in]` in place of W.
    pub(super) fn matrix(&self, weight: Tensor<2>) -> Tensor<2> {
        let product = self.product(self.dropout.of_columns(self.lora_a.val()));
        if !self.dropout.is_on() {
            let sum = weight + product;
            return match self.row_factors(|| sum.clone()) {
                None => sum,
                Some(factors) => sum * factors.unsqueeze_dim::<2>(1),
            };
        }
        // The lengths are those of the whole sum, whatever is left out of it.
        match self.row_factors(|| weight.clone() + self.product(self.lora_a.val())) {
            None => weight + product,
            Some(factors) => {
                let factors = factors.unsqueeze_dim::<2>(1);
                let heard = self.dropout.of_columns(weight.clone());
                weight + heard * (factors.clone() - 1.0) + product * factors
            }
        }
    }

    /// Both matrices beside `weight`, where W' is the sum and no more, for as long as nothing is left out.
    pub(super) fn beside(&self, weight: &Weight) -> Option<AdaptedMatrix> {
        let plain = self.magnitude.is_none() && !self.dropout.is_on();
        let weight = plain.then(|| weight.frozen())??;
        Some(AdaptedMatrix { weight, a: self.lora_a.val(), b: self.lora_b.val(), scale: self.scale })
    }

    /// `residual + x W'ᵀ (+ b)`, without W': the product with B·A goes through r numbers. Beside a packed matrix the lengths of rows that
    /// DoRA divides by are those of the matrix unpacked for a moment.
    pub(super) fn apply(
        &self,
        residual: Option<Tensor<3>>,
        x: Input,
        weight: &Weight,
        bias: Option<Tensor<1>>,
    ) -> Tensor<3> {
        if let Some(map) = self.beside(weight) {
            let y = adapted_linear(residual, x.value, x.made, map);
            return match bias {
                Some(bias) => y + bias.unsqueeze::<3>(),
                None => y,
            };
        }
        let (heard, low) = match self.dropout.is_on() {
            false => (None, x.clone().by(self.lora_a.val(), None)),
            true => {
                let heard = self.dropout.of_tokens(x.value.clone());
                (Some(heard.clone()), linear(heard, self.lora_a.val(), None))
            }
        };
        let (x, low) = (x.value, low * self.scale);
        let Some(factors) = self.row_factors(|| weight.matrix() + self.product(self.lora_a.val())) else {
            let y = match residual {
                Some(residual) => weight.add_linear(residual, x, bias),
                None => weight.linear(x.into(), bias),
            };
            return add_linear(y, low, self.lora_b.val(), None);
        };
        let factors = factors.unsqueeze::<3>();
        let y = match heard {
            None => add_linear(weight.linear(x.into(), None), low, self.lora_b.val(), None) * factors,
            // As PEFT has it: what is left out of the product is left out of what the lengths change of W.
            Some(heard) => {
                let changed = weight.linear(heard.into(), None) * (factors.clone() - 1.0);
                weight.linear(x.into(), None) + changed + linear(low, self.lora_b.val(), None) * factors
            }
        };
        let y = match bias {
            Some(bias) => y + bias.unsqueeze::<3>(),
            None => y,
        };
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }

    /// `y + s·B·A` at these columns: beside the rows `y [batch, seq, d_out]` of an embedding. PEFT leaves nothing out here.
    pub(super) fn look_up(&self, y: Tensor<3>, ids: Tensor<2, Int>) -> Tensor<3> {
        let low = embed(self.lora_a.val().transpose(), ids) * self.scale;
        add_linear(y, low, self.lora_b.val(), None)
    }

    /// `table + s·B·A` on its side, `[d_in, d_out]`, as the table of an embedding stands.
    pub(super) fn table(&self, table: Tensor<2>) -> Tensor<2> {
        table + self.product(self.lora_a.val()).transpose()
    }

    /// s·B·A, `[d_out, d_in]`.
    fn product(&self, lora_a: Tensor<2>) -> Tensor<2> {
        (self.lora_b.val() * self.scale).matmul(lora_a)
    }

    /// m over the lengths of the rows of W + s·B·A, `[d_out]`; `None` without a magnitude. No gradient flows through the lengths: DoRA
    /// treats them as constants (arXiv 2402.09353, section 4.3).
    fn row_factors(&self, sum: impl FnOnce() -> Tensor<2>) -> Option<Tensor<1>> {
        let magnitude = self.magnitude.as_ref()?;
        if let Some(settled) = &self.settled {
            return Some(settled.clone());
        }
        Some(magnitude.val() / sum().detach().powf_scalar(2.0).sum_dim(1).sqrt().squeeze_dim(1))
    }
}
