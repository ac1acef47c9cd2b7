//! Next-token cross entropy.

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};

/// The label of a position that has no target, as in PyTorch and Hugging Face.
pub const IGNORE: i64 = -100;

/// A sum of negative log-likelihoods (nats) and how many targets it covers.
///
/// A sum rather than a mean, so that micro-batches with different numbers of targets can be combined exactly.
#[derive(Clone, Debug)]
pub struct LossSum {
    /// `Σ −log p(target)`, shape `[1]`.
    pub nats: Tensor<1>,
    /// Number of targets that are not [`IGNORE`].
    pub targets: usize,
}

/// Sum of `−log softmax(logits)[target]` over all positions whose target is not [`IGNORE`].
///
/// Also returns the per-position losses `[n]` (0 where ignored), for a report by class of token.
///
/// # Shapes
/// `logits [n, vocabulary]` (computed in their own dtype; pass f32), `targets` of length `n`.
pub fn cross_entropy(logits: Tensor<2>, targets: &[i64], device: &Device) -> (LossSum, Tensor<1>) {
    let n = targets.len();
    let safe: Vec<i32> = targets.iter().map(|t| if *t == IGNORE { 0 } else { *t as i32 }).collect();
    let keep: Vec<f32> = targets.iter().map(|t| if *t == IGNORE { 0.0 } else { 1.0 }).collect();
    let count = targets.iter().filter(|t| **t != IGNORE).count();
    let index = Tensor::<2, Int>::from_data(TensorData::new(safe, [n, 1]), device);
    let picked = log_softmax(logits, 1).gather(1, index).reshape([n]);
    // A select, not a product: an ignored row may hold a non-finite logit, and 0 · inf would be NaN.
    let ignored = Tensor::<1>::from_data(TensorData::new(keep, [n]), device).equal_scalar(0.0f32);
    let each = picked.neg().mask_fill(ignored, 0.0f32);
    (LossSum { nats: each.clone().sum(), targets: count }, each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_positions_count_for_nothing() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_data(TensorData::new(vec![0.0f32, 0.0, 3.0, 1.0, 7.0, 7.0], [3, 2]), &device);
        let (sum, each) = cross_entropy(logits, &[1, 0, IGNORE], &device);
        assert_eq!(sum.targets, 2);
        let expected = 2f32.ln() + (1.0 + (-2f32).exp()).ln();
        assert!((sum.nats.into_scalar::<f32>() - expected).abs() < 1e-6);
        assert_eq!(each.into_data().try_to_vec::<f32>().unwrap()[2], 0.0);
    }

    #[test]
    fn the_gradient_is_softmax_minus_one_hot() {
        let device = Device::flex().autodiff();
        let logits = Tensor::<2>::from_data(TensorData::new(vec![0.5f32, -1.0, 2.0], [1, 3]), &device).require_grad();
        let (sum, _) = cross_entropy(logits.clone(), &[2], &device);
        let grads = sum.nats.backward();
        let grad = logits.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap();
        let z: f32 = [0.5f32, -1.0, 2.0].iter().map(|x| x.exp()).sum();
        for (g, (x, hot)) in grad.iter().zip([(0.5f32, 0.0), (-1.0, 0.0), (2.0, 1.0)]) {
            assert!((g - (x.exp() / z - hot)).abs() < 1e-6);
        }
    }
}
