//! Whether what was made says the same as what it was made of: logits, and the tokens that follow a prompt.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};
use lowkey_infer::GenerateConfig;
use lowkey_model::{CausalLm, ModelConfig, ids_tensor};
use serde_json::{Value, json};

/// Tokens that two models are compared on where there is no text.
const PROBE: usize = 256;

/// Furthest that a logit of an exact conversion may be off, in units of the largest: what rounding in 32 bits does and more.
const TOLERANCE: f32 = 1e-3;

/// Tokens of the prompt, and most that follow.
const PROMPT: usize = 16;
const FOLLOW: usize = 32;

/// How far the logits of two models are apart.
#[derive(Clone, Copy)]
pub(super) struct Agreement {
    /// Largest difference of a logit.
    pub(super) apart: f32,
    /// The largest logit.
    pub(super) largest: f32,
}

/// How far two models are apart.
pub(super) struct Same {
    pub(super) logits: Agreement,
    /// How many of the greedy tokens are the same from the first on, and of how many.
    greedy: [usize; 2],
}

impl Same {
    /// Over the first sequence of a text, or over tokens of all kinds.
    pub(super) fn of(before: &CausalLm, after: &CausalLm, text: &[Vec<u32>], device: &Device) -> anyhow::Result<Self> {
        let (probe, longest) = (probe(&before.config), before.config.max_position_embeddings);
        let ids = text.first().unwrap_or(&probe);
        let logits = |model: &CausalLm| model.forward(ids_tensor(ids, 1, ids.len(), device));
        let (first, second) = (logits(before), logits(after));
        let number = |tensor: Tensor<3>| tensor.abs().max().into_scalar::<f32>();
        let (apart, largest) = (number(first.clone() - second), number(first));
        let prompt = &ids[..ids.len().min(PROMPT).min(longest.saturating_sub(1))];
        let config = GenerateConfig { max_new_tokens: FOLLOW.min(longest - prompt.len()), ..GenerateConfig::default() };
        let follow = |model: &CausalLm| -> anyhow::Result<Vec<u32>> {
            Ok(lowkey_infer::generate(model, prompt, &config, device, &mut |_| ControlFlow::Continue(()))?.ids)
        };
        let (first, second) = (follow(before)?, follow(after)?);
        let same = first.iter().zip(&second).take_while(|(a, b)| a == b).count();
        Ok(Self { logits: Agreement { apart, largest }, greedy: [same, first.len()] })
    }

    pub(super) fn greedy_report(&self) -> Value {
        json!({ "same": self.greedy[0], "of": self.greedy[1] })
    }

    pub(super) fn facts(&self) -> [(&'static str, String); 2] {
        let Self { logits, greedy: [same, of] } = self;
        [logits.fact(), ("greedy", format!("{same} of {of} tokens the same from the first on"))]
    }
}

impl Agreement {
    /// An error where the two are not the same model.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let Self { apart, largest } = *self;
        let agrees = apart <= TOLERANCE * largest.max(1.0);
        if !agrees {
            anyhow::bail!(
                "logits are off by {apart:e} where the largest is {largest}: not the same model; report this"
            );
        }
        Ok(())
    }

    pub(super) fn report(&self) -> Value {
        json!({ "max_logit_difference": self.apart, "max_logit": self.largest })
    }

    pub(super) fn fact(&self) -> (&'static str, String) {
        let Self { apart, largest } = self;
        ("logits", format!("off by {apart:.1e} at most, the largest {largest:.1}"))
    }
}

/// Tokens of all kinds.
pub(super) fn probe(config: &ModelConfig) -> Vec<u32> {
    let (vocab, longest) = (config.vocab_size as u64, config.max_position_embeddings);
    (0..PROBE.min(longest) as u64).map(|i| ((i * i * 31 + i * 7 + 1) % vocab) as u32).collect()
}
