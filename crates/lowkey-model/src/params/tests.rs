use burn::tensor::Device;

use super::*;
use crate::Rows;
use crate::fixtures::{self, scrambled, values};
use crate::model::ids_tensor;

#[test]
fn names_and_shapes_are_those_that_the_model_was_built_from_in_one_order() {
    for (kind, config) in fixtures::every_kind() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            let mut asked = Vec::new();
            let model = CausalLm::build(&config, &device, &mut |TensorSpec { name, shape, .. }| {
                asked.push((name.to_string(), shape.to_vec()));
                // Its place in the order, so that a swapped pair of equal shapes shows.
                vec![asked.len() as f32; shape.iter().product()]
            });
            let parameters = model.parameters();
            let found: Vec<_> = parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
            assert_eq!(found, asked, "{kind}");
            for (i, parameter) in parameters.into_iter().enumerate() {
                assert!(!parameter.value.is_autodiff(), "{kind}");
                assert_eq!(parameter.is_matrix(), parameter.shape.len() == 2);
                let expected = vec![(i + 1) as f32; parameter.shape.iter().product()];
                assert_eq!(values(parameter.value), expected, "{kind}: {}", parameter.name);
            }
        }
    }
}

#[test]
fn names_are_those_of_hugging_face() {
    let model = scrambled(&fixtures::mla_with(|m| m.q_lora_rank = Some(8)), 1, &Device::flex());
    let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    let layer = |i| {
        [
            "input_layernorm",
            "self_attn.q_a_proj",
            "self_attn.q_a_layernorm",
            "self_attn.q_b_proj",
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.kv_a_layernorm",
            "self_attn.kv_b_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ]
        .map(|part| format!("model.layers.{i}.{part}.weight"))
    };
    let mut expected = vec!["model.embed_tokens.weight".to_string()];
    expected.extend(layer(0).into_iter().chain(layer(1)));
    expected.extend(["model.norm.weight".to_string(), "lm_head.weight".to_string()]);
    assert_eq!(names, expected);
}

#[test]
fn only_projections_to_heads_stack_several_maps() {
    for (kind, config) in fixtures::every_kind() {
        for parameter in scrambled(&config, 1, &Device::flex()).parameters() {
            assert_eq!(parameter.head_rows.iter().sum::<usize>(), parameter.shape[0], "{kind}: {}", parameter.name);
            let to_heads = ["q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight", "k_proj.weight", "v_proj.weight"];
            if !to_heads.iter().any(|end| parameter.name.ends_with(end)) {
                assert_eq!(parameter.head_rows.len(), 1, "{kind}: {}", parameter.name);
            }
            let outside = parameter.name.contains("embed_tokens") || parameter.name.contains("lm_head");
            assert_eq!(parameter.is_hidden_matrix(), parameter.is_matrix() && !outside, "{kind}: {}", parameter.name);
        }
    }
    let config = fixtures::mla_with(|m| {
        (m.q_lora_rank, m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim) = (Some(8), 6, 4, 10);
    });
    let heads = config.num_attention_heads;
    let parameters = scrambled(&config, 1, &Device::flex()).parameters();
    let maps = |part: &str| parameters.iter().find(|p| p.name.contains(part)).unwrap().head_rows.clone();
    assert_eq!((maps("q_b_proj"), maps("kv_b_proj")), (vec![10; heads], [6, 10].repeat(heads)));
    assert_eq!((maps("q_a_proj"), maps("down_proj").len()), (vec![8], 1));
}

#[test]
fn putting_the_values_back_changes_nothing() {
    let checkpointing = Device::flex().autodiff().gradient_checkpointing();
    for device in [Device::flex(), Device::flex().autodiff(), checkpointing] {
        for (kind, config) in fixtures::every_kind() {
            let model = scrambled(&config, 2, &device);
            let before = model.parameters();
            let same = model.clone().with_values(before.iter().map(|p| p.value.clone()).collect());
            for (a, b) in before.into_iter().zip(same.parameters()) {
                assert_eq!((a.name, a.shape, values(a.value)), (b.name, b.shape, values(b.value)), "{kind}");
            }
            let ids = || ids_tensor(&[3, 1, 4, 1, 5], 1, 5, &device);
            assert_eq!(values(model.forward(ids())), values(same.forward(ids())), "{kind}");
            let weight = same.model.norm.gain();
            assert_eq!(weight.is_require_grad(), device.is_autodiff(), "{kind}");
            assert_eq!(weight.gradient_checkpointing_strategy(), device.gradient_checkpointing_strategy(), "{kind}");
        }
    }
}

#[test]
fn an_update_in_place_is_one_with_new_values() {
    let checkpointing = Device::flex().autodiff().gradient_checkpointing();
    for device in [Device::flex(), Device::flex().autodiff(), checkpointing] {
        for (kind, config) in fixtures::every_kind() {
            let mut model = scrambled(&config, 2, &device);
            let before = model.parameters();
            let expected = model.clone().with_values(before.iter().map(|p| p.value.clone() * 2.0).collect());
            model.update(|taken| {
                for (a, b) in taken.iter().zip(&before) {
                    assert_eq!((&a.name, &a.shape), (&b.name, &b.shape), "{kind}");
                }
                taken.into_iter().map(|p| p.value * 2.0).collect()
            });
            for (a, b) in expected.parameters().into_iter().zip(model.parameters()) {
                assert_eq!((a.name, a.shape, values(a.value)), (b.name, b.shape, values(b.value)), "{kind}");
            }
            let weight = model.model.norm.gain();
            assert_eq!(weight.is_require_grad(), device.is_autodiff(), "{kind}");
            assert_eq!(weight.gradient_checkpointing_strategy(), device.gradient_checkpointing_strategy(), "{kind}");
        }
    }
}

#[test]
fn new_values_arrive_and_still_learn() {
    let device = Device::flex().autodiff();
    let model = scrambled(&fixtures::grouped_with(|g| g.qk_norm = true), 3, &device);
    let doubled: Vec<_> = model.parameters().into_iter().map(|p| p.value * 2.0).collect();
    let model = model.with_values(doubled.clone());
    for (parameter, expected) in model.parameters().into_iter().zip(doubled) {
        assert_eq!(values(parameter.value), values(expected));
    }
    let batch = Rows {
        vectors: None,
        pairs: false,
        rows: 1,
        seq_len: 3,
        input_ids: &[1, 2, 3],
        targets: &[2, 3, 4],
        document_starts: &[0; 3],
    };
    let loss = model.loss(batch, 0.0, &device);
    let gradients = model.take_gradients(&mut loss.nats.backward());
    for (gradient, parameter) in gradients.into_iter().zip(model.parameters()) {
        assert!(values(gradient).iter().any(|g| *g != 0.0), "{}", parameter.name);
    }
}

#[test]
fn gradients_come_in_the_order_of_the_parameters_and_absent_ones_are_zero() {
    for (kind, config) in fixtures::every_kind() {
        let device = Device::flex().autodiff();
        let model = scrambled(&config, 4, &device);
        // ∂/∂w of ½·w² is w itself: a gradient in the wrong place shows, whatever its shape.
        let half_square = |w: Tensor<1>| w.square().sum() * 0.5;
        let block = &model.model.layers[1];
        let loss = half_square(flat(model.model.embed_tokens.table()))
            + half_square(block.input_layernorm.gain())
            + half_square(flat(block.mlp.up_proj.matrix()));
        let mut gradients = loss.backward();
        let reached =
            ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"];
        let taken = model.take_gradients(&mut gradients);
        let parameters = model.parameters();
        assert_eq!(taken.len(), parameters.len(), "{kind}");
        for (gradient, parameter) in taken.into_iter().zip(parameters) {
            assert!(!gradient.is_autodiff());
            let w = values(parameter.value);
            let expected = if reached.contains(&parameter.name.as_str()) { w } else { vec![0.0; w.len()] };
            let distance = fixtures::distance(&values(gradient), &expected);
            assert!(distance < 1e-6, "{kind}: {} is off by {distance}", parameter.name);
        }
        let again = model.take_gradients(&mut gradients);
        assert!(again.into_iter().all(|g| values(g).iter().all(|x| *x == 0.0)), "{kind}: taken gradients are gone");
    }
}

#[test]
fn what_is_put_in_the_place_of_a_weight_is_trained_or_frozen_as_that_was() {
    let device = Device::flex().autodiff();
    let model = scrambled(&fixtures::mla_with(|_| ()), 4, &device);
    let mut model = model.with_trained(|spec| spec.name.ends_with("norm.weight"));
    let before: Vec<String> = model.trained_parameters().into_iter().map(|p| p.name).collect();
    for block in &mut model.model.layers {
        let o_proj = match &mut block.self_attn {
            crate::attention::Attention::Mla(mla) => &mut mla.o_proj,
            crate::attention::Attention::Grouped(_) => panic!("no latent"),
        };
        // What a computation gave, which is no leaf.
        o_proj.set_matrix(o_proj.matrix() * 2.0);
        assert!(!o_proj.matrix().is_require_grad());
        block.input_layernorm.set_gain(block.input_layernorm.gain() * 2.0);
        assert!(block.input_layernorm.gain().is_require_grad());
    }
    assert_eq!(model.trained_parameters().into_iter().map(|p| p.name).collect::<Vec<_>>(), before);
}
