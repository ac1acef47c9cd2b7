//! Dropout of adapters, and what is kept where nothing is trained.

use super::*;
use crate::adapter::Draws;

fn batch(input_ids: &[u32], rows: usize) -> Rows<'_> {
    const TARGETS: [i64; 18] = [1, 2, 3, 4, 5, 6, 0, IGNORE, 2, 3, 1, 4, 6, 5, 0, 2, 1, 3];
    Rows {
        vectors: None,
        pairs: false,
        rows,
        seq_len: 6,
        input_ids: &input_ids[..6 * rows],
        targets: &TARGETS[..6 * rows],
        document_starts: &[0; 18][..6 * rows],
    }
}

fn ids() -> Vec<u32> {
    (0..18).map(|i| i * 5 % 29).collect()
}

const DRAWS: Draws = Draws { seed: 3, step: 7, first_row: 0 };

#[test]
fn a_pass_that_trains_leaves_out_the_same_however_it_is_computed_and_no_other_pass_does() {
    let device = Device::flex().autodiff();
    let terms = [Term::NEXT];
    let objective = Objective { scale: 0.1, terms: &terms };
    for (name, config) in fixtures::every_kind() {
        for (kind, adapter) in kinds() {
            let adapter = AdapterConfig { lora_dropout: 0.4, ..adapter };
            let model = adapted(&config, &adapter, 4, &device);
            let sober = adapted(&config, &AdapterConfig { lora_dropout: 0.0, ..adapter.clone() }, 4, &device);
            let ids = ids();
            let losses = |model: &CausalLm, rows: usize| values(model.losses(batch(&ids, rows), &device, None));
            assert_eq!(losses(&model, 3), losses(&sober, 3), "{name}, {kind}: nothing is left out unless it is said");
            let training = model.clone().with_draws(Some(DRAWS));
            let found = losses(&training, 3);
            assert!(!close(&found, &losses(&model, 3), 1e-3), "{name}, {kind}: something is left out");
            assert_eq!(found, losses(&training, 3), "{name}, {kind}");
            // Of one row by itself the same is left out.
            let third = model.clone().with_draws(Some(Draws { first_row: 2, ..DRAWS }));
            let alone = values(third.losses(
                Rows { input_ids: &ids[12..], targets: batch(&ids, 3).targets.get(12..).unwrap(), ..batch(&ids, 1) },
                &device,
                None,
            ));
            assert!(close(&alone, &found[12..], 1e-5), "{name}, {kind}: {alone:?} {:?}", &found[12..]);
            let gradients = |recompute| {
                let (loss, gradients) = training.loss_and_gradients(batch(&ids, 3), objective, recompute, &device);
                (values(loss.nats), gradients.into_iter().map(values).collect::<Vec<_>>())
            };
            let (whole, again) = (gradients(Recompute::None), gradients(Recompute::Block));
            assert_eq!(whole.0, again.0, "{name}, {kind}: a block that is computed twice");
            for (one, two) in whole.1.iter().zip(&again.1) {
                assert!(close(one, two, 1e-5), "{name}, {kind}");
            }
            let other = model.clone().with_draws(Some(Draws { step: 8, ..DRAWS }));
            assert_ne!(losses(&other, 3), found, "{name}, {kind}: another step");
            assert_eq!(losses(&training.with_draws(None), 3), losses(&model, 3), "{name}, {kind}");
        }
    }
}

/// y = W x + s·B·A·(x ∘ m) for the mask m, by one map alone, and DoRA's y = W x + (g − 1)·W·(x ∘ m) + g·s·B·A·(x ∘ m).
#[test]
fn what_is_left_out_is_left_out_of_the_product_as_in_peft() {
    let device = Device::flex();
    let config = fixtures::mla_with(|_| ());
    for use_dora in [false, true] {
        let adapter = AdapterConfig { lora_dropout: 0.5, use_dora, ..everything() };
        let model = adapted(&config, &adapter, 4, &device).with_draws(Some(DRAWS));
        let plain = adapted(&config, &AdapterConfig { lora_dropout: 0.0, ..adapter.clone() }, 4, &device);
        let base = scrambled(&config, 4, &device);
        let x = Tensor::<3>::from_data(burn::tensor::TensorData::new(normal(9, 2 * 5 * 12), [2, 5, 12]), &device);
        let name = "model.layers.1.mlp.up_proj";
        let of = |model: &CausalLm, x: Tensor<3>| model.model.layers[1].mlp.up_proj.forward(x);
        let mut dropout = dropout::Dropout::new(0.5, name);
        dropout.set(Some(DRAWS));
        let heard = dropout.of_tokens(x.clone());
        assert!(values(heard.clone()).contains(&0.0));
        let whole = of(&base, x.clone());
        // What the adapter changes is linear in what it hears.
        let expected = whole + of(&plain, heard.clone()) - of(&base, heard);
        assert!(close(&values(of(&model, x)), &values(expected), 1e-5), "{use_dora}");
    }
}

#[test]
fn a_settled_model_computes_the_same_and_reads_whole_matrices_once() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        for (kind, adapter) in kinds() {
            let model = adapted(&config, &adapter, 5, &device);
            let settled = model.settled();
            assert_eq!(logits(&settled, &config), logits(&model, &config), "{name}, {kind}");
            let found: Vec<String> = settled.parameters().into_iter().map(|p| p.name).collect();
            let whole = |name: &str| name.contains("kv_b_proj.lora") || name.contains("lm_head.lora");
            let kept = model.parameters().into_iter().map(|p| p.name).filter(|name| !whole(name));
            assert_eq!(found, kept.collect::<Vec<_>>(), "{name}, {kind}");
            let shapes =
                settled.parameters().into_iter().map(|p| p.shape.iter().product::<usize>() == p.value.dims()[0]);
            assert!(shapes.into_iter().all(|same| same), "{name}, {kind}");
        }
        let plain = scrambled(&config, 5, &device);
        assert_eq!(logits(&plain.settled(), &config), logits(&plain, &config));
    }
}
