//! The sizes of multi-head, grouped-query and multi-query attention: rules, counts and costs.

use serde_json::{Value, json};

use super::super::config::{AttentionSizes, CacheBuffer};
use crate::config::Family;
use crate::decode_cost::{AttentionCost, DecodeCosts};
use crate::error::{Error, Result};
use crate::json_keys::Keys;
use crate::limits::{WIDEST, check_heads, check_size, even};

/// Sizes of multi-head, grouped-query and multi-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupedConfig {
    /// Number G of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How many of its leading components are rotated (even).
    pub rotary_dim: usize,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// RMSNorm on each query and key head before the rotation.
    pub qk_norm: bool,
}

impl GroupedConfig {
    /// What the keys of `config.json` say in a model of `family` with `heads` query heads.
    pub(crate) fn of_keys(keys: &Keys, family: Family, hidden_size: usize, heads: usize) -> Result<Self> {
        let head_dim = match keys.size("head_dim")? {
            Some(width) => width,
            // The only family whose default does not follow from the other sizes.
            None if family == Family::Qwen3 => 128,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(Error::MissingKey {
                    key: "head_dim",
                    why: format!("hidden_size = {hidden_size} is no multiple of num_attention_heads = {heads}"),
                });
            }
        };
        let bias = keys.flag("attention_bias")?.unwrap_or(false);
        let rotary = match family {
            Family::Lowkey => keys.number("partial_rotary_factor")?.unwrap_or(1.0),
            _ => 1.0,
        };
        if !(0.0..=1.0).contains(&rotary) {
            return Err(Error::config("partial_rotary_factor", &rotary, "must lie between 0 and 1"));
        }
        let (qkv_bias, o_bias, qk_norm) = match family {
            Family::Qwen2 => (true, false, false),
            Family::Qwen3 => (bias, bias, true),
            Family::Lowkey => (keys.flag("qkv_bias")?.unwrap_or(bias), bias, keys.flag("qk_norm")?.unwrap_or(false)),
            _ => (bias, bias, false),
        };
        Ok(Self {
            num_key_value_heads: keys.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            rotary_dim: (head_dim as f64 * rotary).round() as usize,
            qkv_bias,
            o_bias,
            qk_norm,
        })
    }

    /// Its keys of `config.json` that every family has.
    pub(crate) fn keys(&self) -> Value {
        json!({
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "attention_bias": self.o_bias,
        })
    }

    /// Those that lowkey's own family has besides.
    pub(crate) fn own_keys(&self) -> Value {
        json!({
            "partial_rotary_factor": self.rotary_dim as f64 / self.head_dim as f64,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
        })
    }

    pub(crate) fn check(&self, heads: usize) -> Result<()> {
        check_size("head_dim", self.head_dim, WIDEST)?;
        check_heads(heads, self.head_dim, WIDEST)?;
        check_size("num_key_value_heads", self.num_key_value_heads, WIDEST)?;
        if !heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::config(
                "num_key_value_heads",
                &self.num_key_value_heads,
                format!("must divide num_attention_heads = {heads}"),
            ));
        }
        if self.rotary_dim > self.head_dim {
            let why = format!("at most the whole head can be rotated, head_dim = {}", self.head_dim);
            return Err(Error::config("partial_rotary_factor", &self.rotary_dim, why));
        }
        even(if self.rotary_dim == self.head_dim { "head_dim" } else { "partial_rotary_factor" }, self.rotary_dim)
    }

    /// The transformers class that computes a model with this attention, [`Family::Lowkey`] where there is none.
    pub(crate) fn family(&self, mlp_bias: bool) -> Family {
        if self.rotary_dim != self.head_dim || mlp_bias && (self.qk_norm || self.qkv_bias != self.o_bias) {
            return Family::Lowkey;
        }
        match (self.qk_norm, self.qkv_bias, self.o_bias) {
            (false, bias, o_bias) if bias == o_bias => Family::Llama,
            (false, true, false) => Family::Qwen2,
            (true, bias, o_bias) if bias == o_bias => Family::Qwen3,
            _ => Family::Lowkey,
        }
    }

    /// 1/√D
    pub(crate) fn softmax_scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Its name beside `heads` query heads.
    pub(crate) fn name(&self, heads: usize) -> String {
        match self.num_key_value_heads {
            all if all == heads => "MHA".into(),
            1 => "MQA".into(),
            groups => format!("GQA-{groups}"),
        }
    }

    /// Keys, then values.
    pub(crate) fn cache_buffers(&self) -> Vec<CacheBuffer> {
        vec![CacheBuffer { heads: self.num_key_value_heads, width: self.head_dim, split: self.head_dim }; 2]
    }

    pub(crate) fn sizes(&self, d: usize, heads: usize) -> AttentionSizes {
        let (q, kv) = (heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let some = |set: bool, width: usize| if set { width } else { 0 };
        AttentionSizes {
            matrices: d * q + 2 * d * kv + q * d,
            vectors: some(self.qkv_bias, q + 2 * kv) + some(self.o_bias, d) + some(self.qk_norm, 2 * self.head_dim),
            pair: 2 * q,
            expanded: 2 * kv,
            cached: 2 * kv,
            widest: q,
            kept: 2 * q + 2 * kv,
        }
    }

    /// [`ModelConfig::decode_costs`](crate::ModelConfig::decode_costs).
    pub(crate) fn decode_costs(&self, d: usize, heads: usize, context: usize) -> DecodeCosts {
        let weights = 2 * d * self.head_dim * (heads + self.num_key_value_heads);
        let cached = context * 2 * self.num_key_value_heads * self.head_dim;
        let products = weights + context * 2 * heads * self.head_dim;
        let expanded = AttentionCost { weights, cached, rebuilt: 0, products };
        DecodeCosts { expanded, absorbed: None, fused: None }
    }
}
