//! Tensors of a model in the layout of llama.cpp's `deepseek2`, and back.
//!
//! What the two compute is the same; what differs is where constant factors and permutations stand:
//!
//! | in lowkey | in the file |
//! |---|---|
//! | `kv_b_proj`, rows per head: N of the key, V of the value | `attn_k_b` `[H, L, N]`, transposed per head, and `attn_v_b` `[H, V, L]` |
//! | rotation of the two halves (`rope_interleave = false`) | rows of `q`/`q_b` and `kv_a` permuted so that pairs are adjacent |
//! | YaRN's factor t on cosines and sines | the same rows times t |
//! | latent times √(d/L) (`latent_scale`) | `attn_kv_a_norm` times √(d/L) |

use lowkey_model::{MlaConfig, ModelConfig};

/// A tensor of the file and what it is made of.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Name in the file.
    pub(super) name: String,
    /// Shape, slowest axis first.
    pub(super) shape: Vec<usize>,
    /// Name in the checkpoint.
    pub(super) source: String,
    pub(super) change: Change,
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
    /// The keys' part of `kv_b_proj`, transposed per head.
    Keys { nope: usize, value: usize, rank: usize },
    /// The values' part of `kv_b_proj`.
    Values { nope: usize, value: usize, rank: usize },
}

/// Every tensor of the file, in its order.
pub(super) fn plan(config: &ModelConfig, mla: &MlaConfig) -> Vec<Plan> {
    let (d, heads, vocab, f) =
        (config.hidden_size, config.num_attention_heads, config.vocab_size, config.intermediate_size);
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
    let mut out = Vec::new();
    let mut add = |name: String, source: String, shape: &[usize], change: Change| {
        out.push(Plan { name, shape: shape.to_vec(), source, change });
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[vocab, d], Change::None);
    for i in 0..config.num_hidden_layers {
        let mut layer = |name: &str, source: &str, shape: &[usize], change: Change| {
            add(format!("blk.{i}.{name}.weight"), format!("model.layers.{i}.{source}.weight"), shape, change);
        };
        let q_width = heads * (nope + rotated);
        layer("attn_norm", "input_layernorm", &[d], Change::None);
        match mla.q_lora_rank {
            None => layer("attn_q", "self_attn.q_proj", &[q_width, d], rotate(nope + rotated)),
            Some(q) => {
                layer("attn_q_a", "self_attn.q_a_proj", &[q, d], Change::None);
                layer("attn_q_a_norm", "self_attn.q_a_layernorm", &[q], Change::None);
                layer("attn_q_b", "self_attn.q_b_proj", &[q_width, q], rotate(nope + rotated));
            }
        }
        layer("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", &[rank + rotated, d], rotate(rank + rotated));
        layer("attn_kv_a_norm", "self_attn.kv_a_layernorm", &[rank], latent_gain);
        layer("attn_k_b", "self_attn.kv_b_proj", &[heads, rank, nope], Change::Keys { nope, value, rank });
        layer("attn_v_b", "self_attn.kv_b_proj", &[heads, value, rank], Change::Values { nope, value, rank });
        layer("attn_output", "self_attn.o_proj", &[d, heads * value], Change::None);
        layer("ffn_norm", "post_attention_layernorm", &[d], Change::None);
        layer("ffn_gate", "mlp.gate_proj", &[f, d], Change::None);
        layer("ffn_up", "mlp.up_proj", &[f, d], Change::None);
        layer("ffn_down", "mlp.down_proj", &[d, f], Change::None);
    }
    add("output_norm.weight".into(), "model.norm.weight".into(), &[d], Change::None);
    if !config.tie_word_embeddings {
        add("output.weight".into(), "lm_head.weight".into(), &[vocab, d], Change::None);
    }
    out
}

impl Change {
    /// The values for the file from those of the checkpoint, whose last axis is `row` long.
    pub(super) fn apply(self, values: Vec<f32>, row: usize) -> Vec<f32> {
        match self {
            Self::None => values,
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
