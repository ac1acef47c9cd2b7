use burn::tensor::Device;

use crate::config::ModelSection;
use crate::cost::Training;
use crate::fixtures::{self, scrambled};
use crate::gradients::Recompute;

#[test]
fn the_count_is_that_of_the_model() {
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 1, &Device::flex());
        let count = |part: fn(&str) -> bool| -> usize {
            let parameters = model.parameters();
            parameters.iter().filter(|p| part(&p.name)).map(|p| p.shape.iter().product::<usize>()).sum()
        };
        let got = config.parameter_count();
        assert_eq!(got.total, count(|_| true), "{kind}");
        assert_eq!(
            got.blocks,
            count(|name| name.starts_with("model.layers.") || name == "model.norm.weight"),
            "{kind}"
        );
        assert_eq!(got.attention, count(|name| name.contains("self_attn")), "{kind}");
        let matrices = model.parameters().into_iter().filter(|p| p.is_matrix());
        let looked_up = |name: &str| name == "model.embed_tokens.weight" && !config.tie_word_embeddings;
        let multiplied: usize =
            matrices.filter(|p| !looked_up(&p.name)).map(|p| p.shape.iter().product::<usize>()).sum();
        assert_eq!(config.matrix_weights(), multiplied, "{kind}");
    }
}

#[test]
fn the_cache_is_as_wide_as_what_is_stored() {
    let mla = fixtures::mla_with(|_| ()).cache_width();
    assert_eq!((mla.latent, mla.expanded), (9 + 6, 3 * (5 + 6 + 7)));
    let mqa = fixtures::grouped_with(|g| g.num_key_value_heads = 1).cache_width();
    assert_eq!((mqa.latent, mqa.expanded), (12, 12));
}

#[test]
fn operations_grow_with_the_context_by_the_attention_alone() {
    let config = fixtures::mla_with(|_| ());
    // Two layers, three heads, N + R + V = 18 multiply-adds per pair, two operations each; training is three times that.
    let per_key = 2.0 * 2.0 * 3.0 * 18.0;
    assert_eq!(config.forward_flops_per_token(11) - config.forward_flops_per_token(10), per_key);
    assert_eq!(config.pass_flops_per_token(10), 3.0 * config.forward_flops_per_token(10));
    assert_eq!(config.pass_flops_per_token(10), config.causal_pass_flops_per_token(20));
}

/// Peaks in MiB of runs of ten steps with two evaluations and checkpoints, bytes as tokens, as Linux counted them
/// (`experiments/speed/plan.py`).
#[test]
fn the_memory_that_is_planned_is_near_what_runs_took() {
    // Width, heads, of the feed-forward layer, of the latent.
    let (small, middle) = ([128, 4, 352, 64], [256, 8, 704, 64]);
    let (large, tiny) = ([512, 8, 1408, 128], [32, 2, 64, 16]);
    let (whole, block) = (Recompute::None, Recompute::Block);
    // Model, layers, narrower ranks; sequences of a pass and of a batch, their length; threads; what is computed again.
    type Case<'a> = ([usize; 4], usize, &'a [usize], [usize; 3], usize, Recompute, f64);
    let cases: &[Case] = &[
        (small, 4, &[], [8, 8, 256], 2, whole, 119.0),
        (small, 4, &[], [8, 8, 256], 1, whole, 109.0),
        (small, 4, &[], [2, 8, 256], 2, whole, 85.0),
        (small, 4, &[], [8, 8, 256], 2, block, 95.0),
        (small, 4, &[8, 16, 32], [8, 8, 256], 2, whole, 128.0),
        (small, 4, &[8, 16, 32], [8, 8, 256], 2, block, 101.0),
        (small, 4, &[], [32, 32, 256], 2, whole, 269.0),
        (small, 4, &[], [2, 2, 1024], 2, whole, 122.0),
        (small, 12, &[], [8, 8, 256], 2, whole, 223.0),
        (middle, 6, &[], [8, 8, 256], 2, whole, 257.0),
        (middle, 6, &[], [8, 8, 256], 2, block, 185.0),
        (middle, 6, &[16, 32], [8, 8, 256], 2, whole, 300.0),
        (middle, 6, &[], [1, 1, 4096], 2, whole, 388.0),
        (middle, 6, &[], [1, 1, 4096], 2, block, 212.0),
        (large, 6, &[], [4, 4, 128], 2, whole, 391.0),
        (large, 6, &[], [16, 16, 128], 2, whole, 518.0),
        (large, 8, &[], [4, 4, 512], 2, whole, 652.0),
        (large, 12, &[], [2, 2, 256], 2, whole, 695.0),
        (tiny, 1, &[], [4, 4, 64], 2, whole, 59.0),
    ];
    let mut apart = Vec::new();
    for (sizes, layers, ranks, [rows, batch, seq], threads, recompute, peak) in cases {
        let [hidden, heads, intermediate, latent] = sizes;
        let mut section = serde_json::json!({
            "attention": "mla", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": intermediate, "kv_lora_rank": latent, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        });
        if !ranks.is_empty() {
            section["elastic"] = serde_json::json!({ "ranks": ranks });
        }
        let section: ModelSection = serde_json::from_value(section).unwrap();
        let (config, _) = section.resolve(257, *seq).unwrap();
        let terms = if ranks.is_empty() { 1 } else { 3 };
        let training = Training {
            micro_batch: *rows,
            seq: *seq,
            threads: *threads,
            recompute: *recompute,
            evaluated: *batch,
            terms,
            ..Training::default()
        };
        let planned = config.train_bytes(training) as f64 / f64::from(1 << 20);
        let off = planned / peak - 1.0;
        assert!(off.abs() < 0.1, "{planned:.0} for {peak}: {sizes:?} {layers} {rows} {recompute:?}");
        apart.push(off.abs());
    }
    let mean = apart.iter().sum::<f64>() / apart.len() as f64;
    assert!(mean < 0.05, "{mean}");
}

#[test]
fn what_is_frozen_is_planned_without_gradients_and_moments() {
    let section = serde_json::json!({
        "attention": "mla", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1408,
        "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    });
    let (config, _) = serde_json::from_value::<ModelSection>(section).unwrap().resolve(257, 128).unwrap();
    let total = config.parameter_count().total;
    // Gradients are the most of what follows on each other, in one thread's passes of short rows.
    let all = Training { micro_batch: 1, seq: 16, threads: 1, evaluated: 1, terms: 1, ..Training::default() };
    let bytes = |training: Training| config.train_bytes(training) as i64;
    let (frozen, added) = (total - total / 3, total / 10);
    // Both moments and a copy of the gradients, with what lies idle between.
    let each = 4.0 * (2.2 + 1.0);
    let part = Training { frozen: total / 5, ..all };
    assert!((bytes(all) - bytes(part) - (each * (total / 5) as f64) as i64).abs() <= 1);
    let most = Training { frozen, ..all };
    assert!((bytes(all) - bytes(most) - (each * frozen as f64) as i64).abs() <= 1);
    // Beside an adapter the model lies once and no more.
    let adapter = Training { frozen: total, added, ..all };
    assert!((bytes(all) - bytes(adapter) - (each * total as f64 - (each + 4.0) * added as f64) as i64).abs() <= 1);
    // Where activations are the most, gradients take no more of their own, and of those less is kept where matrices are frozen.
    let long = |training: Training| Training { micro_batch: 64, seq: 1024, ..training };
    let spared = |part: usize| {
        let less = bytes(long(all)) - bytes(long(Training { frozen: part, ..all }));
        less as f64 - 2.2 * 4.0 * part as f64
    };
    let (fifth, nearly_all) = (spared(total / 5), spared(total - total / 1000));
    assert!(fifth > 0.0 && (nearly_all / fifth / 5.0 - 1.0).abs() < 0.01, "{fifth} {nearly_all}");
    assert!(nearly_all < 0.4 * bytes(long(all)) as f64);
    // Adapters read the inputs of maps.
    let beside = Training { frozen: total, added, ..all };
    assert!(bytes(long(all)) - bytes(long(beside)) < (2.5 * 4.0 * total as f64) as i64);
    let averaged = Training { averaged: true, ..part };
    assert!((bytes(averaged) - bytes(part) - 4 * (total - total / 5) as i64).abs() <= 1);
}
