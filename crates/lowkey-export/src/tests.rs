//! Exports of small models of every kind: what they hold, what their certificate says, and what it catches.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use lowkey_infer::{Decoder, Form};
use lowkey_model::{
    CausalLm, ModelConfig,
    attention::{AttentionConfig, GroupedConfig, MlaConfig},
    checkpoint::WeightDtype,
    ids_tensor,
    rope::{RopeConfig, RopePairs},
};

use crate::certificate::TensorError;
use crate::export::{ABSORBED, FUSED, GGUF, fused_layers, load_fused};
use crate::gguf::tests::{Folder, bits, config_with, distance, logits, random_model, yarn};
use crate::plan::{LayerForm, PlanSettings, plan};
use crate::source::canonical;
use crate::*;

/// MLA of every kind that all layouts can hold.
fn zoo() -> Vec<(&'static str, ModelConfig)> {
    vec![
        ("plain", config_with(|_, _| {})),
        ("q_lora_rank", config_with(|_, m| m.q_lora_rank = Some(8))),
        ("halves", config_with(|_, m| m.rope_interleave = false)),
        ("tied", config_with(|c, _| c.tie_word_embeddings = true)),
        ("yarn", config_with(|c, m| (c.rope, m.q_lora_rank) = (yarn(Some(1.0), Some(1.0)), Some(8)))),
        ("yarn, mixed", config_with(|c, _| c.rope = yarn(Some(0.7), Some(1.0)))),
        ("yarn, no mscale", config_with(|c, _| c.rope = yarn(None, None))),
        ("latent_scale", config_with(|_, m| m.latent_scale = true)),
        (
            "one layer, one head",
            config_with(|c, _| {
                c.layers.resize(1).unwrap();
                c.num_attention_heads = 1;
            }),
        ),
    ]
}

fn device() -> Device {
    Device::flex()
}

fn source(folder: &Folder, config: &ModelConfig, seed: u64) -> Source {
    let dir = folder.file("model");
    random_model(config, seed).save(&dir, WeightDtype::F32, usize::MAX).unwrap();
    Source::open(&dir, &device()).unwrap()
}

fn text(config: &ModelConfig) -> Text {
    let ids = |row: u32| (0..config.max_position_embeddings as u32).map(move |i| (i * i + 5 * row + 3) % 29).collect();
    Text { description: "squares".into(), sequences: (0..2).map(ids).collect() }
}

fn options(source: &Source, out: PathBuf, to: &str, dtype: &str) -> Options {
    let target = Target::parse(to, dtype).unwrap();
    Options {
        bounds: target.bounds(),
        target,
        out,
        overwrite: false,
        form: (to == "fused").then_some(LayerForm::Fused),
        context: None,
        text: text(&source.model.config),
        max_shard_bytes: usize::MAX,
    }
}

fn exported(source: &Source, out: &Path, to: &str, dtype: &str) -> Certificate {
    export(source, &options(source, out.to_path_buf(), to, dtype), &device(), &mut |_| {})
        .unwrap_or_else(|e| panic!("{to} {dtype}: {e}"))
}

fn verdict(out: &Path, source: Option<&Source>) -> Verdict {
    verify(out, source, &device(), &mut |_| {}).unwrap()
}

/// Positions past YaRN's original context, gains away from 1, greedy continuations of 64 tokens.
#[test]
fn every_layout_holds_every_model() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let folder = Folder::new();
        let source = source(&folder, &config, seed as u64 + 1);
        for to in ["hf", "absorbed", "fused", "gguf"] {
            let out = folder.file(to);
            let certificate = exported(&source, &out, to, "f32");
            let evidence = &certificate.evidence;
            assert_eq!(evidence.logits.positions, 256, "{name}, {to}");
            assert!(evidence.greedy.iter().all(|g| g.agree == 64), "{name}, {to}: {:?}", evidence.greedy);
            // What has other products adds up in another order, and so shows that the two were not the same model.
            let apart = !matches!(to, "absorbed" | "fused") || evidence.logits.max_relative > 0.0;
            assert!(evidence.logits.max_relative <= 1e-5 && apart, "{name}, {to}");
            let products = match to {
                "absorbed" | "fused" => 2 * config.layers.len(),
                _ => 0,
            };
            assert_eq!(evidence.products.len(), products, "{name}, {to}");
            let again = verdict(&out, Some(&source));
            assert_eq!((again.failures.as_slice(), again.evidence.as_ref()), (&[][..], Some(evidence)), "{name}, {to}");
            assert_eq!(verdict(&out, None).failures.is_empty(), to != "gguf", "{name}, {to}");
        }
    }
}

#[test]
fn narrow_formats_are_rounded_once_and_hold_their_bounds() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|c, m| (c.hidden_size, m.v_head_dim) = (32, 8)), 5);
    for (to, dtype) in
        [("hf", "bf16"), ("hf", "nf4"), ("absorbed", "f16"), ("fused", "bf16"), ("gguf", "q8_0"), ("gguf", "bf16")]
    {
        let out = folder.file(&format!("{to}-{dtype}"));
        // Weights at random are a harder case than trained ones.
        let mut options = options(&source, out.clone(), to, dtype);
        for bound in ["logit=1", "kl=1", "top1=0.5", "perplexity=1"] {
            options.bounds.set(bound).unwrap();
        }
        let certificate =
            export(&source, &options, &device(), &mut |_| {}).unwrap_or_else(|e| panic!("{to} {dtype}: {e}"));
        let worst = certificate.evidence.weights.iter().fold(0f64, |worst, w| worst.max(w.error.max));
        assert!(worst > certificate.bounds.weight_max / 16.0, "{to} {dtype}: {worst:e} is no rounding to {dtype}");
        assert!(verdict(&out, Some(&source)).failures.is_empty());
    }
}

/// In f64 what differs differs in the mathematics: the products as the export forms them, run beside the other two forms.
#[test]
fn the_products_are_the_model_in_f64() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let narrow = random_model(&config, seed as u64 + 40);
        let values = narrow.parameters().into_iter().map(|p| p.value.cast(FloatDType::F64)).collect();
        let wide = narrow.with_values(values);
        let fused = fused_layers(&wide, &device()).unwrap();
        let ids: Vec<u32> = (0..100).map(|i| (i * i + 3) % 29).collect();
        let run = |form: Form| {
            let mut decoder = Decoder::new(&wide, 1, ids.len(), form, &device()).unwrap();
            if form == Form::Fused {
                decoder = decoder.with_fused(fused.clone()).unwrap();
            }
            let parts = ids.chunks(7).map(|chunk| decoder.forward(&[chunk]).unwrap()).collect();
            Tensor::cat(parts, 1).try_into_vec_as::<f64>().unwrap()
        };
        let expanded = run(Form::Expanded);
        let largest = expanded.iter().fold(0f64, |m, x| m.max(x.abs()));
        for form in [Form::Absorbed, Form::Fused] {
            let off = run(form).iter().zip(&expanded).fold(0f64, |m, (a, b)| m.max((a - b).abs())) / largest;
            assert!(off <= 1e-12, "{name}, {form}: {off:e}");
        }
    }
}

#[test]
fn import_export_import_keeps_every_bit() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        if name == "latent_scale" {
            continue;
        }
        let folder = Folder::new();
        let source = source(&folder, &config, seed as u64 + 9);
        let out = folder.file("out");
        exported(&source, &out, "hf", "f32");
        let again = CausalLm::load(&out, &device()).unwrap();
        assert_eq!(bits(&again), bits(&source.model), "{name}");
        assert_eq!(again.config, source.model.config, "{name}");
    }
}

#[test]
fn a_latent_scale_is_folded_into_a_plain_deepseek_v3() {
    let model = random_model(&config_with(|_, m| m.latent_scale = true), 3);
    let plain = canonical(&model).unwrap();
    assert_eq!(plain.config.family.model_type(), "deepseek_v3");
    assert_eq!(model.config.family.model_type(), "lowkey");
    let ids: Vec<u32> = (0..60).map(|i| (i * 7 + 1) % 29).collect();
    let off = distance(&logits(&plain, &ids), &logits(&model, &ids));
    assert!(off < 1e-5, "{off:e}");
}

#[test]
fn a_latent_without_a_norm_gets_one_that_does_nothing() {
    let config = config_with(|_, m| (m.latent_norm, m.attention_bias) = (false, true));
    let model = random_model(&config, 3);
    let plain = canonical(&model).unwrap();
    assert_eq!(plain.config.family.model_type(), "deepseek_v3");
    let ids: Vec<u32> = (0..60).map(|i| (i * 7 + 1) % 29).collect();
    let off = distance(&logits(&plain, &ids), &logits(&model, &ids));
    assert!(off < 1e-5, "{off:e}");
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, m| m.latent_norm = false), 4);
    for to in ["hf", "absorbed", "fused", "gguf"] {
        let out = folder.file(to);
        exported(&source, &out, to, "f32");
        assert_eq!(verdict(&out, Some(&source)).failures, [""; 0], "{to}");
    }
    for (to, dtype, fragment) in [("hf", "f16", "use bf16"), ("gguf", "f16", "too small for halves")] {
        let options = options(&source, folder.file("refused"), to, dtype);
        let refused = export(&source, &options, &device(), &mut |_| {}).unwrap_err().to_string();
        assert!(refused.contains(fragment), "{refused}");
    }
    let other = random_model(&config_with(|c, m| (c.rms_norm_eps, m.latent_norm) = (1e-5, false)), 1);
    assert!(canonical(&other).unwrap_err().to_string().contains("programs disagree"));
    for change in [|m: &mut MlaConfig| m.query_bias = true, |m: &mut MlaConfig| m.rope_pairs = Some(pairs())] {
        let model = random_model(&config_with(|_, m| change(m)), 1);
        let refused = canonical(&model).unwrap_err().to_string();
        assert!(refused.contains("query_bias") || refused.contains("rope_pairs"), "{refused}");
    }
}

fn pairs() -> RopePairs {
    RopePairs { width: 4, frequencies: vec![1, 0, 1] }
}

/// Any byte of any file.
#[test]
fn one_changed_byte_is_caught() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    for to in ["fused", "gguf"] {
        let out = folder.file(to);
        exported(&source, &out, to, "f32");
        for entry in fs::read_dir(&out).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with(lowkey_files::mark::MARK) {
                // It says who made the folder; nothing that computes reads it.
                continue;
            }
            let whole = fs::read(&path).unwrap();
            for at in [0, whole.len() / 3, whole.len() / 2, whole.len() - 2] {
                let mut bytes = whole.clone();
                bytes[at] ^= 1;
                fs::write(&path, &bytes).unwrap();
                let caught = verify(&out, Some(&source), &device(), &mut |_| {}).map_or(true, |v| {
                    // A model card is there to be edited: that is noticed, and no failure.
                    let card = path.ends_with("README.md") && v.notes.iter().any(|note| note.contains("README.md"));
                    !v.failures.is_empty() || card
                });
                assert!(caught, "{}: byte {at}", path.display());
            }
            fs::write(&path, &whole).unwrap();
        }
        assert!(verdict(&out, Some(&source)).failures.is_empty());
        fs::write(out.join("model-00002.safetensors"), "x").unwrap();
        assert!(verdict(&out, Some(&source)).failures[0].contains("no part of the export"));
    }
}

/// Hashes can be written anew by whoever changes a file; the figures cannot.
#[test]
fn a_weight_that_is_wrong_shows_in_the_figures() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    for (to, file) in [("absorbed", ABSORBED), ("fused", FUSED), ("hf", "model.safetensors"), ("gguf", GGUF)] {
        let out = folder.file(to);
        let mut certificate = exported(&source, &out, to, "f32");
        let path = out.join(file);
        let mut bytes = fs::read(&path).unwrap();
        // The sign and a bit of the exponent of a number: data begin at a multiple of 4 in both formats.
        let at = bytes.len() / 16 * 12 + 3;
        bytes[at] ^= 0x81;
        fs::write(&path, &bytes).unwrap();
        for output in &mut certificate.outputs {
            *output = files::hash_of(&out, &output.name).unwrap();
        }
        certificate.write(&out).unwrap();
        let failures = verdict(&out, Some(&source)).failures.join("\n");
        assert!(failures.contains("relative error"), "{to}: {failures}");
    }
}

/// A certificate can be written anew as a whole; what it says is measured again.
#[test]
fn a_recorded_figure_that_is_not_found_again_is_named() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    for (to, dtype) in [("hf", "bf16"), ("fused", "f32")] {
        let out = folder.file(to);
        let honest = exported(&source, &out, to, dtype);
        assert!(verdict(&out, Some(&source)).failures.is_empty());
        type Change = fn(&mut Certificate);
        let changes: [(&str, Change); 7] = [
            ("perplexity", |c| {
                c.evidence.logits.perplexity_source /= 8.0;
                c.evidence.logits.perplexity_export /= 8.0;
            }),
            ("positions compared", |c| c.evidence.logits.positions += 1),
            ("weights of layer 1", |c| {
                let error = &mut c.evidence.weights.last_mut().unwrap().error;
                error.max = 1.5 * error.max + 1e-9;
            }),
            ("weights of", |c| {
                let error = &mut c.evidence.weights[0].error;
                error.rms = 1.5 * error.rms + 1e-9;
            }),
            ("greedy continuation 1", |c| c.evidence.greedy[0].export[0] ^= 1),
            ("is not the file that the export was made of", |c| c.source.files.clear()),
            ("share of the same top tokens", |c| c.evidence.logits.top1_agreement = 0.5),
        ];
        for (what, change) in changes {
            let mut forged = honest.clone();
            change(&mut forged);
            forged.write(&out).unwrap();
            let failures = verdict(&out, Some(&source)).failures.join("\n");
            assert!(failures.contains(what), "{to}, {what}: {failures}");
        }
        let mut lax = honest.clone();
        lax.bounds.kl = 1.0;
        lax.write(&out).unwrap();
        let found = verdict(&out, Some(&source));
        assert!(found.failures.is_empty(), "{:?}", found.failures);
        assert!(found.notes.iter().any(|note| note.contains("allows kl ≤ 1.0e0")), "{:?}", found.notes);
        // Without the source there is still the export's own.
        let mut forged = honest.clone();
        forged.evidence.logits.perplexity_export *= 1.01;
        forged.write(&out).unwrap();
        assert!(verdict(&out, None).failures.join("\n").contains("the export's perplexity"));
    }
}

/// Another processor rounds otherwise, and takes the other one of two tokens that are as likely as each other.
#[test]
fn another_token_of_a_tie_is_no_contradiction() {
    let folder = Folder::new();
    let config = config_with(|c, _| c.tie_word_embeddings = true);
    let dir = folder.file("twins");
    random_model(&config, 4).save(&dir, WeightDtype::F32, usize::MAX).unwrap();
    // Every second token is the twin of the one before it.
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info("model.embed_tokens.weight").unwrap();
    let width = info.shape[1] * 4;
    let from = header + 8 + info.data_offsets.0;
    for row in (0..info.shape[0] - 1).step_by(2) {
        bytes.copy_within(from + row * width..from + (row + 1) * width, from + (row + 1) * width);
    }
    fs::write(&path, bytes).unwrap();
    let source = Source::open(&dir, &device()).unwrap();
    let out = folder.file("hf");
    let honest = exported(&source, &out, "hf", "f32");

    let mut elsewhere = honest.clone();
    let greedy = &mut elsewhere.evidence.greedy[0];
    let even = greedy.export.iter().position(|id| id % 2 == 0 && (*id as usize) + 1 < config.vocab_size).unwrap();
    greedy.export[even] += 1;
    (greedy.agree, greedy.margin) = (even, Some(0.0));
    elsewhere.write(&out).unwrap();
    for with in [None, Some(&source)] {
        assert_eq!(verdict(&out, with).failures, Vec::<String>::new());
    }
    // Another token is none of a tie; nor is the source's, where the source is at hand.
    let mut forged = elsewhere.clone();
    forged.evidence.greedy[0].export[even] = (honest.evidence.greedy[0].export[even] + 2) % 28;
    forged.write(&out).unwrap();
    assert!(verdict(&out, None).failures.join("\n").contains("and no tie"));
    let mut forged = honest;
    let greedy = &mut forged.evidence.greedy[0];
    greedy.source[even] = (greedy.source[even] + 2) % 28;
    (greedy.agree, greedy.margin) = (even, Some(0.0));
    forged.write(&out).unwrap();
    assert!(verdict(&out, Some(&source)).failures.join("\n").contains("of the source's is not what"));
}

#[test]
fn what_a_folder_is_called_cannot_forge_a_page() {
    assert_eq!(markdown::words("a|b`<c>\n& d"), "a&#124;b'&lt;c>\\n&amp; d");
}

#[test]
fn a_side_file_of_other_weights_is_refused() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    for dtype in ["f32", "bf16"] {
        let out = folder.file(dtype);
        exported(&source, &out, "fused", dtype);
        let load = || load_fused(&out, &CausalLm::load(&out, &device()).unwrap(), &device());
        load().unwrap();
        // Another checkpoint of the same shape takes its place.
        let other = random_model(&source.model.config, 5);
        other.save(&out, WeightDtype::F32, usize::MAX).unwrap();
        let why = load().map(|_| ()).unwrap_err().to_string();
        assert!(why.contains("fused.safetensors") && why.contains("other weights"), "{why}");
    }
    // What an earlier version wrote says nothing of its origin.
    let out = folder.file("earlier");
    exported(&source, &out, "fused", "f32");
    let path = out.join(FUSED);
    let bytes = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let bare = safetensors::serialize(tensors.tensors(), None).unwrap();
    fs::write(&path, bare).unwrap();
    let why = load_fused(&out, &source.model, &device()).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("does not say which weights"), "{why}");
}

#[cfg(unix)]
#[test]
fn a_certificate_that_is_no_file_is_refused_at_once() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    let out = folder.file("out");
    exported(&source, &out, "hf", "f32");
    for name in ["certificate.json", "CERTIFICATE.md"] {
        let path = out.join(name);
        let kept = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let why = verify(&out, None, &device(), &mut |_| {}).map(|_| ()).unwrap_err().to_string();
        assert!(why.contains(name) && why.contains("not a regular file"), "{why}");
        fs::remove_file(&path).unwrap();
        fs::write(&path, kept).unwrap();
    }
    assert!(verdict(&out, None).failures.is_empty());
}

#[test]
fn what_breaks_a_bound_is_not_left_behind() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    let mut options = options(&source, folder.file("out"), "hf", "bf16");
    options.bounds.set("kl=0").unwrap();
    let message = export(&source, &options, &device(), &mut |_| {}).unwrap_err().to_string();
    assert!(message.contains("mean KL divergence"), "{message}");
    let left: Vec<_> = fs::read_dir(options.out.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["model"]);
    assert!(
        options.bounds.set("kl").is_err() && options.bounds.set("kl=-1").is_err() && options.bounds.set("x=1").is_err()
    );
}

#[test]
fn only_exports_are_replaced() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    let out = folder.file("out");
    exported(&source, &out, "hf", "f32");
    let mut options = options(&source, out.clone(), "absorbed", "f32");
    let refused = |options: &Options| export(&source, options, &device(), &mut |_| {}).unwrap_err().to_string();
    assert!(refused(&options).contains("--overwrite"));
    options.overwrite = true;
    export(&source, &options, &device(), &mut |_| {}).unwrap();
    assert!(out.join(ABSORBED).is_file());
    options.out = source.dir.path().to_path_buf();
    assert!(refused(&options).contains("the model that is read"));
    options.out = folder.file("mine");
    fs::create_dir(&options.out).unwrap();
    fs::write(options.out.join("certificate.json"), "{}").unwrap();
    assert!(refused(&options).contains("no lowkey.json"));
    options.out = out.clone();
    fs::write(out.join("id_rsa"), "key").unwrap();
    assert!(refused(&options).contains("id_rsa: was not written by lowkey"));
    options.text.sequences[0][0] = 29;
    assert!(refused(&options).contains("tokens below 29"));
}

#[test]
fn a_missing_or_foreign_side_tensor_is_named() {
    let folder = Folder::new();
    let source = source(&folder, &config_with(|_, _| {}), 2);
    let out = folder.file("out");
    exported(&source, &out, "fused", "f32");
    let message = |model: &CausalLm| load_fused(&out, model, &device()).unwrap_err().to_string();
    let fewer = random_model(&config_with(|c, _| c.layers.resize(1).unwrap()), 1);
    assert!(message(&fewer).contains("model.layers.1.self_attn.o_fused.weight"));
    let wider = random_model(&config_with(|_, m| m.kv_lora_rank = 10), 1);
    assert!(message(&wider).contains("has shape [45, 12]"), "{}", message(&wider));
    fs::write(out.join(FUSED), "nothing").unwrap();
    assert!(message(&source.model).contains("not a readable safetensors file"));
}

fn grouped(qk_norm: bool, rotary_dim: usize) -> ModelConfig {
    let mut config = config_with(|_, _| {});
    let grouped =
        GroupedConfig { num_key_value_heads: 3, head_dim: 4, rotary_dim, qkv_bias: false, o_bias: false, qk_norm };
    config.layers.iter_mut().for_each(|layer| layer.attention = AttentionConfig::Grouped(grouped.clone()));
    config.rope = RopeConfig::default();
    config.family = config.natural_family();
    config
}

#[test]
fn what_forbids_a_form_is_named() {
    let settings = PlanSettings { context: 100, bytes_per_number: 4 };
    for (config, reason) in
        [(grouped(true, 4), "norm on each query"), (grouped(false, 4), "rotated"), (grouped(false, 0), "no latent")]
    {
        let message = plan(&config, settings, None).unwrap_err().to_string();
        assert!(message.contains(reason), "{message}");
    }
    let folder = Folder::new();
    let source = source(&folder, &grouped(true, 4), 2);
    for to in ["absorbed", "fused"] {
        let options = options(&source, folder.file(to), to, "f32");
        assert!(matches!(export(&source, &options, &device(), &mut |_| {}), Err(Error::Unsupported { .. })), "{to}");
    }
    // A plain Hugging Face directory takes any attention that transformers knows, and a GGUF most.
    exported(&source, &folder.file("hf"), "hf", "f32");
    exported(&source, &folder.file("gguf"), "gguf", "f32");
    assert_eq!(verdict(&folder.file("gguf"), Some(&source)).failures, [""; 0]);
    let partial = random_model(&grouped(false, 2), 1);
    assert!(canonical(&partial).unwrap_err().to_string().contains("partial_rotary_factor"));
    let both = random_model(&config_with(|_, m| (m.latent_scale, m.qk_rope_head_dim) = (true, 0)), 1);
    assert!(
        canonical(&both).unwrap_err().to_string().contains("qk_rope_head_dim"),
        "what cannot be folded is the reason"
    );
    let none = random_model(&config_with(|_, m| m.qk_rope_head_dim = 0), 1);
    assert!(canonical(&none).unwrap_err().to_string().contains("qk_rope_head_dim"));
}

/// L < N·d/(d−N) on the side of the query and L < V·d/(d−V) on the side of the output, when N = V.
#[test]
fn the_plan_fuses_below_the_width_of_a_head() {
    let settings = PlanSettings { context: 1000, bytes_per_number: 2 };
    let at = |rank: usize| {
        let config = config_with(|c, m| {
            (c.hidden_size, c.num_attention_heads) = (64, 4);
            (m.qk_nope_head_dim, m.v_head_dim, m.kv_lora_rank) = (16, 16, rank);
        });
        plan(&config, settings, None).unwrap()
    };
    // 16·64/(64−16) = 21.3
    assert!(at(21).iter().all(|layer| layer.form == LayerForm::Fused && !layer.forced));
    assert!(at(22).iter().all(|layer| layer.form == LayerForm::Absorbed));
    let [expanded, absorbed, fused] = at(21)[0].costs[..] else { panic!("three forms") };
    // d(L+R) + d·H(N+R) + L·H(N+V) + H·V·d, and with the products d(L+R) + d·H(L+R) + H·L·d.
    assert_eq!(absorbed.weights, 64 * 27 + 64 * 4 * 22 + 21 * 4 * 32 + 4 * 16 * 64);
    assert_eq!(fused.weights, 64 * 27 + 64 * 4 * 27 + 4 * 21 * 64);
    assert_eq!(absorbed.bytes_per_token, 2 * (absorbed.weights + 1000 * 27));
    assert_eq!(expanded.bytes_per_token, 2 * (absorbed.weights + 1000 * (27 + 4 * 38)));
    assert_eq!(absorbed.flops_per_token, 2 * (absorbed.weights + 1000 * 4 * 48));
    let forced = plan(&config_with(|_, _| {}), settings, Some(LayerForm::Expanded)).unwrap();
    assert!(forced.iter().all(|layer| layer.forced && layer.form == LayerForm::Expanded));
}

#[test]
fn a_name_of_a_target_is_checked() {
    for (to, dtype) in [("onnx", "f32"), ("hf", "q8_0"), ("hf", "f64"), ("gguf", "q4_k")] {
        assert!(matches!(Target::parse(to, dtype), Err(Error::Setting { .. })), "{to} {dtype}");
    }
    for form in [LayerForm::Expanded, LayerForm::Absorbed, LayerForm::Fused] {
        assert_eq!(form.to_string().parse::<LayerForm>().unwrap(), form);
    }
    assert!("latent".parse::<LayerForm>().is_err());
}

#[test]
fn damage_is_no_perfection() {
    let error = TensorError::of([1.0, f64::NAN].into_iter(), [1.0, 2.0].into_iter());
    assert_eq!(error.max, f64::INFINITY);
    assert!(error.rms.is_nan());
    let zero = TensorError::of([0.0].into_iter(), [0.0].into_iter());
    assert_eq!((zero.max, zero.rms), (0.0, 0.0));
    let lost = TensorError::of([1e-9].into_iter(), [0.0].into_iter());
    assert_eq!(lost.max, f64::INFINITY);
    let model = random_model(&config_with(|_, _| {}), 1);
    assert_eq!(model.forward(ids_tensor(&[1, 2], 1, 2, &device())).dims(), [1, 2, 29]);
}

#[test]
fn an_export_ends_at_every_token_that_its_source_ends_at() {
    let folder = Folder::new();
    let dir = folder.file("model");
    let config = config_with(|c, _| (c.vocab_size, c.eos_token_id) = (257, vec![7]));
    random_model(&config, 3).save(&dir, WeightDtype::F32, usize::MAX).unwrap();
    lowkey_data::Tokenizer::bytes().save(&dir).unwrap();
    let settings = r#"{"eos_token_id": [46, 7], "temperature": 0.6, "pad_token_id": 2}"#;
    fs::write(dir.join("generation_config.json"), settings).unwrap();
    let source = Source::open(&dir, &device()).unwrap();
    // The tokenizer's own comes first, as in llama.cpp's converter.
    assert_eq!(source.model.config.eos_token_id, [256, 7, 46]);
    exported(&source, &folder.file("gguf"), "gguf", "f32");
    let file = gguf::read(&folder.file("gguf/model.gguf")).unwrap();
    let id = |key: &str| file.metadata().integer(&format!("tokenizer.ggml.{key}_token_id"));
    assert_eq!(["eos", "eot", "eom"].map(id), [Some(256), Some(7), Some(46)]);
    exported(&source, &folder.file("hf"), "hf", "f32");
    let text = fs::read_to_string(folder.file("hf/generation_config.json")).unwrap();
    let written: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(written["eos_token_id"], serde_json::json!([256, 7, 46]));
    assert_eq!((&written["temperature"], &written["pad_token_id"]), (&serde_json::json!(0.6), &serde_json::json!(2)));
    assert_eq!(Source::open(&folder.file("hf"), &device()).unwrap().generation.ends, source.generation.ends);
}
