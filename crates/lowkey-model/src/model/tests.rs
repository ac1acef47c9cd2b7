use burn::tensor::{Tolerance, activation::softmax};
use safetensors::{Dtype, SafeTensors};

use super::*;
use crate::attention::AttentionConfig;
use crate::attention::{Latent, Mask};
use crate::fixtures::{self, distance, normal, scrambled, values};
use crate::rope::RopePairs;
use lowkey_batch::{IGNORE, VectorRows};
use lowkey_kernels::cache::attention;

fn ids(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    normal(seed, len).iter().map(|x| (x.abs() * 1e4) as u32 % vocab as u32).collect()
}

fn random(seed: u64, shape: [usize; 3], device: &Device) -> Tensor<3> {
    Tensor::from_data(TensorData::new(normal(seed, shape.iter().product()), shape), device)
}

/// Attention of a whole model's kinds at given positions, one document per row: by the form for training, held to plain operations.
fn attend(block: &Block, x: Tensor<3>, context: &Context) -> Tensor<3> {
    let [_, seq, _] = x.dims();
    let mask = Mask::documents(&context.document_starts, seq, &x.device());
    let plain = |q, k, v, scale| {
        let out = attention(q, k, v, &mask, scale).swap_dims(1, 2);
        let [batch, seq, heads, value] = out.dims();
        out.reshape([batch, seq, heads * value])
    };
    let [causal, masked] = match &block.self_attn {
        Attention::Mla(mla) => {
            let queries = mla.queries(x.clone(), &context.rope).swap_dims(1, 2);
            let (k, v) = mla.expand(mla.latent(x.clone(), &context.rope));
            [mla.attend_causal(x.into(), context), plain(queries, k, v, mla.dims.scale)]
        }
        Attention::Grouped(grouped) => {
            let (kv, q) =
                (grouped.key_value(x.clone().into(), &context.rope), grouped.queries(x.into(), &context.rope));
            [
                grouped.attend_causal(q.clone(), kv.clone(), &context.document_starts),
                plain(q, kv.k, kv.v, grouped.dims.scale),
            ]
        }
    };
    assert!(distance(&values(causal.clone()), &values(masked)) < 1e-5);
    causal
}

#[test]
fn a_packed_row_gives_each_document_what_it_gets_alone() {
    let device = Device::flex();
    let lengths = [37, 23, 11];
    let seq: usize = lengths.iter().sum();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 1, &device);
        let vocab = config.vocab_size;
        // A second row with other bounds: rows must not share a mask.
        let (first, second) = (ids(seq, vocab, 2), ids(seq, vocab, 3));
        let targets: Vec<i64> = ids(2 * seq, vocab, 4).iter().map(|id| i64::from(*id)).collect();
        let mut starts: Vec<u32> = Vec::new();
        for (length, start) in lengths.iter().zip([0, 37, 60]) {
            starts.extend(std::iter::repeat_n(start, *length));
        }
        starts.extend((0..seq).map(|t| if t < 5 { 0 } else { 5 }));
        let all = [first.clone(), second.clone()].concat();
        let context = model.context(&starts, seq, &device);
        let packed = model.logits(model.hidden(ids_tensor(&all, 2, seq, &device), &context, None));
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: seq,
            input_ids: &all,
            targets: &targets,
            document_starts: &starts,
        };
        let (sum, each) = (model.loss(batch, 0.0, &device), model.losses(batch, &device, None));
        let each = values(each);
        let mut total = 0.0;
        for (row, start, length) in [(0, 0, 37), (0, 37, 23), (0, 60, 11), (1, 0, 5), (1, 5, seq - 5)] {
            let document = &all[row * seq + start..][..length];
            let alone = values(model.forward(ids_tensor(document, 1, length, &device)));
            let part = values(packed.clone().narrow(0, row, 1).narrow(1, start, length));
            let error = distance(&alone, &part);
            assert!(error < 1e-4, "{kind}: the document at {start} of row {row} is off by {error}");
            let document_targets = &targets[row * seq + start..][..length];
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows: 1,
                seq_len: length,
                input_ids: document,
                targets: document_targets,
                document_starts: &vec![0; length],
            };
            let (alone, alone_each) = (model.loss(batch, 0.0, &device), model.losses(batch, &device, None));
            assert!(distance(&values(alone_each), &each[row * seq + start..][..length]) < 1e-4, "{kind}");
            total += alone.nats.into_scalar::<f32>();
        }
        assert_eq!(sum.targets, 2 * seq);
        assert!((sum.nats.into_scalar::<f32>() / total - 1.0).abs() < 1e-5, "{kind}");
    }
}

#[test]
fn a_token_does_not_see_the_future_and_does_see_the_past() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 5, &device);
        let mut tokens = ids(9, config.vocab_size, 6);
        let before = values(model.forward(ids_tensor(&tokens, 1, 9, &device)));
        tokens[5] = (tokens[5] + 1) % 29;
        let after = values(model.forward(ids_tensor(&tokens, 1, 9, &device)));
        let at = |logits: &[f32], t: usize| logits[29 * t..29 * (t + 1)].to_vec();
        for t in 0..9 {
            let error = distance(&at(&before, t), &at(&after, t));
            assert_eq!(error > 1e-5, t >= 5, "{kind}: position {t} moves by {error}");
        }
    }
}

#[test]
fn the_loss_is_the_negative_log_of_the_probability_of_the_target() {
    let device = Device::flex();
    let model = scrambled(&fixtures::mla_with(|_| ()), 7, &device);
    let tokens = ids(6, 29, 8);
    let targets = [3, IGNORE, 5, IGNORE, 0, 28];
    let probabilities = values(softmax(model.forward(ids_tensor(&tokens, 1, 6, &device)), 2));
    let batch = Rows {
        vectors: None,
        pairs: false,
        rows: 1,
        seq_len: 6,
        input_ids: &tokens,
        targets: &targets,
        document_starts: &[0; 6],
    };
    let (sum, each) = (model.loss(batch, 0.0, &device), model.losses(batch, &device, None));
    let mut total = 0.0;
    for (t, (target, got)) in targets.iter().zip(values(each)).enumerate() {
        let expected = if *target == IGNORE { 0.0 } else { -probabilities[29 * t + *target as usize].ln() };
        assert!((got - expected).abs() < 1e-5, "position {t}: {got} instead of {expected}");
        total += expected;
    }
    assert_eq!(sum.targets, 4);
    assert!((sum.nats.into_scalar::<f32>() - total).abs() < 1e-4);
}

#[test]
fn absorbed_attention_is_expanded_attention() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        if config.attention().latent().is_none() {
            continue;
        }
        for latent_scale in [false, true] {
            let mut config = ModelConfig { family: Family::Lowkey, ..config.clone() };
            config.latents_mut().for_each(|mla| mla.latent_scale = latent_scale);
            let model = scrambled(&config, 9, &device);
            let Attention::Mla(mla) = &model.model.layers[0].self_attn else { panic!("{kind}") };
            let x = random(10, [2, 11, 12], &device);
            let rope = model.rope_table(&[(0..11).collect()], &device);
            let (latent, queries) = (mla.latent(x.clone(), &rope).both, mla.queries(x.clone(), &rope));
            let whole = || Mask::causal(11, 11, 0, &device);
            let expanded = mla.attend_expanded(queries.clone(), latent.clone(), &[0, 0], &whole);
            let absorbed = mla.attend_absorbed(queries, latent.clone(), &[0, 0]);
            let spread = values(expanded.clone()).iter().fold(0f32, |m, x| m.max(x.abs()));
            let error = distance(&values(expanded.clone()), &values(absorbed));
            assert!(error < 2e-5 * spread.max(1.0), "{kind}, scale {latent_scale}: off by {error}");

            // The last three tokens alone, against the cached latent of all: what a decoder does.
            let tail = model.rope_table(&[(8..11).collect()], &device);
            let queries = mla.queries(x.narrow(1, 8, 3), &tail);
            let mask = || Mask::cached(&[8, 8], 3, 11, &device);
            for out in [
                mla.attend_expanded(queries.clone(), latent.clone(), &[8, 8], &mask),
                mla.attend_absorbed(queries.clone(), latent.clone(), &[8, 8]),
            ] {
                let error = distance(&values(out), &values(expanded.clone().narrow(1, 8, 3)));
                assert!(error < 2e-5 * spread.max(1.0), "{kind}, scale {latent_scale}: a chunk is off by {error}");
            }
        }
    }
}

#[test]
fn the_latent_scale_multiplies_the_normed_latent() {
    let device = Device::flex();
    let plain = scrambled(&fixtures::mla_with(|_| ()), 11, &device);
    let scaled = scrambled(&fixtures::mla_with(|m| m.latent_scale = true), 11, &device);
    let x = random(12, [1, 4, 12], &device);
    let rope = plain.rope_table(&[(0..4).collect()], &device);
    let latent = |model: &CausalLm| -> Latent {
        let Attention::Mla(mla) = &model.model.layers[0].self_attn else { panic!("no MLA") };
        mla.latent(x.clone(), &rope)
    };
    let (plain, scaled) = (latent(&plain), latent(&scaled));
    let expected = plain.c_kv() * (12f64 / 9.0).sqrt();
    scaled.c_kv().into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-6));
    assert_eq!(values(scaled.k_pe().unwrap()), values(plain.k_pe().unwrap()), "the shared key is not scaled");
}

#[test]
fn attention_depends_on_distances_only() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 13, &device);
        let block = &model.model.layers[0];
        let x = random(14, [1, 10, 12], &device);
        let at = |positions: Vec<usize>| {
            let context =
                Context { rope: model.rope_table(&[positions], &device), document_starts: vec![0; 10], kv_rank: None };
            values(attend(block, x.clone(), &context))
        };
        let here = at((0..10).collect());
        let error = distance(&here, &at((5000..5010).collect()));
        assert!(error < 1e-4, "{kind}: a shift changes the result by {error}");
        // Other distances do matter, unless nothing is rotated.
        let stretched = distance(&here, &at((0..10).map(|p| 3 * p).collect()));
        assert_eq!(stretched > 1e-3, config.rotary_dim() > 0, "{kind}: {stretched}");
    }
}

#[test]
fn rows_may_have_positions_of_their_own() {
    let device = Device::flex();
    let model = scrambled(&fixtures::mla_with(|_| ()), 15, &device);
    let Attention::Mla(mla) = &model.model.layers[0].self_attn else { panic!("no MLA") };
    // So few tokens that a row's products are computed alike by itself and beside another.
    let x = random(16, [2, 2, 12], &device);
    let both = mla.latent(x.clone(), &model.rope_table(&[vec![0, 1], vec![7, 8]], &device)).k_pe().unwrap();
    for (row, positions) in [(0, vec![0, 1]), (1, vec![7, 8])] {
        let one = mla.latent(x.clone().narrow(0, row, 1), &model.rope_table(&[positions], &device)).k_pe().unwrap();
        assert_eq!(values(both.clone().narrow(0, row, 1)), values(one));
    }
}

#[test]
fn forks_and_validation_copies_compute_the_same() {
    let plain = Device::flex();
    let training = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 17, &training);
        let tokens = ids(8, 29, 18);
        let logits = |model: &CausalLm, device: &Device| values(model.forward(ids_tensor(&tokens, 1, 8, device)));
        let expected = logits(&model, &training);
        // Not to the last bit: outside autodiff Burn has one kernel for the softmax.
        let error = distance(&logits(&model.valid(), &plain), &expected);
        assert!(error < 1e-5, "{kind}: the validation copy is off by {error}");
        let fork = model.clone().fork(&training);
        assert_eq!(logits(&fork, &training), expected, "{kind}");
        assert_eq!(fork.config, model.config);
        let back = model.valid().train();
        assert_eq!(logits(&back, &training), expected, "{kind}");
        // A fork has a graph of its own and learns.
        for learner in [fork, back] {
            let loss = learner.forward(ids_tensor(&tokens, 1, 8, &training)).square().sum();
            let gradients = learner.take_gradients(&mut loss.backward());
            assert!(gradients.into_iter().all(|g| values(g).iter().any(|x| *x != 0.0)), "{kind}");
        }
    }
}

#[test]
fn a_trace_changes_nothing_and_holds_every_layer() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 19, &device);
        let tokens = ids_tensor(&ids(7, 29, 20), 1, 7, &device);
        let context = model.context(&[0; 7], 7, &device);
        let mut trace = Trace::default();
        let traced = model.hidden(tokens.clone(), &context, Some(&mut trace));
        assert_eq!(values(traced.clone()), values(model.hidden(tokens, &context, None)), "{kind}");
        assert_eq!((trace.hidden.len(), trace.attn_out.len(), trace.max_logit.len()), (3, 2, 2), "{kind}");
        assert_eq!(values(trace.hidden[2].clone()), values(traced), "{kind}");
        let is_mla = config.attention().latent().is_some();
        assert_eq!(trace.latent.len(), if is_mla { 2 } else { 0 }, "{kind}");
        assert_eq!(trace.k_pe.len(), if is_mla && config.rotary_dim() > 0 { 2 } else { 0 }, "{kind}");
    }
}

#[test]
fn the_largest_logit_is_found_among_pairs_that_may_see_each_other() {
    let device = Device::flex();
    let model = scrambled(&fixtures::mla_with(|_| ()), 21, &device);
    let Attention::Mla(mla) = &model.model.layers[0].self_attn else { panic!("no MLA") };
    let x = random(22, [1, 6, 12], &device);
    let rope = model.rope_table(&[(0..6).collect()], &device);
    let (latent, queries) = (mla.latent(x.clone(), &rope), mla.queries(x, &rope));
    let (k, _) = mla.expand(latent.clone());
    let (k, q) = (values(k), values(queries.clone().swap_dims(1, 2)));
    let mut largest = f32::NEG_INFINITY;
    for head in 0..3 {
        for t in 0..6 {
            for j in 0..=t {
                let key = &k[(head * 6 + j) * 11..][..11];
                let query = &q[(head * 6 + t) * 11..][..11];
                let dot: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                largest = largest.max(dot / 11f32.sqrt());
            }
        }
    }
    let got = mla.max_logit(queries, latent, &[0; 6]).into_scalar::<f32>();
    assert!((got - largest).abs() < 1e-5, "{got} instead of {largest}");
}

/// The derivative of the loss along a direction, for each parameter, against a fourth-order central difference.
#[test]
fn every_gradient_agrees_with_finite_differences() {
    let starts: Vec<u32> = [vec![0; 7], vec![0; 3], vec![3; 4]].concat();
    for (kind, config) in fixtures::every_kind() {
        let tokens = ids(14, 29, 24);
        let targets: Vec<i64> =
            ids(14, 29, 25).iter().enumerate().map(|(t, id)| if t == 4 { IGNORE } else { i64::from(*id) }).collect();
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: 7,
            input_ids: &tokens,
            targets: &targets,
            document_starts: &starts,
        };
        derivatives_agree(&format!("{kind}, tokens"), &config, batch);
        let (inputs, answers) = (normal(26, 14 * 5), normal(27, 14 * 3));
        let targets: Vec<i64> = (0..14).map(|t| if t == 4 || t == 11 { IGNORE } else { 0 }).collect();
        let vectors = VectorRows { input_width: 5, output_width: 3, inputs: &inputs, values: &answers };
        let rows = Rows { vectors: Some(vectors), input_ids: &[], targets: &targets, ..batch };
        derivatives_agree(&format!("{kind}, vectors"), &config, rows);
    }
}

fn derivatives_agree(kind: &str, config: &ModelConfig, batch: Rows) {
    const STEP: f32 = 8e-3;
    let (plain, training) = (Device::flex(), Device::flex().autodiff());
    {
        let model = scrambled(config, 23, &training);
        let loss = model.loss(batch, 0.0, &training);
        let gradients = model.take_gradients(&mut loss.nats.backward());
        let model = model.valid();
        let parameters = model.parameters();
        let weights: Vec<Tensor<1>> = parameters.iter().map(|p| p.value.clone()).collect();
        for (i, (parameter, gradient)) in parameters.iter().zip(gradients).enumerate() {
            let gradient = values(gradient);
            let dot = |v: &[f32]| gradient.iter().zip(v).map(|(g, v)| f64::from(*g) * f64::from(*v)).sum::<f64>();
            // The steepest of a few random directions: along a flat one the difference would drown in rounding.
            let scale = match parameter.shape[..] {
                [_, d_in] if parameter.name != "model.embed_tokens.weight" => 1.0 / (d_in as f32).sqrt(),
                _ => 0.5,
            };
            let direction = (0..8)
                .map(|d| normal(1000 * i as u64 + d, gradient.len()).iter().map(|x| scale * x).collect::<Vec<f32>>())
                .max_by(|a, b| dot(a).abs().total_cmp(&dot(b).abs()))
                .unwrap();
            let at = |step: f32| -> f64 {
                let mut moved = weights.clone();
                let delta = direction.iter().map(|v| step * v).collect::<Vec<f32>>();
                moved[i] = moved[i].clone() + Tensor::from_data(TensorData::new(delta, [direction.len()]), &plain);
                let each = model.clone().with_values(moved).losses(batch, &plain, None);
                values(each).iter().map(|x| f64::from(*x)).sum()
            };
            let near = at(STEP) - at(-STEP);
            let far = at(2.0 * STEP) - at(-2.0 * STEP);
            let numeric = (8.0 * near - far) / (12.0 * f64::from(STEP));
            let exact = dot(&direction);
            let error = (numeric - exact).abs() / exact.abs();
            assert!(error < 1e-2, "{kind}: {}: {exact} against {numeric}, relative {error}", parameter.name);
        }
    }
}

/// The same model written as loops over numbers, in f64 and from the equations: no code in common but the frequencies.
struct Naive<'a> {
    config: &'a ModelConfig,
    weights: std::collections::BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl<'a> Naive<'a> {
    fn new(model: &'a CausalLm) -> Self {
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let weights = model.parameters().into_iter().map(|p| (p.name, (p.shape, wide(values(p.value))))).collect();
        Self { config: &model.config, weights }
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (shape, w) = &self.weights[&format!("{name}.weight")];
        let mut y: Vec<f64> = w.chunks_exact(shape[1]).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        if let Some((_, bias)) = self.weights.get(&format!("{name}.bias")) {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64], eps: f64) -> Vec<f64> {
        let (_, gain) = &self.weights[&format!("{name}.weight")];
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(gain).map(|(x, g)| x * scale * g).collect()
    }

    /// Turns the pairs of `x` in place; the order of its components stays.
    fn turn(&self, x: &mut [f64], position: usize, adjacent: bool) {
        let half = x.len() / 2;
        let longest = self.config.max_position_embeddings;
        let frequencies = match self.config.attention().latent().and_then(|mla| mla.rope_pairs.clone()) {
            None => self.config.rope.inverse_frequencies(x.len(), longest),
            Some(RopePairs { width, frequencies }) => {
                let all = self.config.rope.inverse_frequencies(width, longest);
                frequencies.into_iter().map(|at| all[at]).collect()
            }
        };
        let factor = self.config.rope.table_factor();
        for (i, frequency) in frequencies.into_iter().enumerate() {
            let (a, b) = if adjacent { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (x[a], x[b]) = ((x[a] * cos - x[b] * sin) * factor, (x[a] * sin + x[b] * cos) * factor);
        }
    }

    /// Query, key and value of each head at one position, and the width by which the scores are scaled.
    fn projections(&self, at: &str, x: &[f64], position: usize) -> [Vec<Vec<f64>>; 3] {
        let heads = self.config.num_attention_heads;
        let name = |part: &str| format!("{at}.{part}");
        match self.config.attention() {
            AttentionConfig::Mla(m) => {
                let q = match m.q_lora_rank {
                    None => self.linear(&name("q_proj"), x),
                    Some(_) => {
                        let down = self.linear(&name("q_a_proj"), x);
                        self.linear(&name("q_b_proj"), &self.norm(&name("q_a_layernorm"), &down, 1e-6))
                    }
                };
                let mut kv = self.linear(&name("kv_a_proj_with_mqa"), x);
                let mut k_pe = kv.split_off(m.kv_lora_rank);
                self.turn(&mut k_pe, position, m.rope_interleave);
                let mut c_kv = match m.latent_norm {
                    true => self.norm(&name("kv_a_layernorm"), &kv, 1e-6),
                    false => {
                        let (_, gain) = &self.weights[&name("kv_a_layernorm.weight")];
                        kv.iter().zip(gain).map(|(c, g)| c * g).collect()
                    }
                };
                if m.latent_scale {
                    let scale = (self.config.hidden_size as f64 / m.kv_lora_rank as f64).sqrt();
                    c_kv.iter_mut().for_each(|c| *c *= scale);
                }
                if let Some(ranks) = self.config.kv_cache_ranks() {
                    let layer: usize = at.split('.').nth(2).unwrap().parse().unwrap();
                    c_kv.truncate(ranks[layer]);
                }
                let up = self.linear(&name("kv_b_proj"), &c_kv);
                let mut out = [Vec::new(), Vec::new(), Vec::new()];
                for h in 0..heads {
                    let width = m.qk_nope_head_dim + m.qk_rope_head_dim;
                    let mut q = q[h * width..][..width].to_vec();
                    self.turn(&mut q[m.qk_nope_head_dim..], position, m.rope_interleave);
                    let width = m.qk_nope_head_dim + m.v_head_dim;
                    let (nope, v) = up[h * width..][..width].split_at(m.qk_nope_head_dim);
                    out[0].push(q);
                    out[1].push([nope, &k_pe].concat());
                    out[2].push(v.to_vec());
                }
                out
            }
            AttentionConfig::Grouped(g) => ["q", "k", "v"].map(|part| {
                let all = self.linear(&name(&format!("{part}_proj")), x);
                (0..heads)
                    .map(|h| {
                        let h = if part == "q" { h } else { h / (heads / g.num_key_value_heads) };
                        let mut head = all[h * g.head_dim..][..g.head_dim].to_vec();
                        if part != "v" {
                            if g.qk_norm {
                                head = self.norm(&name(&format!("{part}_norm")), &head, self.config.rms_norm_eps);
                            }
                            self.turn(&mut head[..g.rotary_dim], position, false);
                        }
                        head
                    })
                    .collect()
            }),
        }
    }

    /// What the last position of `seen` reads from all of them, through one head.
    fn attend(seen: &[[Vec<Vec<f64>>; 3]], head: usize, scale: f64) -> Vec<f64> {
        let q = &seen[seen.len() - 1][0][head];
        let mut out = vec![0.0; seen[0][2][head].len()];
        let mut total = 0.0;
        for [_, k, v] in seen {
            let weight = (scale * q.iter().zip(&k[head]).map(|(q, k)| q * k).sum::<f64>()).exp();
            total += weight;
            out.iter_mut().zip(&v[head]).for_each(|(out, v)| *out += weight * v);
        }
        out.iter_mut().for_each(|out| *out /= total);
        out
    }

    /// `scale` is a number of its own: the one thing that the configurations must not compute for this model.
    fn logits(&self, tokens: &[u32], scale: f64) -> Vec<f32> {
        let (d, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let table = &self.weights["model.embed_tokens.weight"].1;
        let mut xs: Vec<Vec<f64>> = tokens.iter().map(|id| table[*id as usize * d..][..d].to_vec()).collect();
        for layer in 0..self.config.layers.len() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let projected: Vec<_> = xs
                .iter()
                .enumerate()
                .map(|(t, x)| self.projections(&name("self_attn"), &self.norm(&name("input_layernorm"), x, eps), t))
                .collect();
            for (t, x) in xs.iter_mut().enumerate() {
                let heads = 0..self.config.num_attention_heads;
                let out: Vec<f64> = heads.flat_map(|h| Self::attend(&projected[..=t], h, scale)).collect();
                let attended = self.linear(&name("self_attn.o_proj"), &out);
                x.iter_mut().zip(attended).for_each(|(x, y)| *x += y);
                let normed = self.norm(&name("post_attention_layernorm"), x, eps);
                let gate = self.linear(&name("mlp.gate_proj"), &normed);
                let up = self.linear(&name("mlp.up_proj"), &normed);
                let hidden: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let fed = self.linear(&name("mlp.down_proj"), &hidden);
                x.iter_mut().zip(fed).for_each(|(x, y)| *x += y);
            }
        }
        let head = if self.config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        xs.iter().flat_map(|x| self.linear(head, &self.norm("model.norm", x, eps))).map(|x| x as f32).collect()
    }
}

#[test]
fn the_model_computes_its_equations() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        // An ε that shows: with the usual one nobody sees which norm uses it.
        let config = ModelConfig { rms_norm_eps: 0.05, ..config };
        let scale = match (config.attention(), config.rope.mscale_all_dim) {
            (AttentionConfig::Mla(m), None) => 1.0 / ((m.qk_nope_head_dim + m.qk_rope_head_dim) as f64).sqrt(),
            (AttentionConfig::Mla(_), Some(_)) => (0.1 * 0.6 * 4f64.ln() + 1.0).powi(2) / 11f64.sqrt(),
            (AttentionConfig::Grouped(_), _) => 1.0 / 6f64.sqrt(),
        };
        let mut model = scrambled(&config, 26, &device);
        // Small latents, so that their ε shows as well.
        let shrunk = model.parameters().into_iter().map(|p| {
            let small = p.name.ends_with("_a_proj.weight") || p.name.ends_with("kv_a_proj_with_mqa.weight");
            if small { p.value * 1e-2 } else { p.value }
        });
        let shrunk = shrunk.collect();
        model = model.with_values(shrunk);
        let tokens = ids(12, 29, 27);
        let expected = Naive::new(&model).logits(&tokens, scale);
        let error = distance(&values(model.forward(ids_tensor(&tokens, 1, 12, &device))), &expected);
        assert!(error < 1e-4, "{kind}: off by {error}");
    }
}

/// What transformers computed for a case, by name.
fn expected(bytes: &[u8], name: &str) -> Option<Vec<f32>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let view = file.tensor(name).ok()?;
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

/// Adjacent pairs to halves, row by row.
fn halves(values: &[f32], width: usize) -> Vec<f32> {
    let split = |row: &[f32]| [0, 1].map(|from| row.iter().skip(from).step_by(2).copied().collect::<Vec<_>>()).concat();
    values.chunks_exact(width).flat_map(split).collect()
}

#[test]
fn the_reference_cases_come_out_as_transformers_computes_them() {
    let device = Device::flex();
    let mut worst: f32 = 0.0;
    for dir in fixtures::dense_cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let case: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        let tolerance = case["suggested_tolerance"]["logits_abs"].as_f64().unwrap() as f32;
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor("input_ids").unwrap();
        let [rows, seq] = view.shape()[..] else { panic!("{name}") };
        let tokens: Vec<u32> =
            view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();

        let model = CausalLm::load(&dir, &device).unwrap_or_else(|e| panic!("{name}: {e}"));
        let context = model.context(&vec![0; rows * seq], seq, &device);
        let mut trace = Trace::default();
        let hidden = model.hidden(ids_tensor(&tokens, rows, seq, &device), &context, Some(&mut trace));
        let compare = |what: &str, got: Tensor<3>| {
            let want = expected(&bytes, what).unwrap_or_else(|| panic!("{name} has no {what}"));
            let want = if what == "k_rope.0" && model.config.family == Family::DeepseekV2 {
                halves(&want, model.config.rotary_dim())
            } else {
                want
            };
            let error = distance(&values(got), &want);
            assert!(error < tolerance, "{name}: {what} is off by {error}");
            error
        };
        for (i, hidden) in trace.hidden.iter().enumerate() {
            compare(&format!("hidden.{i}"), hidden.clone());
        }
        compare("attn_out.0", trace.attn_out[0].clone());
        if let (Some(latent), Some(k_pe)) = (trace.latent.first(), trace.k_pe.first()) {
            compare("latent.0", latent.clone());
            compare("k_rope.0", k_pe.clone());
        } else {
            assert!(expected(&bytes, "latent.0").is_none(), "{name}");
        }
        let error = compare("logits", model.logits(hidden));

        let targets: Vec<i64> =
            (0..rows * seq).map(|t| if t % seq == seq - 1 { IGNORE } else { i64::from(tokens[t + 1]) }).collect();
        let starts = vec![0; rows * seq];
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows,
            seq_len: seq,
            input_ids: &tokens,
            targets: &targets,
            document_starts: &starts,
        };
        let loss = model.loss(batch, 0.0, &device);
        let mean = loss.nats.into_scalar::<f32>() / loss.targets as f32;
        let loss_error = (mean - expected(&bytes, "loss").unwrap()[0]).abs();
        let loss_tolerance = case["suggested_tolerance"]["loss_abs"].as_f64().unwrap() as f32;
        assert!(loss_error < loss_tolerance, "{name}: the loss is off by {loss_error}");
        println!("{name}: logits within {error:.1e}, loss within {loss_error:.1e}");
        worst = worst.max(error);
    }
    println!("largest logit error: {worst:.2e}");
}
