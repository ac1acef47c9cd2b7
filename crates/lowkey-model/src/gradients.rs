//! Loss and gradients of one batch, with all activations kept or with those of a block at a time.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use lowkey_kernels::LossSum;
use serde::{Deserialize, Serialize};

use crate::model::CausalLm;
use crate::pass::PassBatch;

/// What the backward pass computes again instead of keeping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing but what each operation forms anew by itself.
    #[default]
    None,
    /// Each decoder block (Chen et al., arXiv 1604.06174): between the passes only the blocks' inputs are kept. A third more
    /// arithmetic in the blocks.
    Block,
}

/// What the gradients are those of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Factor on the summed loss: one over the targets of the whole step for its mean.
    pub scale: f64,
    /// Factor on each squared log-partition, see [`lowkey_kernels::Labels::z_loss`].
    pub z_loss: f64,
}

/// The loss outside its graph.
fn plain(loss: LossSum) -> LossSum {
    LossSum { nats: loss.nats.without_autodiff(), z_loss: loss.z_loss.without_autodiff(), targets: loss.targets }
}

/// Gradients of a module's parameters in its order, flattened.
struct TakeGradients<'a> {
    gradients: &'a mut Gradients,
    taken: Vec<Tensor<1>>,
}

impl ModuleVisitor for TakeGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let gradient = value.grad_remove(self.gradients).unwrap_or_else(|| value.without_autodiff().zeros_like());
        let len = gradient.shape().num_elements();
        self.taken.push(gradient.reshape([len]));
    }
}

/// Takes the gradient of each parameter of `module` (zeros where there is none).
fn take<M: Module>(module: &M, gradients: &mut Gradients) -> Vec<Tensor<1>> {
    let mut take = TakeGradients { gradients, taken: Vec::new() };
    module.visit(&mut take);
    take.taken
}

/// Gradients of `Σ y · pull`: what the chain rule asks of a part whose output `y` has the gradient `pull`.
fn pull_back(y: Tensor<3>, pull: Tensor<3>) -> Gradients {
    (y * pull.autodiff()).sum().backward()
}

impl CausalLm {
    /// Summed loss of a batch ([`CausalLm::loss`]), and the gradients of `objective.scale` times it, flattened, in the order of
    /// [`CausalLm::parameters`].
    ///
    /// The model must record gradients. Both ways of [`Recompute`] give the same numbers, to the order of the sums where several
    /// gradients meet.
    pub fn loss_and_gradients<'a>(
        &self,
        batch: impl Into<PassBatch<'a>>,
        objective: Objective,
        recompute: Recompute,
        device: &Device,
    ) -> (LossSum, Vec<Tensor<1>>) {
        let batch = batch.into();
        match recompute {
            Recompute::None => {
                let loss = self.loss(batch, objective.z_loss, device);
                let mut gradients = (loss.nats.clone() * objective.scale).backward();
                (plain(loss), take(self, &mut gradients))
            }
            Recompute::Block => self.block_by_block(batch, objective, device),
        }
    }

    /// Takes each parameter's gradient (zeros where there is none), flattened, in the order of [`CausalLm::parameters`].
    pub fn take_gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        take(self, gradients)
    }

    /// Forward without a graph, keeping each block's input; then back from the head, one block's graph at a time.
    fn block_by_block(&self, batch: PassBatch, objective: Objective, device: &Device) -> (LossSum, Vec<Tensor<1>>) {
        let [rows, seq_len] = batch.dims();
        let (model, inner) = (self.valid(), device.clone().inner());
        let context = model.context(batch.document_starts(), seq_len, &inner);
        let mut x = model.embed(batch, &inner);
        let mut inputs = Vec::with_capacity(model.model.layers.len());
        for block in &model.model.layers {
            inputs.push(x.clone());
            x = block.forward(x, &context, None);
        }
        drop(model);
        let leaf = |x: Tensor<3>| x.autodiff().require_grad();
        let pulled = |x: Tensor<3>, gradients: &mut Gradients| {
            x.grad_remove(gradients).unwrap_or_else(|| x.without_autodiff().zeros_like())
        };
        let x = leaf(x);
        let hidden = self.model.norm.forward(x.clone()).reshape([rows * seq_len, self.config.hidden_size]);
        let loss = self.loss_of(hidden, batch, objective.z_loss);
        let mut gradients = (loss.nats.clone() * objective.scale).backward();
        let loss = plain(loss);
        let mut pull = pulled(x, &mut gradients);
        let (norm, head) = (take(&self.model.norm, &mut gradients), take(&self.lm_head, &mut gradients));
        // Without a head of its own, the embedding is it.
        let as_head = self.lm_head.is_none().then(|| take(&self.model.embed_tokens, &mut gradients));
        let context = self.context(batch.document_starts(), seq_len, device);
        let mut blocks = Vec::new();
        for (block, x) in self.model.layers.iter().zip(inputs).rev() {
            let x = leaf(x);
            let mut gradients = pull_back(block.forward(x.clone(), &context, None), pull);
            pull = pulled(x, &mut gradients);
            blocks.push(take(block, &mut gradients));
        }
        let embedded = self.embed(batch, device);
        let looked_up = take(&self.model.embed_tokens, &mut pull_back(embedded, pull));
        let table = match as_head {
            Some(as_head) => as_head.into_iter().zip(looked_up).map(|(head, looked_up)| head + looked_up).collect(),
            None => looked_up,
        };
        let parts = [table].into_iter().chain(blocks.into_iter().rev()).chain([norm, head]);
        (loss, parts.flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IGNORE;
    use crate::TokenBatch;
    use crate::fixtures::{self, distance, scrambled, values};

    #[test]
    fn gradients_block_by_block_are_the_gradients() {
        let device = Device::flex().autodiff();
        for (kind, config) in fixtures::every_kind() {
            let model = scrambled(&config, 4, &device);
            let (rows, seq_len) = (2, 9);
            let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % config.vocab_size as u32).collect();
            let targets: Vec<i64> = (0..18).map(|i| if i == 7 { IGNORE } else { i * 3 % 7 }).collect();
            let document_starts: Vec<u32> = (0..18).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
            let batch = TokenBatch {
                rows,
                seq_len,
                input_ids: &input_ids,
                targets: &targets,
                document_starts: &document_starts,
            };
            let objective = Objective { scale: 0.1, z_loss: 0.01 };
            let (loss, gradients) = model.loss_and_gradients(batch, objective, Recompute::None, &device);
            let (again, anew) = model.loss_and_gradients(batch, objective, Recompute::Block, &device);
            assert_eq!((values(loss.nats), loss.targets), (values(again.nats), again.targets), "{kind}");
            let parameters = model.parameters();
            assert_eq!((gradients.len(), anew.len()), (parameters.len(), parameters.len()), "{kind}");
            for ((gradient, anew), parameter) in gradients.into_iter().zip(anew).zip(parameters) {
                let (gradient, anew) = (values(gradient), values(anew));
                let size = gradient.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert!(distance(&gradient, &anew) <= 1e-6 * size, "{kind}: {}", parameter.name);
                assert_eq!(gradient.len(), parameter.shape.iter().product::<usize>(), "{kind}");
            }
        }
    }
}
