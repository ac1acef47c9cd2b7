use burn::tensor::Device;

use crate::fixtures::{self, scrambled};

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
