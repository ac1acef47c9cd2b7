//! The model that is exported.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_data::{Generation, Tokenizer};
use lowkey_files::hash::FileHash;
use lowkey_model::{CausalLm, ModelDir, attention::AttentionConfig, config::Family};

use crate::error::{Error, Result};
use crate::idle_norm::with_idle_norms;

/// A model directory, opened.
#[derive(Debug)]
pub struct Source {
    /// The folder, in which everything below was found.
    pub dir: ModelDir,
    /// Its model, in f32 on a device.
    pub model: CausalLm,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// How it is to generate, as its files say.
    pub generation: Generation,
    /// The files that the model was read from, with their hashes.
    pub files: Vec<FileHash>,
}

impl Source {
    /// Reads a Hugging Face model directory.
    ///
    /// # Errors
    /// [`Error::Model`] and [`Error::Data`] from its readers, [`Error::File`] where it changes while it is read.
    pub fn open(dir: &Path, device: &Device) -> Result<Self> {
        Self::read(ModelDir::open(dir)?, device)
    }

    /// Reads a directory that has been opened. One of an adapter gives the model with the adapter beside it: what is written is the
    /// merged model, and what it is compared with the adapted one.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn read(dir: ModelDir, device: &Device) -> Result<Self> {
        let before = dir.stamps()?;
        let mut model = dir.load(device)?;
        let tokenizer = match dir.beside().join("tokenizer.json").is_file() {
            true => Some(Tokenizer::from_model_dir(dir.beside())?),
            false => None,
        };
        let generation = Generation::from_model_dir(dir.beside_with("generation_config.json"), tokenizer.as_ref())?;
        // Whatever is made of it is to stop where it does.
        model.config.eos_token_id.clone_from(&generation.ends);
        let files = dir.hashes()?;
        if dir.stamps()? != before {
            return Err(Error::file(dir.given(), "has changed while it was read; try again when nobody writes it"));
        }
        Ok(Self { dir, model, tokenizer, generation, files })
    }
}

/// The model under a name that transformers knows.
///
/// A factor on the latent (`latent_scale`) is multiplied into the gain of the latent's norm, which is the same computation
/// and leaves a plain DeepSeek-V3; each gain is rounded once. A cut latent is read whole again, with weights of zero for what was
/// cut: the same function from a cache as wide as before, as no class of transformers has a narrower one. A latent without a norm gets
/// one that does nothing. Adapters are multiplied in.
///
/// # Errors
/// [`Error::Unsupported`] where no class of transformers computes the model.
pub fn canonical(model: &CausalLm) -> Result<CausalLm> {
    let mut model = model.with_whole_latents();
    with_idle_norms(&mut model, "a Hugging Face directory")?;
    for block in &mut model.model.layers {
        if let Some(mla) = block.self_attn.latent_mut()
            && mla.dims.latent_scale != 1.0
        {
            let gain = &mla.kv_a_layernorm.gain();
            let values = gain.try_to_vec_as::<f32>().map_err(|e| Error::device("kv_a_layernorm.weight", e))?;
            let scaled = values.iter().map(|x| (f64::from(*x) * mla.dims.latent_scale) as f32).collect();
            let data = TensorData::new(scaled, gain.dims());
            mla.kv_a_layernorm.set_gain(Tensor::from_data(data, &gain.device()));
            mla.dims.latent_scale = 1.0;
        }
    }
    for mla in model.config.latents_mut() {
        *mla = mla.folded();
    }
    if model.config.family == Family::Lowkey {
        model.config.family = model.config.natural_family();
    }
    if model.config.family == Family::Lowkey {
        let why = match model.config.attention() {
            AttentionConfig::Mla(mla) => mla.beyond_deepseek().unwrap_or(
                "no transformers class with latents has biases in its feed-forward layers and rotates halves",
            ),
            AttentionConfig::Grouped(_) => {
                "no transformers class has this combination of partial_rotary_factor, qk_norm and biases; rotate the \
                 whole head, and have biases as Llama, Qwen2 or Qwen3 do"
            }
        };
        return Err(Error::unsupported("a Hugging Face directory", why));
    }
    Ok(model)
}
