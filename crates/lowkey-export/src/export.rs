//! Writing an export, and computing the evidence from what was written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_files::{hash::FileHash, is_plain_name, mark::Kind, printable};
use lowkey_infer::Form;
use lowkey_model::{
    CausalLm, NewModelDir,
    attention::{FusedMla, Mla},
    checkpoint::WeightDtype,
};

use crate::certificate::{
    Bounds, Certificate, Evidence, JSON, MARKDOWN, ProductEvidence, SourceFiles, TensorError, WeightEvidence,
};
use crate::error::{Error, Result};
use crate::evidence::{Candidate, Text, compare_greedy, compare_logits, not_greedy};
use crate::files;
use crate::idle_norm::lacks_norms;
use crate::plan::{LayerForm, LayerPlan, PlanSettings, latent_attention, plan};
use crate::products::{self, prefix};
use crate::side::{self, Exact};
use crate::source::{Source, canonical};
use crate::target::{Layout, Target};
use crate::{Observer, Progress, card, gguf, hf};

/// Side file with W_UK and W_UV.
pub(crate) const ABSORBED: &str = "absorbed.safetensors";

/// Side file with the fused products.
pub const FUSED: &str = "fused.safetensors";

/// The model card.
const CARD: &str = "README.md";

/// The weights of a GGUF export.
pub(crate) const GGUF: &str = "model.gguf";

/// What no figure of a certificate speaks of.
const NOT_COVERED: [&str; 1] =
    ["not measured: chat templates, settings for generation, positions past the compared text, and reading \
                                 by other programs"];

/// What to export and what to demand of it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Layout and number format.
    pub target: Target,
    /// The folder to make.
    pub out: PathBuf,
    /// Replace an export that lies there.
    pub overwrite: bool,
    /// For [`Layout::Fused`]: the form of every layer, instead of the cheapest.
    pub form: Option<LayerForm>,
    /// Tokens in the cache that the plan counts with; absent: the model's longest.
    pub context: Option<usize>,
    /// The text that source and export are compared on.
    pub text: Text,
    /// What is demanded.
    pub bounds: Bounds,
    /// Weights above this are cut into shards.
    pub max_shard_bytes: usize,
}

/// Exports a model and certifies the files that were written; a folder whose certificate does not hold is not left behind.
///
/// # Errors
/// [`Error::Unsupported`] where the target cannot hold the model, [`Error::Broken`] where a figure is worse than its bound,
/// [`Error::File`] where `out` is in use, and what reading and writing files brings.
pub fn export(source: &Source, options: &Options, device: &Device, observe: Observer) -> Result<Certificate> {
    let Options { target, out, overwrite, form, text, bounds, .. } = options;
    check_text(text, &source.model)?;
    if target.to == Layout::Gguf && out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) {
        let folder = out.with_extension("");
        let why = format!("names a folder, in which {GGUF} and its certificate will lie; use {}", folder.display());
        return Err(Error::setting("out", out.display(), why));
    }
    if form.is_some() && target.to != Layout::Fused {
        return Err(Error::setting("form", form.map_or_else(String::new, |f| f.to_string()), "belongs to --to fused"));
    }
    let plan = match target.to {
        Layout::Fused | Layout::Absorbed => {
            let context = options.context.unwrap_or(source.model.config.max_position_embeddings);
            let bytes_per_number = target.weight_dtype()?.bytes_per_value();
            let forced = if target.to == Layout::Absorbed { Some(LayerForm::Absorbed) } else { *form };
            plan(&source.model.config, PlanSettings { context, bytes_per_number }, forced)?
        }
        Layout::Hf | Layout::Gguf => Vec::new(),
    };
    let staging = NewModelDir::begin(out, Kind::Export, *overwrite, &source.dir)?;
    observe(Progress { doing: "writing", done: 0, of: 0 });
    let mut notes = write(source, options, &plan, &staging)?;
    let evidence = gather(staging.dir(), target, &source.model, text, device, observe)?;
    let mut failures = header_failures(staging.dir(), target, source)?;
    failures.extend(evidence.failures(bounds));
    if !failures.is_empty() {
        return Err(Error::Broken { failures });
    }
    let files = SourceFiles { name: files::name(source.dir.given()), files: source.files.clone() };
    let mut certificate = Certificate::new(target.clone(), files, *bounds, evidence, text.clone());
    notes.extend(NOT_COVERED.map(String::from));
    certificate.plan = plan;
    certificate.notes = notes;
    let hash = |name: &String| files::hash_of(staging.dir(), name);
    certificate.outputs = files::list(staging.dir())?.iter().map(hash).collect::<Result<_>>()?;
    certificate.write(staging.dir())?;
    staging.commit()?;
    Ok(certificate)
}

/// A text that the model can read.
fn check_text(text: &Text, model: &CausalLm) -> Result<()> {
    let (vocab, longest) = (model.config.vocab_size, model.config.max_position_embeddings);
    let wrong = |ids: &Vec<u32>| ids.is_empty() || ids.len() > longest || ids.iter().any(|id| *id as usize >= vocab);
    if text.sequences.is_empty() || text.sequences.iter().any(wrong) {
        let why = format!("must hold at least one sequence of 1 to {longest} tokens below {vocab}");
        return Err(Error::setting("text", &text.description, why));
    }
    Ok(())
}

/// Writes the files and says what a user should know of them.
fn write(source: &Source, options: &Options, plan: &[LayerPlan], staging: &NewModelDir) -> Result<Vec<String>> {
    let dir = staging.dir();
    let Options { target, max_shard_bytes, .. } = options;
    let tokenizer = source.tokenizer.as_ref();
    if target.to == Layout::Gguf {
        let path = dir.join(GGUF);
        let summary = gguf::write(&path, &source.model, tokenizer, target.tensor_type()?)?;
        let fallbacks =
            summary.fallbacks.iter().map(|name| format!("{name} is stored in f16: its rows are no whole blocks"));
        return Ok(summary.notes.into_iter().chain(fallbacks).collect());
    }
    let dtype = target.weight_dtype()?;
    if dtype == WeightDtype::F16 && lacks_norms(&source.model) {
        let why = "its latents have no norm, and the numbers by which one that does nothing is written are too small for f16: use bf16";
        return Err(Error::unsupported("f16", why));
    }
    let model = canonical(&source.model)?;
    hf::write(dir, &model, tokenizer, &source.generation, (dtype, target.is_packed()), *max_shard_bytes)?;
    // Templates that no file of the tokenizer names, and the tokenizer's other spellings.
    staging.carry(&source.dir)?;
    lowkey_files::write(&dir.join(CARD), card::card(source, &model, target).as_bytes())?;
    match target.to {
        Layout::Absorbed => {
            let tensors = layers(&model).map(|(i, mla)| products::split(i, mla));
            side::write(&dir.join(ABSORBED), flat(tensors), dtype, &side::made_from(&model, dtype)?)?;
        }
        Layout::Fused if plan.iter().any(|layer| layer.form == LayerForm::Fused) => {
            let fused = |i: &usize| plan.get(*i).is_some_and(|layer| layer.form == LayerForm::Fused);
            let tensors = layers(&model).filter(|(i, _)| fused(i)).map(|(i, mla)| products::fuse(i, mla));
            side::write(&dir.join(FUSED), flat(tensors), dtype, &side::made_from(&model, dtype)?)?;
        }
        Layout::Fused => {
            return Ok(vec!["the plan fuses no layer: there is no side file, and --form fused makes one".into()]);
        }
        Layout::Hf | Layout::Gguf => {}
    }
    Ok(Vec::new())
}

/// The layers with Multi-head Latent Attention and their indices: all of a model's or none.
fn layers(model: &CausalLm) -> impl Iterator<Item = (usize, &Mla)> {
    model.model.layers.iter().enumerate().filter_map(|(i, block)| Some((i, block.self_attn.latent()?)))
}

fn flat(pairs: impl Iterator<Item = Result<[Exact; 2]>>) -> impl Iterator<Item = Result<Exact>> {
    pairs.flat_map(|pair| match pair {
        Ok([a, b]) => vec![Ok(a), Ok(b)],
        Err(e) => vec![Err(e)],
    })
}

/// Reads an export and compares it with its source.
///
/// # Errors
/// Where a file is missing, damaged or of another model.
pub(crate) fn gather(
    dir: &Path,
    target: &Target,
    source: &CausalLm,
    text: &Text,
    device: &Device,
    observe: Observer,
) -> Result<Evidence> {
    let (weights, products, candidate) = match target.to {
        Layout::Gguf => {
            let model = gguf::read_model(&dir.join(GGUF), device)?;
            let weights = weight_errors(&gguf::as_stored(source)?, &model)?;
            let form = if model.config.attention().latent().is_some() { Form::Absorbed } else { Form::Auto };
            (weights, Vec::new(), Candidate { model, fused: Vec::new(), form })
        }
        _ => {
            let (source, mut model) = (canonical(source)?, CausalLm::load(dir, device)?);
            let weights = weight_errors(&source, &model)?;
            let (products, fused, form) = match target.to {
                Layout::Absorbed => (absorb(dir, &source, &mut model, device)?, Vec::new(), Form::Absorbed),
                Layout::Fused if dir.join(FUSED).is_file() => {
                    let fused = load_fused(dir, &model, device)?;
                    (fused_errors(&source, &fused)?, fused, Form::Fused)
                }
                _ => (Vec::new(), Vec::new(), Form::Auto),
            };
            (weights, products, Candidate { model, fused, form })
        }
    };
    let logits = compare_logits(source, &candidate, text, device, observe)?;
    let greedy = compare_greedy(source, &candidate, text, device, observe)?;
    Ok(Evidence { weights, products, logits, greedy })
}

/// In what a GGUF's keys, its tokenizer among them, and the types of its tensors differ from what its source gives.
fn header_failures(dir: &Path, target: &Target, source: &Source) -> Result<Vec<String>> {
    if target.to != Layout::Gguf {
        return Ok(Vec::new());
    }
    let differs = gguf::differences(&dir.join(GGUF), &source.model, source.tokenizer.as_ref(), target.tensor_type()?)?;
    Ok(differs.into_iter().map(|line| format!("{GGUF}: {line}")).collect())
}

/// The worst of each layer's tensors.
fn weight_errors(source: &CausalLm, found: &CausalLm) -> Result<Vec<WeightEvidence>> {
    let mut parts: BTreeMap<Option<usize>, TensorError> = BTreeMap::new();
    let mut theirs: BTreeMap<String, Tensor<1>> =
        found.parameters().into_iter().map(|parameter| (parameter.name, parameter.value)).collect();
    for parameter in source.parameters() {
        let name = parameter.name;
        let Some(found) = theirs.remove(&name) else {
            return Err(Error::Broken { failures: vec![format!("the export has no {name}")] });
        };
        let error = error_of(&name, found, parameter.value)?;
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let part = parts.entry(layer).or_default();
        *part = part.worst(error);
    }
    let label = |layer: Option<usize>| match layer {
        Some(layer) => format!("layer {layer}"),
        None => "embeddings, head and final norm".into(),
    };
    Ok(parts.into_iter().map(|(layer, error)| WeightEvidence { part: label(layer), error }).collect())
}

fn error_of(name: &str, found: Tensor<1>, exact: Tensor<1>) -> Result<TensorError> {
    let host = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().map_err(|e| Error::device(name, e));
    let (found, exact) = (host(found)?, host(exact)?);
    if found.len() != exact.len() {
        let why = format!("{name} has {} values, the source's {}", found.len(), exact.len());
        return Err(Error::Broken { failures: vec![why] });
    }
    Ok(TensorError::of(found.into_iter().map(f64::from), exact.into_iter().map(f64::from)))
}

/// Compares the split weights of the side file with the source's, and puts them in place of the model's `kv_b_proj`, so that
/// what runs is what the side file holds.
fn absorb(dir: &Path, source: &CausalLm, model: &mut CausalLm, device: &Device) -> Result<Vec<ProductEvidence>> {
    let path = dir.join(ABSORBED);
    let mut found = side::read(&path)?;
    side::check_origin(&path, &found, model)?;
    let mut evidence = Vec::new();
    let exact: Vec<[Exact; 2]> = layers(source).map(|(i, mla)| products::split(i, mla)).collect::<Result<_>>()?;
    for (block, [uk, uv]) in model.model.layers.iter_mut().zip(exact) {
        let Some(mla) = block.self_attn.latent_mut() else { continue };
        let mut stored = |exact: &Exact| -> Result<Vec<f32>> {
            let values = side::take(&path, &mut found.tensors, &exact.name, &exact.shape)?;
            let error = TensorError::of(values.iter().copied().map(f64::from), exact.values.iter().copied());
            evidence.push(ProductEvidence { tensor: exact.name.clone(), error });
            Ok(values)
        };
        let (w_uk, w_uv) = (stored(&uk)?, stored(&uv)?);
        let dims = mla.dims;
        let heads = w_uk.chunks(dims.nope * dims.rank).zip(w_uv.chunks(dims.value * dims.rank));
        let joined: Vec<f32> = heads.flat_map(|(k, v)| k.iter().chain(v).copied()).collect();
        let shape = [dims.heads * (dims.nope + dims.value), dims.rank];
        mla.kv_b_proj.set_matrix(Tensor::from_data(TensorData::new(joined, shape), device));
    }
    side::nothing_left(&path, &found.tensors)?;
    Ok(evidence)
}

/// Multiplies out the attention of every layer that [fuses](lowkey_model::attention::AttentionConfig::fuses): products in f64, rounded
/// once to the model's format. `None` for other layers.
///
/// # Errors
/// [`Error::Unsupported`] for a layer without a query projection, [`Error::Device`] where a product cannot be read back.
pub fn fused_layers(model: &CausalLm, device: &Device) -> Result<Vec<Option<FusedMla>>> {
    let blocks = model.model.layers.iter().enumerate();
    let each = blocks.map(|(i, block)| {
        let Some(mla) = block.self_attn.latent().filter(|_| model.config.attention().fuses()) else { return Ok(None) };
        let (dtype, shapes) = (mla.o_proj.dtype(), mla.fused_shapes());
        let [query, output] = products::fuse(i, mla)?;
        let tensor = |exact: Exact, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(exact.values, shape), (device, dtype))
        };
        Ok(Some(FusedMla { query: tensor(query, shapes[0]), output: tensor(output, shapes[1]) }))
    });
    each.collect()
}

/// Reads the fused weights that lie beside a model, one entry per layer.
///
/// # Errors
/// [`Error::Unsupported`] where the model has no latent, [`Error::Io`] where there is no such file, [`Error::File`] where it does
/// not fit the model, or was multiplied from other weights than the model's.
pub fn load_fused(dir: &Path, model: &CausalLm, device: &Device) -> Result<Vec<Option<FusedMla>>> {
    latent_attention(&model.config)?;
    let path = dir.join(FUSED);
    let mut found = side::read(&path)?;
    let mut fused = Vec::new();
    for (i, mla) in layers(model) {
        let (query, output) = (format!("{}.q_fused.weight", prefix(i)), format!("{}.o_fused.weight", prefix(i)));
        if !found.tensors.contains_key(&query) && !found.tensors.contains_key(&output) {
            fused.push(None);
            continue;
        }
        let [of_query, of_output] = mla.fused_shapes();
        let mut tensor = |name: &str, shape: [usize; 2]| -> Result<Tensor<2>> {
            let values = side::take(&path, &mut found.tensors, name, &shape)?;
            Ok(Tensor::from_data(TensorData::new(values, shape), device))
        };
        fused.push(Some(FusedMla { query: tensor(&query, of_query)?, output: tensor(&output, of_output)? }));
    }
    side::nothing_left(&path, &found.tensors)?;
    side::check_origin(&path, &found, model)?;
    Ok(fused)
}

/// Compares fused weights with the source's products in f64.
fn fused_errors(source: &CausalLm, fused: &[Option<FusedMla>]) -> Result<Vec<ProductEvidence>> {
    let mut evidence = Vec::new();
    for ((i, mla), fused) in layers(source).zip(fused) {
        let Some(FusedMla { query, output }) = fused else { continue };
        for (exact, stored) in products::fuse(i, mla)?.into_iter().zip([query, output]) {
            let values = stored.try_to_vec_as::<f32>().map_err(|e| Error::device(&exact.name, e))?;
            let error = TensorError::of(values.into_iter().map(f64::from), exact.values.into_iter());
            evidence.push(ProductEvidence { tensor: exact.name, error });
        }
    }
    Ok(evidence)
}

/// What [`verify`] found.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The certificate that lies in the folder.
    pub certificate: Certificate,
    /// The figures as they are now.
    pub evidence: Option<Evidence>,
    /// A line for each file and figure that fails; empty where all holds.
    pub failures: Vec<String>,
    /// What the reader should know besides.
    pub notes: Vec<String>,
}

/// Recomputes a certificate from the files.
///
/// With the source at hand all of it; without, the weights in the export's own Hugging Face files stand in for the source, which
/// leaves out how they were rounded. A GGUF export holds no other weights and cannot be recomputed without its source.
///
/// # Errors
/// [`Error::Io`] and [`Error::File`] where the certificate or a file of the export cannot be read.
pub fn verify(dir: &Path, source: Option<&Source>, device: &Device, observe: Observer) -> Result<Verdict> {
    let certificate = Certificate::read(dir)?;
    let (mut failures, mut notes) = (Vec::new(), Vec::new());
    for expected in &certificate.outputs {
        observe(Progress { doing: "hashing", done: 0, of: 0 });
        let name = printable(&expected.name);
        if !expected.name.split('/').all(is_plain_name) {
            failures.push(format!("{name}: no file name; the certificate has been changed"));
            continue;
        }
        match files::hash_of(dir, &expected.name) {
            Ok(found) if found == *expected => {}
            // A model card is there to be edited, and computes nothing.
            Ok(_) if expected.name == CARD => notes.push(format!("{name} has been edited since the export")),
            Ok(found) => failures.push(format!(
                "{name}: SHA-256 is {}, the certificate says {}: the file has changed since the export",
                found.sha256,
                printable(&expected.sha256)
            )),
            Err(e) if !dir.join(&expected.name).exists() => failures.push(format!("{name}: is missing ({e})")),
            Err(e) => failures.push(e.to_string()),
        }
    }
    for name in files::list(dir)? {
        let known = [JSON, MARKDOWN].contains(&name.as_str()) || certificate.outputs.iter().any(|f| f.name == name);
        let loaded = [".safetensors", ".json", ".gguf", ".bin", ".jinja"].iter().any(|end| name.ends_with(end));
        let shown = printable(&name);
        match (known, loaded) {
            (true, _) => {}
            (false, true) => failures.push(format!("{shown}: is no part of the export, and engines may load it")),
            (false, false) => notes.push(format!("{shown} is no part of the export")),
        }
    }
    notes.extend(certificate.bounds.laxer_than(&certificate.target.bounds()));
    if !certificate.has_its_page(dir)? {
        failures.push(format!("{MARKDOWN} and {JSON}: one is not the one that was written with the other"));
    }
    // Of files that have changed no figure is worth computing.
    if !failures.is_empty() {
        return Ok(Verdict { certificate, evidence: None, failures, notes });
    }
    let own;
    let reference = match source {
        Some(source) => {
            failures.extend(other_source(&certificate.source, source));
            &source.model
        }
        None if certificate.target.to == Layout::Gguf => {
            failures.push(format!(
                "{GGUF} holds the only weights here: give the model that it was made of, --source MODEL ({})",
                certificate.source.name
            ));
            return Ok(Verdict { certificate, evidence: None, failures, notes });
        }
        None => {
            notes.push(
                "without --source the export's own Hugging Face files stand in for the source: how its weights were \
                 rounded is not recomputed"
                    .into(),
            );
            own = CausalLm::load(dir, device)?;
            &own
        }
    };
    check_text(&certificate.text, reference)?;
    let evidence = gather(dir, &certificate.target, reference, &certificate.text, device, observe)?;
    if let Some(source) = source {
        failures.extend(header_failures(dir, &certificate.target, source)?);
    }
    failures.extend(certificate.evidence.contradictions(&evidence, source.is_some()));
    let recorded = &certificate.evidence.greedy;
    // The usual bound: the certificate's own may have been made laxer.
    let tie = certificate.target.bounds().logit;
    failures.extend(not_greedy(recorded, &evidence.greedy, (reference, source.is_some()), tie, device)?);
    failures.extend(evidence.failures(&certificate.bounds));
    Ok(Verdict { certificate, evidence: Some(evidence), failures, notes })
}

/// The files that differ from those the export was made of.
fn other_source(expected: &SourceFiles, found: &Source) -> Vec<String> {
    let differs = |file: &&FileHash| !found.files.contains(file);
    let line = |file: &FileHash| {
        format!(
            "source {}: {} is not the file that the export was made of",
            found.dir.path().display(),
            printable(&file.name)
        )
    };
    // Both ways: a certificate that leaves files out says nothing of them.
    let unnamed = found.files.iter().filter(|file| expected.files.iter().all(|named| named.name != file.name));
    expected.files.iter().filter(differs).chain(unnamed).map(line).collect()
}
