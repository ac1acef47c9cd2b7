//! What is lost to CARE (Zhou et al., arXiv 2603.17946), written down plainly: nothing.
//!
//! CARE factorises the stacked maps of keys and values W by the singular values of W·C^½, C the second moment of the hidden states of a
//! text, damped by a part of its mean diagonal; and deals ranks out one by one to the layer whose residual Σ_{i>r} σᵢ² the next singular
//! value lowers by the greatest share. Two plainer ways to deal stand beside it, and the best of the three on the text is the bar.

use faer::Side;
use lowkey_infer::SamplingConfig;

use super::*;
use crate::matrix::{rows, to_mat, to_tensor};

/// Share of the mean diagonal of a second moment that is added to it.
const DAMPING: f64 = 0.01;

/// The directions of each layer's stacked keys and values, the most important first, and their singular values.
fn directions(latent: &CausalLm, inputs: &Inputs, groups: usize) -> Vec<(Mat<f64>, Mat<f64>, Vec<f64>)> {
    let each = latent.model.layers.iter().zip(&inputs.moments).map(|(block, moment)| {
        let stack = stacked(block.self_attn.latent().unwrap(), groups);
        let d = stack.ncols();
        let mean = (0..d).map(|i| moment[(i, i)]).sum::<f64>() / d as f64;
        let damped = Mat::from_fn(d, d, |i, j| moment[(i, j)] + if i == j { DAMPING * mean } else { 0.0 });
        let eigen = damped.self_adjoint_eigen(Side::Lower).unwrap();
        let (values, vectors) = (eigen.S().column_vector(), eigen.U());
        let root = Mat::from_fn(d, d, |i, j| vectors[(i, j)] * values[j].max(0.0).sqrt()) * vectors.transpose();
        let svd = (&stack * root).thin_svd().unwrap();
        let singular = (0..svd.S().column_vector().nrows()).map(|i| svd.S().column_vector()[i]).collect();
        (stack, svd.U().to_owned(), singular)
    });
    each.collect()
}

/// The keys and values of each group as a map of the hidden state.
fn stacked(mla: &lowkey_model::attention::Mla, groups: usize) -> Mat<f64> {
    let (head, several) = (mla.dims.nope + mla.dims.value, mla.dims.heads / groups);
    let down = to_mat(mla.kv_a_proj_with_mqa.matrix(), "kv_a").unwrap();
    let all = to_mat(mla.kv_b_proj.matrix(), "kv_b").unwrap() * rows(&down, 0, mla.dims.rank);
    Mat::from_fn(groups * head, all.ncols(), |i, j| all[(i / head * several * head + i % head, j)])
}

/// By what a further rank of a layer is worth.
#[derive(Clone, Copy, Debug)]
enum Deal {
    /// The share of what is left that it takes away, more for the first layers, whose errors go through all others, and less the more
    /// ranks a layer has: as the authors' program deals.
    OfResidual,
    /// The share of all.
    OfAll,
    /// As many to each layer.
    Uniform,
}

/// Ranks of a budget, one by one to where it is worth most.
fn filled(spectra: &[Vec<f64>], budget: usize, deal: Deal) -> Vec<usize> {
    let mut ranks = vec![1; spectra.len()];
    for _ in spectra.len()..budget {
        let worth = |layer: usize| {
            let energy = |from: usize| spectra[layer][from..].iter().map(|s| s * s).sum::<f64>().max(f64::MIN_POSITIVE);
            let rank = ranks[layer];
            spectra[layer].get(rank).map_or(-1.0, |next| match deal {
                Deal::OfResidual => {
                    let behind = 2.0 * (spectra.len() - layer) as f64 / (spectra.len() + 1) as f64;
                    next * next / energy(rank) * (behind / rank as f64).sqrt()
                }
                Deal::OfAll => next * next / energy(0),
                Deal::Uniform => 1.0 / rank as f64,
            })
        };
        let best = (0..spectra.len()).max_by(|a, b| worth(*a).total_cmp(&worth(*b))).unwrap();
        ranks[best] += 1;
    }
    ranks
}

/// The model of CARE's latents.
fn care(latent: &CausalLm, inputs: &Inputs, groups: usize, budget: usize, deal: Deal) -> CausalLm {
    let found = directions(latent, inputs, groups);
    let spectra: Vec<Vec<f64>> = found.iter().map(|(.., singular)| singular.clone()).collect();
    let ranks = filled(&spectra, budget, deal);
    let mut model = latent.clone();
    for ((block, (stack, directions, _)), rank) in model.model.layers.iter_mut().zip(&found).zip(&ranks) {
        let mla = block.self_attn.latent_mut().unwrap();
        let (head, several) = (mla.dims.nope + mla.dims.value, mla.dims.heads / groups);
        let whole = mla.dims.rank;
        let kept = directions.subcols(0, *rank);
        let down = kept.transpose() * stack;
        let down = Mat::from_fn(whole, stack.ncols(), |i, j| if i < *rank { down[(i, j)] } else { 0.0 });
        let up = Mat::from_fn(mla.dims.heads * head, whole, |i, j| {
            if j < *rank { kept[(i / head / several * head + i % head, j)] } else { 0.0 }
        });
        let dtype = mla.kv_b_proj.dtype();
        mla.kv_a_proj_with_mqa.set_matrix(to_tensor(&down, dtype, &device()));
        mla.kv_b_proj.set_matrix(to_tensor(&up, dtype, &device()));
    }
    model.with_kv_ranks(&ranks).unwrap()
}

/// Texts that the model itself writes, so that it knows them as well as anything can.
fn written(model: &CausalLm, seeds: std::ops::Range<u64>) -> Vec<Vec<u32>> {
    let each = seeds.map(|seed| {
        let sampling = SamplingConfig { temperature: 1.0, seed, ..SamplingConfig::default() };
        let config = GenerateConfig { max_new_tokens: 60, sampling, ..GenerateConfig::default() };
        let prompt = [(seed % 31) as u32];
        let text =
            lowkey_infer::generate(model, &prompt, &config, &device(), &mut |_| std::ops::ControlFlow::Continue(()));
        prompt.into_iter().chain(text.unwrap().ids).collect()
    });
    each.collect()
}

/// Mean divergence of a model's predictions from those of another, nats per token.
fn divergence(from: &CausalLm, to: &CausalLm, text: &[Vec<u32>]) -> f64 {
    let vocab = from.config.vocab_size;
    let logs = |row: &[f64]| {
        let most = row.iter().fold(f64::MIN, |most, x| most.max(*x));
        let all = row.iter().map(|x| (x - most).exp()).sum::<f64>().ln() + most;
        row.iter().map(|x| x - all).collect::<Vec<f64>>()
    };
    let (mut sum, mut tokens) = (0.0, 0);
    for ids in text {
        let [a, b] = [from, to].map(|model| logits(model, ids));
        for (a, b) in a.chunks_exact(vocab).zip(b.chunks_exact(vocab)) {
            sum += logs(a).iter().zip(logs(b)).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
            tokens += 1;
        }
    }
    sum / tokens as f64
}

/// A model whose hidden states lie mostly in few directions, other ones than the strongest of its weights.
fn structured(seed: u64) -> CausalLm {
    let config = config(|c, g| {
        c.layers.resize(3).unwrap();
        (g.num_key_value_heads, g.rotary_dim, g.head_dim) = (2, 0, 8);
        c.max_position_embeddings = 128;
    });
    let mut whole = model(&config, seed);
    let put = |parameter: &str, values: Mat<f64>, whole: &mut CausalLm| {
        whole.update(|parameters| {
            let each = parameters.into_iter().map(|p| {
                if p.name != parameter {
                    return p.value;
                }
                let numbers = to_tensor(&values, DType::F32, &device());
                numbers.reshape([values.nrows() * values.ncols()])
            });
            each.collect()
        });
    };
    let falling = Mat::from_fn(26, 26, |i, j| if i == j { 0.75f64.powi(i as i32) } else { 0.0 });
    let table = random(seed + 70, 31, 26) * falling * random(seed + 71, 26, 26);
    put("model.embed_tokens.weight", table, &mut whole);
    // Layers that need more of their keys and values, and such that need less.
    for (layer, share) in [0.9f64, 0.6, 0.8].into_iter().enumerate() {
        for (part, name) in ["k_proj", "v_proj"].into_iter().enumerate() {
            let from = seed + 80 + 2 * layer as u64 + part as u64;
            let fall = Mat::from_fn(16, 16, |i, j| if i == j { share.powi(i as i32) } else { 0.0 });
            let map = random(from, 16, 16) * fall * random(from + 20, 16, 26);
            put(&format!("model.layers.{layer}.self_attn.{name}.weight"), faer::Scale(0.5) * &map, &mut whole);
        }
    }
    whole
}

#[test]
fn latents_lose_no_more_than_those_of_care() {
    let mut held_out_of = [0.0; 2];
    for seed in 0..3 {
        let whole = structured(seed * 10 + 1);
        let [text, held_out] = [0..24, 100..124].map(|seeds| written(&whole, seeds));
        let latent = exact(&whole, &device()).unwrap();
        let inputs = Inputs::measure(&whole, &text, &device(), &mut |_| {}).unwrap();
        // All of it is the same model.
        let full: usize = latent.config.kv_ranks().iter().sum();
        assert!(divergence(&whole, &care(&latent, &inputs, 2, full, Deal::OfResidual), &held_out) < 1e-6);
        for share in [4, 2] {
            let budget = full / share;
            let dealt = [Deal::OfResidual, Deal::OfAll, Deal::Uniform].map(|deal| {
                let model = care(&latent, &inputs, 2, budget, deal);
                assert_eq!(model.config.cache_numbers(), budget);
                (loss(&model, &text, &device()).unwrap(), divergence(&whole, &model, &held_out))
            });
            let best = dealt.iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            let wanted = Wanted {
                width: Width::Budget(budget),
                rotated: Some(0),
                keep: None,
                fold: 1,
                centred: true,
                importance: Some(Importance::Readers),
            };
            let ours = fit(&whole, wanted, &text, &device(), &mut |_| {}).unwrap().model;
            assert!(ours.config.cache_numbers() <= budget);
            let (lost, apart) = (loss(&ours, &text, &device()).unwrap(), divergence(&whole, &ours, &held_out));
            println!(
                "seed {seed}, {budget} of {full}: loss and held-out divergence {lost:.4}, {apart:.4}; CARE {dealt:.4?}"
            );
            assert!(dealt.iter().all(|(oracle, _)| lost <= oracle + 1e-6), "seed {seed}, {budget}: {lost}, {dealt:?}");
            // Where hardly anything is lost the text's noise decides between two that are equally good: the sum counts.
            held_out_of[0] += apart;
            held_out_of[1] += best.1;
        }
    }
    println!("held out, in all: {held_out_of:.4?}");
    assert!(held_out_of[0] <= held_out_of[1], "{held_out_of:?}");
}
