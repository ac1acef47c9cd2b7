//! The embedding against its reference.

use super::*;
use crate::fixtures::{Leaf, compare, device, random};
use burn::tensor::TensorData;

#[test]
fn embed_agrees_where_tokens_repeat_and_where_they_are_absent() {
    device().seed(1);
    for (batch, seq, vocab, width) in [(1, 1, 1, 1), (2, 7, 5, 37), (3, 130, 4, 200), (2, 300, 1000, 12)] {
        let weight = random([vocab, width], 1.0);
        let ids: Vec<i32> = (0..batch * seq).map(|i| ((i * i + 3 * i) % vocab) as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, seq]), &device());
        compare(
            &format!("embed {batch} {seq} {vocab} {width}"),
            &[("weight", Leaf::Two(weight.clone()))],
            || embed(weight.clone(), ids.clone()),
            || reference::embed(weight.clone(), ids.clone()),
        );
    }
}
