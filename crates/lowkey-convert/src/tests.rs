//! Rotations that change nothing, cuts that lose the least, and spectra of matrices that were made to have them.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use faer::Mat;
use lowkey_model::{
    CausalLm, ModelConfig,
    attention::{Attention, AttentionConfig, GroupedConfig, MlaConfig},
    config::{Family, LayerConfig, Layers, MlpConfig},
    ids_tensor,
    rope::{RopeConfig, RopeType},
};

use crate::basis::Basis;
use crate::importance::readers;
use crate::matrix::{to_mat, trace};
use crate::moments::measure;
use crate::*;

pub(crate) fn device() -> Device {
    Device::flex()
}

pub(crate) fn config(change: impl FnOnce(&mut ModelConfig, &mut MlaConfig)) -> ModelConfig {
    let mut mla = MlaConfig::deepseek(9, [5, 4, 7]);
    let mut config = ModelConfig {
        vocab_size: 31,
        hidden_size: 14,
        num_attention_heads: 3,
        max_position_embeddings: 160,
        layers: Layers::equal(
            LayerConfig {
                attention: AttentionConfig::Mla(mla.clone()),
                mlp: MlpConfig { intermediate_size: 20, bias: false },
            },
            3,
        )
        .unwrap(),
        kv_elastic_ranks: None,
        rope: RopeConfig::default(),
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        initializer_range: None,
        family: Family::Lowkey,
        bos_token_id: None,
        eos_token_id: vec![],
    };
    change(&mut config, &mut mla);
    config.latents_mut().for_each(|latent| *latent = mla.clone());
    config.family = config.natural_family();
    config
}

fn zoo() -> Vec<(&'static str, ModelConfig)> {
    let yarn = RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(4.0),
        original_max_position_embeddings: Some(40),
        mscale: Some(0.7),
        mscale_all_dim: Some(1.0),
        ..RopeConfig::default()
    };
    vec![
        ("plain", config(|_, _| {})),
        ("q_lora_rank", config(|_, m| m.q_lora_rank = Some(8))),
        ("attention_bias", config(|_, m| (m.attention_bias, m.q_lora_rank) = (true, Some(6)))),
        ("yarn", config(|c, _| c.rope = yarn)),
        ("latent_scale", config(|_, m| m.latent_scale = true)),
        ("no latent norm, query bias", config(|_, m| (m.latent_norm, m.query_bias) = (false, true))),
        ("no rope", config(|_, m| m.qk_rope_head_dim = 0)),
        ("tied, one head", config(|c, _| (c.tie_word_embeddings, c.num_attention_heads) = (true, 1))),
        ("latent wider than d", config(|_, m| m.kv_lora_rank = 19)),
    ]
}

/// Numbers in -1..1 by splitmix64.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn random(seed: u64, rows: usize, columns: usize) -> Mat<f64> {
    let values = noise(seed, rows * columns);
    Mat::from_fn(rows, columns, |i, j| values[i * columns + j])
}

/// Every number at random, norms and biases included.
pub(crate) fn model(config: &ModelConfig, seed: u64) -> CausalLm {
    let mut model = CausalLm::init(config, seed, &device());
    model.update(|parameters| {
        let changed = parameters.into_iter().enumerate().map(|(i, parameter)| {
            let noise = noise(seed * 1000 + i as u64, parameter.shape.iter().product());
            let values: Vec<f32> = match parameter.shape.as_slice() {
                [_, row] => noise.iter().map(|x| (2.0 * x / (*row as f64).sqrt()) as f32).collect(),
                _ => noise.iter().map(|x| (1.0 + 0.4 * x) as f32).collect(),
            };
            Tensor::from_data(TensorData::new(values, parameter.value.dims()), &device())
        });
        changed.collect()
    });
    model
}

pub(crate) fn text(rows: u32, len: u32) -> Vec<Vec<u32>> {
    (0..rows).map(|row| (0..len + row).map(|i| (i * i * (row + 1) + 5 * i + row) % 31).collect()).collect()
}

pub(crate) fn logits(model: &CausalLm, ids: &[u32]) -> Vec<f64> {
    let logits = model.forward(ids_tensor(ids, 1, ids.len(), &device()));
    logits.try_into_vec_as::<f64>().unwrap_or_else(|_| panic!("logits"))
}

/// max |Δ| over max |a|.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    let most = a.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs())) / most
}

pub(crate) fn wide(model: &CausalLm) -> CausalLm {
    let values = model.parameters().into_iter().map(|p| p.value.cast(FloatDType::F64)).collect();
    model.clone().with_values(values)
}

#[test]
fn a_rotation_changes_nothing() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let narrow = model(&config, seed as u64);
        let ids: Vec<u32> = (0..150).map(|i| (i * i + 3) % 31).collect();
        let before = logits(&narrow, &ids);
        let rotated = Rotated::new(&narrow, &text(3, 40), &device(), &mut |_| {}).unwrap();
        let after = logits(&rotated.model, &ids);
        assert!(distance(&before, &after) < 1e-5, "{name}: {}", distance(&before, &after));
        let bits = |model: &CausalLm| to_mat(model.model.layers[0].self_attn.o_proj().matrix(), "o").unwrap();
        assert_eq!(bits(&narrow), bits(&rotated.model), "{name}: what is not the latent's stays");
        let turned = |model: &CausalLm| {
            let Attention::Mla(mla) = &model.model.layers[1].self_attn else { unreachable!() };
            to_mat(mla.kv_b_proj.matrix(), "kv_b").unwrap()
        };
        assert!((turned(&narrow) - turned(&rotated.model)).norm_max() > 0.1, "{name}: nothing was rotated");
        // What differs in f64 differs in the mathematics.
        let wide = wide(&narrow);
        let rotated = Rotated::new(&wide, &text(3, 40), &device(), &mut |_| {}).unwrap();
        let apart = distance(&logits(&wide, &ids), &logits(&rotated.model, &ids));
        assert!(apart < 1e-12, "{name} in f64: {apart}");
    }
}

/// The loss of a fit to a prefix is the sum of the eigenvalues behind it, which no other subspace undercuts.
#[test]
fn every_prefix_of_a_basis_is_optimal() {
    for (seed, n) in [(1, 6), (2, 9), (3, 2)] {
        let half = random(seed, n + 2, n);
        let latent = half.transpose() * &half;
        let half = random(seed + 50, n + 3, n);
        let gram = half.transpose() * &half;
        let basis = Basis::of(&gram, &latent, 0).unwrap();
        assert!((basis.vectors.transpose() * &basis.vectors - Mat::<f64>::identity(n, n)).norm_max() < 1e-12);
        let left = |vectors: &Mat<f64>, rank: usize| {
            let kept = vectors.subcols(0, rank);
            let moment = kept.transpose() * &latent * kept;
            let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&moment.partial_piv_lu());
            let seen = &latent * kept * inverse * kept.transpose() * &latent;
            trace(&(&gram * (&latent - seen)))
        };
        for rank in 1..=n {
            let expected: f64 = basis.readout[rank..].iter().sum();
            let all: f64 = basis.readout.iter().sum();
            let found = left(&basis.vectors, rank);
            assert!((found - expected).abs() < 1e-5 * all, "{n}, {rank}: {found} {expected}");
            for other in 0..20 {
                let vectors = random(100 + other, n, n).qr().compute_Q();
                assert!(left(&vectors, rank) > expected - 1e-9 * all);
            }
        }
    }
}

/// Readers that see three directions of nine: those are found, and the rest can go.
#[test]
fn what_nobody_reads_is_cut_without_loss() {
    let mut narrow = model(&config(|_, _| {}), 5);
    for (layer, block) in narrow.model.layers.iter_mut().enumerate() {
        let Attention::Mla(mla) = &mut block.self_attn else { unreachable!() };
        let [rows, rank] = mla.kv_b_proj.matrix().dims();
        let low = random(layer as u64, rows, 3) * random(70 + layer as u64, 3, rank);
        mla.kv_b_proj.set_matrix(matrix::to_tensor(&low, burn::tensor::DType::F32, &device()));
    }
    let text = text(4, 60);
    for layer in health(&narrow, &text, 0.9999, &device(), &mut |_| {}).unwrap() {
        assert_eq!((layer.recommended_rank, layer.kv_lora_rank), (3, 9), "{layer:?}");
        assert!((layer.readout.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(layer.w_uk.values[3] < 1e-4 * layer.w_uk.values[0] && layer.w_dkv.values[8] > 1e-3);
        assert!(layer.w_uk.effective_rank <= 3.0 + 1e-3 && layer.w_uk.stable_rank <= layer.w_uk.effective_rank);
        assert!(layer.rope_share > 0.0 && layer.rope_share < 1.0);
        assert!(layer.participation_ratio > 1.0 && layer.participation_ratio <= 9.0 + 1e-9);
    }
    let rotated = Rotated::new(&narrow, &text, &device(), &mut |_| {}).unwrap();
    let cut = rotated.cut(&[3, 4, 3], &device()).unwrap();
    let ids: Vec<u32> = (0..100).map(|i| (i * 7 + i / 3) % 31).collect();
    let apart = distance(&logits(&narrow, &ids), &logits(&cut, &ids));
    assert!(apart < 1e-4, "{apart}");
    let too_narrow = rotated.cut(&[2, 2, 2], &device()).unwrap();
    assert!(distance(&logits(&narrow, &ids), &logits(&too_narrow, &ids)) > 1e-2);
}

/// Every model with a latent wider than its hidden state has such latents, and training makes others.
#[test]
fn a_latent_of_which_a_part_is_unused_is_cut_at_every_budget() {
    let wide = model(&config(|_, m| m.kv_lora_rank = 19), 3);
    let mut low = model(&config(|_, m| m.kv_lora_rank = 16), 4);
    let mut nothing = model(&config(|_, _| {}), 5);
    for (layer, block) in low.model.layers.iter_mut().enumerate() {
        let Attention::Mla(mla) = &mut block.self_attn else { unreachable!() };
        let weight = to_mat(mla.kv_a_proj_with_mqa.matrix(), "kv_a").unwrap();
        let used = random(layer as u64 + 7, 16, 4) * random(layer as u64 + 70, 4, 14);
        let weight = Mat::from_fn(20, 14, |i, j| if i < 16 { used[(i, j)] } else { weight[(i, j)] });
        mla.kv_a_proj_with_mqa.set_matrix(matrix::to_tensor(&weight, burn::tensor::DType::F32, &device()));
    }
    let Attention::Mla(mla) = &mut nothing.model.layers[1].self_attn else { unreachable!() };
    mla.kv_a_proj_with_mqa.set_matrix(mla.kv_a_proj_with_mqa.matrix() * 0.0);
    let text = text(4, 60);
    for (name, model, used) in [("wider than d", wide, 14), ("of rank 4", low, 4), ("of rank 0", nothing, 9)] {
        let rotated = Rotated::new(&model, &text, &device(), &mut |_| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        let full = model.config.kv_ranks()[0];
        let whole = loss(&model, &text, &device()).unwrap();
        for rank in 1..=full {
            let cut = rotated.cut(&[rank; 3], &device()).unwrap_or_else(|e| panic!("{name}, {rank}: {e}"));
            let cost = loss(&cut, &text, &device()).unwrap() - whole;
            assert!(cost.is_finite() && (rank < used || cost.abs() < 1e-4), "{name}, {rank}: {cost}");
        }
        for budget in [3, 7, 2 * full, 3 * full] {
            let cut = rotated.cut_to(budget, &text, &device(), &mut |_| {}).unwrap();
            assert!(cut.loss_after.is_finite() && cut.ranks.iter().sum::<usize>() == budget, "{name}, {budget}");
        }
        let layers = health(&model, &text, 0.999, &device(), &mut |_| {}).unwrap();
        assert!(layers.iter().all(|layer| layer.recommended_rank <= used), "{name}");
        let recommended: Vec<usize> = layers.iter().map(|layer| layer.recommended_rank).collect();
        rotated.cut(&recommended, &device()).unwrap();
    }
}

/// With a wider prefix the fitted readers see more, and at the full width all: the order of the cuts on the very text that they were
/// fitted to.
#[test]
fn what_readers_lose_falls_with_the_rank() {
    let narrow = model(&config(|c, _| c.layers.resize(1).unwrap()), 8);
    let text = text(4, 80);
    let rotated = Rotated::new(&narrow, &text, &device(), &mut |_| {}).unwrap();
    let moments = measure(&rotated.model, &text, &device(), &mut |_| {}).unwrap();
    let Attention::Mla(whole) = &rotated.model.model.layers[0].self_attn else { unreachable!() };
    let gram = readers(whole, &moments[0]).unwrap();
    let basis = Basis::of(&gram, &moments[0].latent, 0).unwrap();
    // The model is rotated already: its own coordinates are the basis, up to signs.
    let aligned = (0..9).map(|i| basis.vectors[(i, i)].abs()).fold(1.0, f64::min);
    assert!(aligned > 0.99, "{aligned}");
    assert!(basis.readout.windows(2).all(|pair| pair[0] >= pair[1]));
    let reduction = rotated.cut_to(9, &text, &device(), &mut |_| {}).unwrap();
    assert_eq!((reduction.ranks, reduction.loss_before), (vec![9], reduction.loss_after));
}

#[test]
fn spectra_have_the_ranks_that_they_were_made_with() {
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
    let flat = Spectrum::of(vec![2.0; 5]);
    close(flat.stable_rank, 5.0);
    close(flat.effective_rank, 5.0);
    let one = Spectrum::of(vec![3.0, 0.0]);
    close(one.stable_rank, 1.0);
    close(one.effective_rank, 1.0);
    // Energies 16 and 4: shares 0.8 and 0.2.
    let two = Spectrum::of(vec![4.0, 2.0]);
    close(two.stable_rank, 1.25);
    close(two.effective_rank, (-0.8 * 0.8f64.ln() - 0.2 * 0.2f64.ln()).exp());
    close(Spectrum::of(vec![0.0, 0.0]).effective_rank, 0.0);
}

#[test]
fn what_cannot_be_is_refused() {
    let narrow = model(&config(|_, _| {}), 1);
    let grouped = GroupedConfig {
        num_key_value_heads: 1,
        head_dim: 4,
        rotary_dim: 4,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
    };
    let mut other = narrow.config.clone();
    other.layers.iter_mut().for_each(|layer| layer.attention = AttentionConfig::Grouped(grouped.clone()));
    other.family = other.natural_family();
    let other = CausalLm::init(&other, 1, &device());
    let refused = |model: &CausalLm, text: &[Vec<u32>], fragment: &str| {
        let message = Rotated::new(model, text, &device(), &mut |_| {}).unwrap_err().to_string();
        assert!(message.contains(fragment), "{message}");
    };
    refused(&other, &text(1, 9), "no latent");
    refused(&narrow, &[], "at least two tokens");
    refused(&narrow, &[vec![1, 31]], "token 31");
    refused(&narrow, &[vec![1; 161]], "161 tokens");
    let mut broken = narrow.clone();
    let Attention::Mla(mla) = &mut broken.model.layers[1].self_attn else { unreachable!() };
    mla.kv_b_proj.set_matrix(mla.kv_b_proj.matrix() * f32::NAN);
    refused(&broken, &text(1, 9), "layers.1.self_attn.kv_b_proj.weight holds NaN");
    // No latent depends on it: nothing that is decomposed would show it.
    let mut broken = narrow.clone();
    broken.model.norm.set_gain(broken.model.norm.gain() * f32::INFINITY);
    refused(&broken, &text(1, 9), "model.norm.weight holds");
    let mut broken = narrow.clone();
    let Attention::Mla(mla) = &mut broken.model.layers[1].self_attn else { unreachable!() };
    mla.kv_a_layernorm.set_gain(mla.kv_a_layernorm.gain() * 1e38);
    refused(&broken, &text(1, 9), "overflows on this text");
    let rotated = Rotated::new(&narrow, &text(2, 30), &device(), &mut |_| {}).unwrap();
    for (ranks, fragment) in [(&[9, 9][..], "3 layers"), (&[9, 0, 9], "layer 1"), (&[9, 9, 10], "layer 2")] {
        let message = rotated.cut(ranks, &device()).unwrap_err().to_string();
        assert!(message.contains(fragment), "{message}");
    }
    for budget in [2, 28] {
        let message = rotated.cut_to(budget, &text(1, 9), &device(), &mut |_| {}).unwrap_err().to_string();
        assert!(message.contains("27 directions"), "{message}");
    }
    for energy in [0.0, 1.0, f64::NAN] {
        assert!(matches!(health(&narrow, &text(1, 9), energy, &device(), &mut |_| {}), Err(Error::Setting { .. })));
    }
}
