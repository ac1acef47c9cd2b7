//! Tensors of a model in the layouts of llama.cpp, and back.
//!
//! What the two compute is the same; what differs is where constant factors and permutations stand:
//!
//! | in lowkey | in the file |
//! |---|---|
//! | MLA's `kv_b_proj`, rows per head: N of the key, V of the value | `attn_k_b` `[H, L, N]`, transposed per head, and `attn_v_b` `[H, V, L]` |
//! | MLA's rotation of the two halves (`rope_interleave = false`) | rows of `q`/`q_b` and `kv_a` permuted so that pairs are adjacent |
//! | YaRN's factor t on cosines and sines of MLA | the same rows times t |
//! | latent times √(d/L) (`latent_scale`) | `attn_kv_a_norm` times √(d/L) |
//! | the rotation of the two halves without a latent | in `llama` the rows of `q` and `k` permuted so that pairs are adjacent |

use lowkey_model::{
    ModelConfig,
    attention::{GroupedConfig, MlaConfig},
};

use super::architecture::Architecture;
use super::grouped::Kind;
use super::rope;

/// A tensor of the file and what it is made of.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Name in the file.
    pub(super) name: String,
    /// Shape, slowest axis first.
    pub(super) shape: Vec<usize>,
    pub(super) origin: Origin,
}

/// Where the values of a tensor come from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// A tensor of the checkpoint, by name, after a change.
    Parameter(String, Change),
    /// The configuration.
    Given(Vec<f32>),
}

/// How the values of a checkpoint's tensor become those of the file's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    /// As they are.
    None,
    /// All multiplied.
    Scale(f64),
    /// In each group of `group` rows the last `rotated` ones: halves to adjacent pairs where asked for, and multiplied.
    Rotated { group: usize, rotated: usize, pair_halves: bool, factor: f64 },
    /// In each head of so many rows: halves to adjacent pairs. Undone when the file is read.
    Pairs(usize),
    /// The keys' part of `kv_b_proj`, transposed per head.
    Keys { nope: usize, value: usize, rank: usize },
    /// The values' part of `kv_b_proj`.
    Values { nope: usize, value: usize, rank: usize },
}

impl Plan {
    /// The checkpoint's tensor that it is made of.
    pub(super) fn parameter(&self) -> Option<(&str, Change)> {
        match &self.origin {
            Origin::Parameter(name, change) => Some((name, *change)),
            Origin::Given(_) => None,
        }
    }
}

/// Collects the tensors of a file, in its order.
struct Plans(Vec<Plan>);

impl Plans {
    fn add(&mut self, name: impl Into<String>, source: impl Into<String>, shape: &[usize], change: Change) {
        let origin = Origin::Parameter(source.into(), change);
        self.0.push(Plan { name: name.into(), shape: shape.to_vec(), origin });
    }

    /// A weight of layer `i`.
    fn weight(&mut self, i: usize, name: &str, source: &str, shape: &[usize], change: Change) {
        self.add(format!("blk.{i}.{name}.weight"), format!("model.layers.{i}.{source}.weight"), shape, change);
    }

    /// A bias of layer `i`.
    fn bias(&mut self, i: usize, name: &str, source: &str, len: usize, change: Change) {
        self.add(format!("blk.{i}.{name}.bias"), format!("model.layers.{i}.{source}.bias"), &[len], change);
    }
}

/// Every tensor of the file, in its order.
pub(super) fn plan(config: &ModelConfig, architecture: Architecture) -> Vec<Plan> {
    let (d, vocab, f) = (config.hidden_size, config.vocab_size, config.mlp().intermediate_size);
    let mut plans = Plans(Vec::new());
    plans.add("token_embd.weight", "model.embed_tokens.weight", &[vocab, d], Change::None);
    if let Architecture::Grouped(Kind::Llama, grouped) = architecture
        && let Some(divisors) = rope::frequency_divisors(config, grouped.head_dim)
    {
        let (name, shape) = (rope::FREQUENCIES.to_owned(), vec![divisors.len()]);
        plans.0.push(Plan { name, shape, origin: Origin::Given(divisors) });
    }
    for i in 0..config.layers.len() {
        plans.weight(i, "attn_norm", "input_layernorm", &[d], Change::None);
        match architecture {
            Architecture::Deepseek2(mla) => latent(config, mla, i, &mut plans),
            Architecture::Grouped(kind, grouped) => heads(config, kind, grouped, i, &mut plans),
        }
        plans.weight(i, "ffn_norm", "post_attention_layernorm", &[d], Change::None);
        plans.weight(i, "ffn_gate", "mlp.gate_proj", &[f, d], Change::None);
        plans.weight(i, "ffn_up", "mlp.up_proj", &[f, d], Change::None);
        plans.weight(i, "ffn_down", "mlp.down_proj", &[d, f], Change::None);
    }
    plans.add("output_norm.weight", "model.norm.weight", &[d], Change::None);
    if !config.tie_word_embeddings {
        plans.add("output.weight", "lm_head.weight", &[vocab, d], Change::None);
    }
    plans.0
}

/// The attention of layer `i` in the latent layout.
fn latent(config: &ModelConfig, mla: &MlaConfig, i: usize, plans: &mut Plans) {
    let (d, heads) = (config.hidden_size, config.num_attention_heads);
    let &MlaConfig { kv_lora_rank: rank, qk_nope_head_dim: nope, qk_rope_head_dim: rotated, v_head_dim: value, .. } =
        mla;
    let table = config.rope.table_factor();
    let rotate = |group: usize| match (mla.rope_interleave, table) {
        (true, 1.0) => Change::None,
        (interleave, factor) => Change::Rotated { group, rotated, pair_halves: !interleave, factor },
    };
    let latent_gain = match mla.latent_scale {
        true => Change::Scale((d as f64 / rank as f64).sqrt()),
        false => Change::None,
    };
    let mut weight =
        |name: &str, source: &str, shape: &[usize], change: Change| plans.weight(i, name, source, shape, change);
    let q_width = heads * (nope + rotated);
    match mla.q_lora_rank {
        None => weight("attn_q", "self_attn.q_proj", &[q_width, d], rotate(nope + rotated)),
        Some(q) => {
            weight("attn_q_a", "self_attn.q_a_proj", &[q, d], Change::None);
            weight("attn_q_a_norm", "self_attn.q_a_layernorm", &[q], Change::None);
            weight("attn_q_b", "self_attn.q_b_proj", &[q_width, q], rotate(nope + rotated));
        }
    }
    weight("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", &[rank + rotated, d], rotate(rank + rotated));
    weight("attn_kv_a_norm", "self_attn.kv_a_layernorm", &[rank], latent_gain);
    weight("attn_k_b", "self_attn.kv_b_proj", &[heads, rank, nope], Change::Keys { nope, value, rank });
    weight("attn_v_b", "self_attn.kv_b_proj", &[heads, value, rank], Change::Values { nope, value, rank });
    weight("attn_output", "self_attn.o_proj", &[d, heads * value], Change::None);
}

/// The attention of layer `i` without a latent.
fn heads(config: &ModelConfig, kind: Kind, grouped: &GroupedConfig, i: usize, plans: &mut Plans) {
    let (d, width) = (config.hidden_size, grouped.head_dim);
    let (q, kv) = (config.num_attention_heads * width, grouped.num_key_value_heads * width);
    let rotated = if kind.rotates_pairs() { Change::Pairs(width) } else { Change::None };
    for (name, source, rows, change) in [
        ("attn_q", "self_attn.q_proj", q, rotated),
        ("attn_k", "self_attn.k_proj", kv, rotated),
        ("attn_v", "self_attn.v_proj", kv, Change::None),
    ] {
        plans.weight(i, name, source, &[rows, d], change);
        if grouped.qkv_bias {
            plans.bias(i, name, source, rows, change);
        }
    }
    if grouped.qk_norm {
        plans.weight(i, "attn_q_norm", "self_attn.q_norm", &[width], Change::None);
        plans.weight(i, "attn_k_norm", "self_attn.k_norm", &[width], Change::None);
    }
    plans.weight(i, "attn_output", "self_attn.o_proj", &[d, q], Change::None);
    if grouped.o_bias {
        plans.bias(i, "attn_output", "self_attn.o_proj", d, Change::None);
    }
}

impl Change {
    /// The values for the file from those of the checkpoint's tensor of this shape.
    pub(super) fn apply(self, values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
        let row = row(shape);
        match self {
            Self::None => values,
            Self::Pairs(head) => {
                let from = |to: usize| to / 2 + to % 2 * (head / 2);
                permuted(&values, head, row, from)
            }
            Self::Scale(factor) => values.iter().map(|x| scaled(*x, factor)).collect(),
            Self::Rotated { group, rotated, pair_halves, factor } => {
                let mut out = Vec::with_capacity(values.len());
                for rows in values.chunks(group * row) {
                    let (still, turned) = rows.split_at((group - rotated) * row);
                    out.extend_from_slice(still);
                    for to in 0..rotated {
                        // Pair i of the rotation is (i, i + R/2) in halves and (2i, 2i + 1) when adjacent.
                        let from = if pair_halves { to / 2 + to % 2 * (rotated / 2) } else { to };
                        out.extend(turned[from * row..(from + 1) * row].iter().map(|x| scaled(*x, factor)));
                    }
                }
                out
            }
            Self::Keys { nope, value, rank } => {
                let mut out = Vec::with_capacity(values.len() / (nope + value) * nope);
                for head in values.chunks((nope + value) * rank) {
                    out.extend((0..rank).flat_map(|l| (0..nope).map(move |n| head[n * rank + l])));
                }
                out
            }
            Self::Values { nope, value, rank } => {
                values.chunks((nope + value) * rank).flat_map(|head| &head[nope * rank..]).copied().collect()
            }
        }
    }
}

/// The values of the checkpoint's tensor of this shape from those of the file, but for what stays folded in.
pub(super) fn undone(change: Change, values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
    match change {
        Change::Pairs(head) => {
            let half = head / 2;
            permuted(&values, head, row(shape), |to| if to < half { 2 * to } else { 2 * (to - half) + 1 })
        }
        _ => values,
    }
}

/// Values of a row of a matrix; a vector has rows of one.
fn row(shape: &[usize]) -> usize {
    if shape.len() > 1 { shape.last().copied().unwrap_or(1) } else { 1 }
}

/// In each group of `group` rows, row `to` is the old row `from(to)`.
fn permuted(values: &[f32], group: usize, row: usize, from: impl Fn(usize) -> usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for rows in values.chunks(group * row) {
        (0..group).map(&from).for_each(|from| out.extend_from_slice(&rows[from * row..(from + 1) * row]));
    }
    out
}

fn scaled(x: f32, factor: f64) -> f32 {
    (f64::from(x) * factor) as f32
}

/// `kv_b_proj` `[H(N+V), L]` from `attn_k_b` `[H, L, N]` and `attn_v_b` `[H, V, L]`.
pub(super) fn join_kv_b(keys: &[f32], values: &[f32], mla: &MlaConfig) -> Vec<f32> {
    let (nope, value, rank) = (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
    let mut out = Vec::with_capacity(keys.len() + values.len());
    for (keys, values) in keys.chunks(rank * nope).zip(values.chunks(value * rank)) {
        out.extend((0..nope).flat_map(|n| (0..rank).map(move |l| keys[l * nope + n])));
        out.extend_from_slice(values);
    }
    out
}
