//! What finished models lose to caches of fewer bits.
//!
//! Int8 runs through the cache that decoding uses. Int4, for which there is no cache, is the same rounding with 15 levels in place of
//! 255, in a forward pass whose attention reads rounded latents (or keys and values).

use std::path::Path;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowkey_infer::{CacheDtype, Decoder, Form};
use lowkey_model::{CausalLm, attention::Seen, ids_tensor};
use lowkey_train::{RunConfig, RunOptions, checkpoint, evaluate::Held};
use serde_json::json;

use crate::collect::{QUANTISED, read_json};
use crate::error::{Error, Result};
use crate::expand::Expanded;

/// Documents at a time.
const DOCUMENTS: usize = 16;

/// Largest code of four bits.
const INT4: f64 = 7.0;

/// Evaluates a finished run's model with its cache in int8 and in int4 and writes the figures down, where that has not been done;
/// whether there are such figures now, or can be none.
pub(crate) fn quantise(out: &Path, config: &RunConfig, expanded: &Expanded) -> Result<bool> {
    let path = out.join(QUANTISED);
    if read_json(&path).is_ok_and(|found| found.get("int4").is_some()) {
        return Ok(true);
    }
    let Some(dir) = checkpoint::newest(&out.join("checkpoints"))? else { return Ok(false) };
    let options = RunOptions {
        run_file: expanded.experiment.base_path(),
        out: out.to_path_buf(),
        resume: true,
        overwrite: false,
        turn: 0,
        environment: serde_json::Map::new(),
    };
    let data = lowkey_train::setup(config, &options, &mut |_| {})?.data;
    let Held::Documents(documents) = &data.held else { return Ok(true) };
    // All of a document is looked at here.
    if documents.iter().any(|document| document.learnt.contains(&false)) {
        return Ok(true);
    }
    let device = Device::flex();
    let model = CausalLm::load(&dir, &device).map_err(lowkey_train::Error::from)?;
    let documents: Vec<&[u32]> =
        documents.iter().map(|document| &document.ids[..]).filter(|ids| ids.len() > 1).collect();
    let int8 = loss(&documents, &dir, &device, |rows| in_int8(&model, rows, &device))?;
    let int4 = loss(&documents, &dir, &device, |rows| Ok(rounded_pass(&model, rows, INT4, &device)))?;
    lowkey_files::write(&path, json!({ "int8": int8, "int4": int4 }).to_string().as_bytes())?;
    Ok(true)
}

/// Nats per token of documents of two tokens or more, from the logits `[rows, longest, vocab]` that `logits` gives for rows of different lengths.
fn loss(
    documents: &[&[u32]],
    dir: &Path,
    device: &Device,
    logits: impl Fn(&[&[u32]]) -> Result<Tensor<3>>,
) -> Result<f64> {
    let (mut nats, mut tokens) = (0.0, 0);
    for documents in documents.chunks(DOCUMENTS) {
        let rows: Vec<&[u32]> = documents.iter().map(|ids| &ids[..ids.len() - 1]).collect();
        let next: Vec<&[u32]> = documents.iter().map(|ids| &ids[1..]).collect();
        let Some(longest) = rows.iter().map(|row| row.len()).max() else { continue };
        // Padding is given token 0 to predict, and not counted.
        let padded = |ids: &&[u32]| {
            let ids = ids.iter().map(|id| *id as i32).chain(std::iter::repeat(0)).take(longest);
            ids.collect::<Vec<i32>>()
        };
        let targets: Vec<i32> = next.iter().flat_map(padded).collect();
        let targets = Tensor::<3, Int>::from_data(TensorData::new(targets, [rows.len(), longest, 1]), device);
        let losses = log_softmax(logits(&rows)?, 2).gather(2, targets).try_into_vec_as::<f32>();
        let losses = losses.map_err(|e| Error::file(dir, format!("the losses cannot be read back: {e:?}")))?;
        for (row, losses) in next.iter().zip(losses.chunks(longest)) {
            nats -= losses.iter().take(row.len()).map(|loss| f64::from(*loss)).sum::<f64>();
            tokens += row.len();
        }
    }
    Ok(nats / f64::from(u32::try_from(tokens.max(1)).unwrap_or(u32::MAX)))
}

/// Logits of rows through a cache in int8.
fn in_int8(model: &CausalLm, rows: &[&[u32]], device: &Device) -> Result<Tensor<3>> {
    let form = if model.config.attention().latent().is_some() { Form::Absorbed } else { Form::Expanded };
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let decoder = Decoder::with_cache(model, [rows.len(), longest], CacheDtype::Int8, form, device);
    Ok(decoder.and_then(|mut decoder| decoder.forward(rows)).map_err(lowkey_train::Error::from)?)
}

/// Logits of rows, padded at their ends, with all that a cache would hold rounded to codes of at most `most` in size.
fn rounded_pass(model: &CausalLm, rows: &[&[u32]], most: f64, device: &Device) -> Tensor<3> {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let ids: Vec<u32> =
        rows.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(longest)).collect();
    let context = model.context(&vec![0; ids.len()], longest, device);
    let mut x = model.model.embed_tokens.forward(ids_tensor(&ids, rows.len(), longest, device));
    let rounded = |x| rounded(x, most);
    for block in &model.model.layers {
        x = block.forward(x, Seen::Rounded(&context, &rounded), None);
    }
    model.logits(model.model.norm.forward(x))
}

/// Each vector along the last axis as whole multiples of its largest number over `most`.
fn rounded(x: Tensor<4>, most: f64) -> Tensor<4> {
    // A vector of zeros stays one.
    let scale = x.clone().abs().max_dim(3).clamp_min(f32::MIN_POSITIVE) / most;
    (x / scale.clone()).round() * scale
}

#[cfg(test)]
mod tests {
    use lowkey_model::config::ModelSection;

    use super::*;

    fn model(attention: &str) -> CausalLm {
        let section = format!(
            "attention = \"{attention}\"\nhidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\n\
             kv_lora_rank = 12\nqk_nope_head_dim = 8\nqk_rope_head_dim = 4\nv_head_dim = 8\nintermediate_size = 48\n\
             initializer_range = 0.2\n"
        );
        let (config, _) = toml::from_str::<ModelSection>(&section).unwrap().resolve(19, 16).unwrap();
        CausalLm::init(&config, 4, &Device::flex())
    }

    /// The rounding of the simulation is that of the cache, at the number of levels that the cache has.
    #[test]
    fn with_255_levels_it_is_the_int8_cache() {
        let device = Device::flex();
        let rows: Vec<Vec<u32>> = [9, 14, 5].iter().map(|n| (0..*n).map(|i| (i * 7 + n) % 19).collect()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        for attention in ["mla", "gqa", "mha"] {
            let model = model(attention);
            let host = |x: Tensor<3>| x.try_into_vec_as::<f32>().unwrap();
            let of_rows = |logits: Vec<f32>| -> Vec<f32> {
                let rows = rows.iter().zip(logits.chunks(14 * 19));
                rows.flat_map(|(row, logits)| logits[..row.len() * 19].to_vec()).collect()
            };
            let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            let exact = of_rows(host(rounded_pass(&model, &rows, 1e6, &device)));
            let cached = of_rows(host(in_int8(&model, &rows, &device).unwrap()));
            let eight = of_rows(host(rounded_pass(&model, &rows, 127.0, &device)));
            let four = of_rows(host(rounded_pass(&model, &rows, INT4, &device)));
            let (of_8, of_4) = (apart(&exact, &eight), apart(&exact, &four));
            // A code that falls the other way by rounding is worth a level; that is rare.
            assert!(apart(&cached, &eight) < 0.5 * of_8, "{attention}: {} {of_8}", apart(&cached, &eight));
            assert!(of_8 > 1e-5 && of_4 > 5.0 * of_8, "{attention}: {of_8} {of_4}");
        }
    }
}
