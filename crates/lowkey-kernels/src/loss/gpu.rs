//! Output head and loss over chunks of tokens: the logits of one chunk exist at a time, beside their gradient in the format of operands.

mod kernels;

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{FloatDType, Shape, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{CubeCount, CubeDim};

use super::autodiff::{LossGradients, LossOps};
use crate::autodiff::Wanted;
use crate::gpu::product::{format, operand, product, transposed};
use crate::gpu::rows;
use crate::gpu::tensors::{dims, new, new_of, of_format, reshaped};
use crate::precision::Precision;

/// Most logits that exist at a time: 256 Mi numbers, 1 GiB. In tests so few that there are many chunks.
///
/// Each chunk adds its gradient of the head to that of the chunks before, and a product of few rows leaves a large device idle: few
/// chunks are fast chunks.
const LOGITS: usize = if cfg!(test) { 20_000 } else { 1 << 28 };

/// So many on a device with this limit for a tensor, which on NVIDIA's is a quarter of the memory: a sixteenth of it, more where that
/// would be little.
fn most_logits(max_tensor: usize) -> usize {
    LOGITS.min((max_tensor / 64).max((max_tensor / 16).min(1 << 24)))
}

/// Hidden vectors `[n, d]`, the head `[vocab, d]` and the targets `[n]`.
struct Head {
    h: CubeTensor,
    weight: CubeTensor,
    targets: CubeTensor,
    chunk: usize,
    precision: Precision,
}

/// `[n, 2]`: each token's loss, and the part that is z-loss.
struct Losses(CubeTensor);

impl Losses {
    /// Both, summed, `[2]`.
    fn sum(self) -> CubeTensor {
        reshaped(CubeBackend::float_sum_dim(self.0, 0), [2])
    }

    /// Each token's loss, `[n]`.
    fn each(self) -> CubeTensor {
        let [n, _] = dims::<2>(&self.0);
        let first = CubeBackend::float_slice(self.0, &[Slice::from(0..n), Slice::from(0..1)]);
        reshaped(into_contiguous(first), [n])
    }
}

fn part(tensor: &CubeTensor, from: usize, to: usize) -> CubeTensor {
    into_contiguous(CubeBackend::float_slice(tensor.clone(), &[Slice::from(from..to)]))
}

impl Head {
    fn new(h: CubeTensor, weight: CubeTensor, targets: CubeTensor, precision: Precision) -> Self {
        let [h, weight, targets] = [h, weight, targets].map(into_contiguous);
        let weight = operand(weight, precision);
        let [vocab, _] = dims::<2>(&weight);
        let most = most_logits(h.client.properties().memory.max_page_size as usize);
        let chunk = (most / vocab.max(1)).max(1);
        Self { h, weight, targets, chunk, precision }
    }

    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> {
        let ([n, _], chunk) = (dims::<2>(&self.h), self.chunk);
        (0..n).step_by(chunk).map(move |from| (from, (from + chunk).min(n)))
    }

    fn logits(&self, h: CubeTensor) -> CubeTensor {
        into_contiguous(product(operand(h, self.precision), transposed(self.weight.clone()), self.precision))
    }

    fn cubes(rows: usize) -> (CubeCount, CubeDim) {
        (CubeCount::Static(rows.min(rows::CUBES) as u32, 1, 1), CubeDim::new_1d(rows::UNITS))
    }

    /// Losses of a chunk's logits, and the logits' gradient if asked for; a single number stands for it if not.
    fn chunk(
        &self,
        logits: &CubeTensor,
        range: (usize, usize),
        weights: &CubeTensor,
        z: f64,
        grad: bool,
    ) -> (CubeTensor, CubeTensor) {
        let [n, vocab] = dims::<2>(logits);
        let losses = new(logits, [n, 2]);
        let slopes = new_of(logits, if grad { vec![n, vocab] } else { vec![1] }, format(self.precision));
        let weights = if dims::<1>(weights) == [1] { weights.clone() } else { part(weights, range.0, range.1) };
        let targets = part(&self.targets, range.0, range.1);
        let (count, units) = Self::cubes(n);
        let launch = of_format!(slopes.dtype, kernels::cross_entropy::launch);
        launch(
            &logits.client,
            count,
            units,
            logits.clone().into_buffer_arg(),
            targets.into_buffer_arg(),
            weights.into_buffer_arg(),
            losses.clone().into_buffer_arg(),
            slopes.clone().into_buffer_arg(),
            n,
            vocab,
            z as f32,
            grad,
        );
        (losses, slopes)
    }

    /// The losses alone.
    fn losses(self, weights: CubeTensor, z_loss: f64) -> Losses {
        let weights = into_contiguous(weights);
        let parts = self.chunks().map(|range| {
            let logits = self.logits(part(&self.h, range.0, range.1));
            self.chunk(&logits, range, &weights, z_loss, false).0
        });
        Losses(joined(parts.collect()))
    }

    /// `(sums [2], [d h, d weight])`
    fn losses_with_gradients(
        self,
        weights: CubeTensor,
        z_loss: f64,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        let weights = into_contiguous(weights);
        let (losses, gradients) =
            self.backward(wanted, |head, range, logits| head.chunk(logits, range, &weights, z_loss, true));
        (Losses(losses).sum(), gradients)
    }

    /// `(sum [1], [d h, d weight])` of [`crate::loss::distill_sum`].
    fn lessons_with_gradients(
        self,
        teacher: CubeTensor,
        share: f64,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        let teacher = into_contiguous(teacher);
        let (losses, gradients) = self.backward(wanted, |head, range, logits| {
            let [n, vocab] = dims::<2>(logits);
            let losses = new(logits, [n]);
            let slopes = new_of(logits, [n, vocab], format(head.precision));
            let of_teacher = head.logits(part(&teacher, range.0, range.1));
            let targets = part(&head.targets, range.0, range.1);
            let (count, units) = Self::cubes(n);
            let launch = of_format!(slopes.dtype, kernels::distill::launch);
            launch(
                &logits.client,
                count,
                units,
                logits.clone().into_buffer_arg(),
                of_teacher.into_buffer_arg(),
                targets.into_buffer_arg(),
                losses.clone().into_buffer_arg(),
                slopes.clone().into_buffer_arg(),
                n,
                vocab,
                share as f32,
            );
            (losses, slopes)
        });
        // Along the axis: the sum over all would be one of atomic additions, in an order that changes.
        (CubeBackend::float_sum_dim(losses, 0), gradients)
    }

    /// Losses of all chunks, and the gradients that are wanted of those that follow from the logits'.
    fn backward(
        &self,
        [of_h, of_weight]: Wanted<2>,
        step: impl Fn(&Self, (usize, usize), &CubeTensor) -> (CubeTensor, CubeTensor),
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        let (mut losses, mut d_h, mut d_weight) = (Vec::new(), Vec::new(), None::<CubeTensor>);
        for range in self.chunks() {
            let h = part(&self.h, range.0, range.1);
            let logits = self.logits(h.clone());
            let (loss, d_logits) = step(self, range, &logits);
            drop(logits);
            losses.push(loss);
            let h = operand(h, self.precision);
            if of_h {
                d_h.push(product(d_logits.clone(), self.weight.clone(), self.precision));
            }
            if of_weight {
                let part = product(transposed(d_logits), h, self.precision);
                d_weight = Some(match d_weight {
                    Some(sum) => CubeBackend::float_add(sum, part),
                    None => part,
                });
            }
        }
        (joined(losses), [of_h.then(|| joined(d_h)), d_weight])
    }
}

/// Chunks one below the other.
fn joined(mut parts: Vec<CubeTensor>) -> CubeTensor {
    match (parts.pop(), parts.is_empty()) {
        (Some(only), true) => only,
        (Some(last), false) => {
            parts.push(last);
            CubeBackend::float_cat(parts, 0)
        }
        (None, _) => unreachable!("a loss over no tokens is not asked for"),
    }
}

impl LossOps for CubeBackend {
    fn cross_entropy_sum(
        h: CubeTensor,
        weight: CubeTensor,
        targets: CubeTensor,
        label_weights: CubeTensor,
        z_loss: f64,
        precision: Precision,
    ) -> CubeTensor {
        Head::new(h, weight, targets, precision).losses(label_weights, z_loss).sum()
    }

    fn cross_entropy_each(h: CubeTensor, weight: CubeTensor, targets: CubeTensor, precision: Precision) -> CubeTensor {
        let one = CubeBackend::float_ones(Shape::from(vec![1]), &h.device, FloatDType::F32);
        Head::new(h, weight, targets, precision).losses(one, 0.0).each()
    }

    fn distill_sum(
        h: CubeTensor,
        weight: CubeTensor,
        teacher: CubeTensor,
        targets: CubeTensor,
        share: f64,
        precision: Precision,
    ) -> CubeTensor {
        Self::distill_sum_saving(h, weight, teacher, targets, share, precision, [false; 2]).0
    }

    fn with_gradients(_: CubeTensor, _: CubeTensor, sum: CubeTensor, _: CubeTensor, _: CubeTensor) -> CubeTensor {
        sum
    }
}

impl LossGradients for CubeBackend {
    fn cross_entropy_sum_saving(
        h: CubeTensor,
        weight: CubeTensor,
        targets: CubeTensor,
        label_weights: CubeTensor,
        z_loss: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        Head::new(h, weight, targets, precision).losses_with_gradients(label_weights, z_loss, wanted)
    }

    fn distill_sum_saving(
        h: CubeTensor,
        weight: CubeTensor,
        teacher: CubeTensor,
        targets: CubeTensor,
        share: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        Head::new(h, weight, targets, precision).lessons_with_gradients(teacher, share, wanted)
    }
}
