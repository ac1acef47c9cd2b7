//! `lowkey logits`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, bail};
use lowkey_model::ids_tensor;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::cli::LogitsArguments;
use crate::output::say;

pub(crate) fn logits(arguments: &LogitsArguments) -> anyhow::Result<()> {
    let device = super::open_device(&arguments.device)?;
    let model = super::load_model(&arguments.model, &device)?;
    let (ids, [rows, seq]) = read_ids(&arguments.ids)?;
    let (vocab, longest) = (model.config.vocab_size, model.config.max_position_embeddings);
    if seq > longest {
        bail!("{}: input_ids has {seq} positions, the model takes {longest}", arguments.ids.display());
    }
    if let Some(bad) = ids.iter().find(|id| **id as usize >= vocab) {
        bail!("{}: token {bad} is outside the vocabulary of {vocab}", arguments.ids.display());
    }
    let logits = model
        .forward(ids_tensor(&ids, rows, seq, &device))
        .try_into_vec_as::<f32>()
        .map_err(|e| anyhow::anyhow!("the logits cannot be read back: {e:?}"))?;
    let lost = logits.iter().filter(|x| !x.is_finite()).count();
    if lost > 0 {
        bail!(
            "{}: {lost} of {} logits are not finite, and nothing is written: the model's weights are damaged, or too large",
            arguments.model.display(),
            logits.len()
        );
    }
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![rows, seq, vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None::<HashMap<String, String>>)?;
    lowkey_files::write::output(&arguments.out, &file)?;
    say(&format!("{}: logits [{rows}, {seq}, {vocab}]", arguments.out.display()));
    Ok(())
}

/// Bytes of a file of ids; each takes eight, and its logits far more.
const MOST_IDS: u64 = 1 << 30;

fn read_ids(path: &Path) -> anyhow::Result<(Vec<u32>, [usize; 2])> {
    let name = || path.display().to_string();
    let bytes = lowkey_files::read(path, MOST_IDS)?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{}: not a safetensors file", name()))?;
    let view = tensors.tensor("input_ids").with_context(|| format!("{}: no tensor input_ids", name()))?;
    let (Dtype::I64, [rows, seq]) = (view.dtype(), view.shape()) else {
        bail!("{}: input_ids is {:?} {:?}, expected I64 [B, T]", name(), view.dtype(), view.shape());
    };
    if rows * seq == 0 {
        bail!("{}: input_ids is empty", name());
    }
    let mut ids = Vec::with_capacity(rows * seq);
    for b in view.data().chunks_exact(8) {
        let id = i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        ids.push(u32::try_from(id).with_context(|| format!("{}: {id} is no token id", name()))?);
    }
    Ok((ids, [*rows, *seq]))
}
