//! How fast the models of a study decode, on the machine that reports.

use std::path::Path;

use burn::tensor::Device;
use lowkey_infer::{CacheDtype, Form};
use lowkey_model::CausalLm;
use lowkey_train::bench::{self, DecodeOptions, Subject};

use crate::collect::finished;
use crate::error::Result;
use crate::expand::Expanded;
use crate::study::Study;

/// Tokens that are decoded over each context.
const STEPS: usize = 16;

impl Expanded {
    /// Measures tokens per second of each arm's first finished model over `contexts` tokens in the cache, at batch 1: MLA in its
    /// absorbed form. `observe` is told which arm comes next.
    ///
    /// # Errors
    /// [`crate::Error::Train`] for a checkpoint that cannot be loaded, or contexts that this machine cannot hold.
    pub fn measure_decoding(
        &self,
        study: &mut Study,
        out: &Path,
        contexts: &[usize],
        observe: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let device = Device::flex();
        for run in self.runs(out, None)? {
            let Some(arm) = study.arms.get_mut(run.arm) else { continue };
            if !arm.decode_tokens_per_s.is_empty() || !finished(&run.out) {
                continue;
            }
            observe(&arm.name);
            let model =
                CausalLm::load(&run.out.join("checkpoints/best"), &device).map_err(lowkey_train::Error::from)?;
            let way = if model.config.attention().latent().is_some() { Form::Absorbed } else { Form::Expanded };
            let subject = Subject { name: arm.name.clone(), model, fused: Vec::new() };
            let options = DecodeOptions {
                batch: 1,
                contexts: contexts.to_vec(),
                new: STEPS,
                ways: vec![way],
                cache_dtype: CacheDtype::F32,
                weights: None,
                threads: None,
            };
            let figures = bench::decode(subject, &options, &mut |_| {})?;
            arm.decode_tokens_per_s = figures.rows.iter().map(|row| (row.context, row.tokens_per_s)).collect();
        }
        Ok(())
    }
}
