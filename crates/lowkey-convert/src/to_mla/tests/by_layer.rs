//! A conversion layer by layer is the one of the whole model.

use lowkey_model::checkpoint::{LayerReader, NewCheckpoint, WeightDtype};

use super::*;
use crate::to_mla::{ByLayer, Texts, Wanted, Width};

/// Writes a model, converts it layer by layer, and reads what became of it.
fn converted(model: &CausalLm, wanted: Option<Wanted>, texts: Texts) -> Result<(CausalLm, ByLayer)> {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model.save(from.path(), WeightDtype::F32, usize::MAX).unwrap();
    let reader = LayerReader::open(from.path())?;
    let count = reader.config().layers.len() + 1;
    let mut new = NewCheckpoint::begin(to.path(), WeightDtype::F32, count)?;
    let made = by_layer(&reader, wanted, texts, &mut new, &device(), &mut |_| {})?;
    new.commit(&made.config)?;
    let model = CausalLm::load(to.path(), &device())?;
    assert_eq!(model.config, made.config);
    Ok((model, made))
}

fn assert_same_weights(name: &str, a: &CausalLm, b: &CausalLm) {
    assert_eq!(a.config, b.config, "{name}");
    for (a, b) in a.parameters().into_iter().zip(b.parameters()) {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape), "{name}");
        let [x, y] = [a.value, b.value].map(|value| value.try_into_vec_as::<f64>().unwrap());
        let apart = x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-5, "{name}: {} differs by {apart}", a.name);
    }
}

#[test]
fn what_is_exact_is_so_layer_by_layer() {
    for (seed, (name, config, [rotated, latent])) in zoo().into_iter().enumerate() {
        let whole = model(&config, seed as u64);
        let text = text(2, 30);
        let (made, report) = converted(&whole, None, Texts { train: &text, held_out: &text[..1] }).unwrap();
        assert_eq!((report.rotated, report.ranks), (rotated, vec![latent; 2]), "{name}");
        assert_same_weights(name, &made, &exact(&whole, &device()).unwrap());
        let [source, last] = &report.stages[..] else { panic!("{name}: {:?}", report.stages) };
        let before = loss(&whole, &text, &device()).unwrap();
        assert!((source.calibration - before).abs() < 1e-7 && (last.calibration - before).abs() < 1e-5, "{name}");
        assert!((source.held_out.unwrap() - loss(&whole, &text[..1], &device()).unwrap()).abs() < 1e-7, "{name}");
        assert!(report.apart[0] < 1e-4 * report.apart[1], "{name}: {:?}", report.apart);
    }
}

/// Told to do the same, both do.
#[test]
fn what_is_narrowed_is_the_same_layer_by_layer() {
    let normed = config(|_, g| (g.num_key_value_heads, g.qk_norm, g.qkv_bias) = (2, true, true));
    let zoo = [
        ("MHA", config(|_, g| g.num_key_value_heads = 6)),
        ("Qwen2's biases", config(|_, g| g.qkv_bias = true)),
        ("Qwen3's norms", normed),
        ("YaRN, tied", config(|c, _| (c.rope, c.tie_word_embeddings) = (yarn(), true))),
    ];
    let (train, held_out) = (text(4, 50), text(2, 40));
    for (seed, (name, config)) in zoo.into_iter().enumerate() {
        let whole = model(&config, 20 + seed as u64);
        let plain = absorb_head_norms(&whole, &train, &device(), &mut |_| {}).unwrap();
        for (keep, importance, centred) in [
            (Keep::Energy, Importance::Readers, true),
            (Keep::Uniform, Importance::Activations, false),
            (Keep::Fastest, Importance::Weights, true),
        ] {
            let wanted = Wanted {
                width: Width::Rank(11),
                rotated: Some(4),
                keep: Some(keep),
                fold: 1,
                centred,
                importance: Some(importance),
            };
            let (made, report) = converted(&whole, Some(wanted), Texts { train: &train, held_out: &held_out }).unwrap();
            let fitted = fit(&plain, wanted, &train, &device(), &mut |_| {}).unwrap();
            assert_eq!(made.config, fitted.model.config, "{name}, {keep:?}");
            let apart = distance(&logits(&made, &ids(60)), &logits(&fitted.model, &ids(60)));
            assert!(apart < 1e-4, "{name}, {keep:?}: {apart}");
            let expected = [Some(&whole), (config.attention() != plain.config.attention()).then_some(&plain)];
            let expected = expected.into_iter().flatten().chain([&fitted.whole, &fitted.model]);
            let losses = |text| -> Vec<f64> { expected.clone().map(|m| loss(m, text, &device()).unwrap()).collect() };
            let found: Vec<f64> = report.stages.iter().map(|stage| stage.calibration).collect();
            assert!(distance(&found, &losses(&train)) < 1e-5, "{name}, {keep:?}: {found:?} {:?}", losses(&train));
            let found: Vec<f64> = report.stages.iter().filter_map(|stage| stage.held_out).collect();
            assert!(distance(&found, &losses(&held_out)) < 1e-5, "{name}, {keep:?}, held out");
        }
    }
}

/// A budget goes where readers lose most, and none of it is left.
#[test]
fn a_budget_is_shared_out_layer_by_layer() {
    let mut whole = wide(&model(&config(|_, g| g.num_key_value_heads = 6), 5));
    // The values and keys of the second layer have a fourth of the directions.
    let attention = match &mut whole.model.layers[1].self_attn {
        lowkey_model::attention::Attention::Grouped(grouped) => grouped,
        lowkey_model::attention::Attention::Mla(_) => panic!("no latent yet"),
    };
    let low = random(7, 6, 26);
    for map in [&mut attention.k_proj, &mut attention.v_proj] {
        let few = random(9, 36, 6) * &low;
        map.set_matrix(crate::matrix::to_tensor(&few, DType::F64, &device()));
    }
    let text = text(6, 60);
    let wanted = Wanted {
        width: Width::Budget(2 * 4 + 26),
        rotated: Some(4),
        keep: None,
        fold: 1,
        centred: true,
        importance: None,
    };
    let (made, report) = converted(&whole, Some(wanted), Texts { train: &text, held_out: &[] }).unwrap();
    assert_eq!(report.ranks.iter().sum::<usize>(), 26);
    assert!(report.ranks[0] > 16 && report.ranks[1] < 10, "{:?}", report.ranks);
    assert_eq!(made.config.kv_ranks(), report.ranks);
    assert!(report.stages.iter().all(|stage| stage.held_out.is_none()));
    for curve in &report.curves {
        assert!(curve.points.windows(2).all(|pair| pair[1].1 <= pair[0].1 && pair[1].0 == pair[0].0 + 1));
        assert!(curve.points.last().unwrap().1 < 1e-9 && curve.points[0].1 < 1.0, "{curve:?}");
    }
    // As good as equal latents would be, and better.
    let equal = Wanted { width: Width::Rank(13), ..wanted };
    let (_, equal) = converted(&whole, Some(equal), Texts { train: &text, held_out: &[] }).unwrap();
    let last = |report: &ByLayer| report.stages.last().unwrap().calibration;
    assert!(last(&report) < last(&equal), "{} {}", last(&report), last(&equal));
}

#[test]
fn what_cannot_be_is_said_before_a_layer_is_written() {
    let text = text(2, 20);
    let texts = Texts { train: &text, held_out: &[] };
    let say = |model: &CausalLm, wanted: Option<Wanted>| converted(model, wanted, texts).unwrap_err().to_string();
    let wanted = |width, rotated| {
        Some(Wanted { width, rotated: Some(rotated), keep: None, fold: 1, centred: true, importance: None })
    };
    let whole = model(&config(|_, _| {}), 1);
    assert!(
        say(&whole, wanted(Width::Rank(30), 4)).starts_with("kv_rank = 30: with 4 numbers that turn there are 26 for")
    );
    assert!(say(&whole, wanted(Width::Rank(0), 4)).starts_with("kv_rank = 0"));
    assert!(say(&whole, wanted(Width::Rank(4), 5)).starts_with("rope_dim = 5: an even number"));
    assert!(say(&whole, wanted(Width::Budget(9), 4)).starts_with("kv_rank_budget = 9: 2 layers with 4"));
    // Where nothing is said of it as much turns as in one head.
    let open = Wanted { width: Width::Budget(12), rotated: None, keep: None, fold: 1, centred: true, importance: None };
    assert!(say(&whole, Some(open)).starts_with("kv_rank_budget = 12: 2 layers with 6 that turn"));
    let normed = model(&config(|_, g| g.qk_norm = true), 1);
    assert!(say(&normed, None).contains("a calibration text finds the nearest"), "{}", say(&normed, None));
    let mut broken = model(&config(|_, _| {}), 1);
    let values = broken.parameters().into_iter().map(|p| {
        let hit = p.name == "model.layers.1.self_attn.k_proj.weight";
        if hit { p.value * f32::NAN } else { p.value }
    });
    broken = broken.clone().with_values(values.collect());
    assert!(say(&broken, wanted(Width::Rank(4), 4)).starts_with("model.layers.1.self_attn.k_proj.weight holds NaN"));
}
