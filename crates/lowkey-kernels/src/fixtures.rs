//! What the tests of operations share: random leaves, and the comparison of values and gradients.

use std::sync::OnceLock;

use burn::tensor::{Device, Distribution, Tensor};

use crate::mlp::MlpWeights;

/// The device of all tests, with autodiff: the CPU, or what the environment variable `LOWKEY_TEST_DEVICE` names.
pub(crate) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || crate::device::open(&std::env::var("LOWKEY_TEST_DEVICE").unwrap_or("cpu".to_owned())).unwrap();
    DEVICE.get_or_init(open).clone().autodiff()
}

/// The same without.
pub(crate) fn plain_device() -> Device {
    device().inner()
}

/// Whether tests of threads, of f64 or of memory have something to look at.
pub(crate) fn is_cpu() -> bool {
    crate::device::is_cpu(&device())
}

pub(crate) fn random<const D: usize>(shape: [usize; D], spread: f64) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, spread), &device()).require_grad()
}

/// The same numbers outside every graph.
pub(crate) fn frozen<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.without_autodiff().autodiff()
}

pub(crate) fn mlp(d: usize, f: usize) -> MlpWeights {
    MlpWeights { norm: random([d], 1.0), gate: random([f, d], 0.5), up: random([f, d], 0.5), down: random([d, f], 0.5) }
}

pub(crate) fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

pub(crate) fn assert_close(what: &str, found: Vec<f32>, expected: Vec<f32>) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
    let size: f64 = expected.iter().map(|x| square(*x)).sum();
    assert!(off.is_finite(), "{what}: not finite");
    // Where the terms of an expected 0 cancel, as in the gradient of a query that sees one key, every number keeps its own
    // rounding: the floor is one of the root mean square, not of the norm.
    let (off, size) = ((off / expected.len() as f64).sqrt(), (size / expected.len() as f64).sqrt());
    if off > 1e-5 * size.max(0.1) {
        // Which ones are off tells a wrong tile from a wrong sum.
        let wrong: Vec<usize> =
            (0..found.len()).filter(|i| f64::from((found[*i] - expected[*i]).abs()) > 1e-4 * size.max(0.1)).collect();
        let some: Vec<String> =
            wrong.iter().take(6).map(|i| format!("{} for {} at {i}", found[*i], expected[*i])).collect();
        let (count, of, last) = (wrong.len(), found.len(), wrong.last());
        panic!(
            "{what}: error {off:.1e} where numbers are of size {size:.1e}; {count} of {of} are off, the last at {last:?}: {}",
            some.join(", ")
        );
    }
}

/// Compares values, and gradients under one random weighting of the outputs.
pub(crate) fn compare<const N: usize, const D: usize>(
    what: &str,
    inputs: &[(&str, Leaf)],
    fused: impl Fn() -> Tensor<N>,
    plain: impl Fn() -> Tensor<D>,
) {
    let (a, b) = (fused(), plain());
    let weights: Tensor<1> = Tensor::random([a.shape().num_elements()], Distribution::Normal(0.0, 1.0), &device());
    assert_close(what, host(a.clone()), host(b.clone()));
    let n = weights.dims();
    let grads_a = (a.reshape(n) * weights.clone()).sum().backward();
    let grads_b = (b.reshape(n) * weights).sum().backward();
    for (name, leaf) in inputs {
        assert_close(&format!("{what}: gradient of {name}"), leaf.grad(&grads_a), leaf.grad(&grads_b));
    }
}

pub(crate) enum Leaf {
    One(Tensor<1>),
    Two(Tensor<2>),
    Three(Tensor<3>),
    Four(Tensor<4>),
}

impl Leaf {
    pub(crate) fn grad(&self, grads: &burn::tensor::Gradients) -> Vec<f32> {
        match self {
            Self::One(t) => host(t.grad(grads).unwrap()),
            Self::Two(t) => host(t.grad(grads).unwrap()),
            Self::Three(t) => host(t.grad(grads).unwrap()),
            Self::Four(t) => host(t.grad(grads).unwrap()),
        }
    }
}
