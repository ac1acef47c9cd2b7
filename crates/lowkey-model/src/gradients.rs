//! Loss and gradients of one batch, with all activations kept or with those of a block at a time.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use lowkey_batch::Rows;
use lowkey_kernels::{loss::LossSum, optim};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::attention::Seen;
use crate::model::{CausalLm, Context, Trace};
use crate::objective::{Against, EmbeddingNoise, Figures, Learnt, Lesson, Objective, Term, TermLoss};

/// What the backward pass computes again instead of keeping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Each decoder block: between the passes only the blocks' inputs are kept. A third more arithmetic in the blocks (Chen et al.,
    /// arXiv 1604.06174).
    Block,
}

/// One of the passes of an objective.
struct Pass<'a> {
    term: &'a Term,
    /// Factor on its summed loss.
    scale: f64,
    /// Hidden states of the first pass, `[rows · seq, d]`, to learn from.
    wider: Option<&'a Tensor<2>>,
    against: Against<'a>,
    noise: Option<EmbeddingNoise>,
}

/// What a pass gives: its loss outside its graph, the hidden states that it came from, and the gradients.
struct Passed {
    loss: LossSum,
    hidden: Tensor<2>,
    gradients: Vec<Tensor<1>>,
    figures: Figures,
}

/// The loss outside its graph.
fn plain(loss: LossSum) -> LossSum {
    LossSum { nats: loss.nats.without_autodiff(), z_loss: loss.z_loss.without_autodiff(), targets: loss.targets }
}

/// Gradients of `nats · scale`; none where nothing that is trained has part in it. A graph needs a leaf, without which going back
/// through it panics: a term need not reach the few tensors that a run trains.
fn gradients_of(nats: Tensor<1>, scale: f64) -> Gradients {
    let leaf = nats.clone().detach().zeros_like().require_grad();
    (nats * scale + leaf).backward()
}

/// Gradients of a module's trained parameters in its order, flattened.
struct TakeGradients<'a> {
    gradients: &'a mut Gradients,
    taken: Vec<Tensor<1>>,
}

impl ModuleVisitor for TakeGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if !value.is_require_grad() {
            return;
        }
        let gradient = value.grad_remove(self.gradients).unwrap_or_else(|| value.without_autodiff().zeros_like());
        let len = gradient.shape().num_elements();
        self.taken.push(gradient.reshape([len]));
    }
}

/// Takes the gradient of each trained parameter of `module` (zeros where there is none).
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
    /// Summed loss of a batch for the first term ([`CausalLm::loss`]), and the gradients of the objective, flattened, in the order of
    /// [`CausalLm::trained_parameters`].
    ///
    /// The model must record gradients. Both ways of [`Recompute`] give the same numbers, to the order of the sums where several
    /// gradients meet.
    pub fn loss_and_gradients(
        &self,
        batch: Rows,
        objective: Objective,
        recompute: Recompute,
        device: &Device,
    ) -> (LossSum, Vec<Tensor<1>>) {
        let Learnt { loss, gradients, .. } = self.learn(batch, objective, Against::default(), None, recompute, device);
        (loss, gradients)
    }

    /// The same of terms that are held against something else than the rows, too, with `noise` on what the passes read: the same for
    /// each term.
    pub fn learn(
        &self,
        batch: Rows,
        objective: Objective,
        against: Against,
        noise: Option<EmbeddingNoise>,
        recompute: Recompute,
        device: &Device,
    ) -> Learnt {
        let scale = objective.scale / objective.terms.len().max(1) as f64;
        let run = |term: &Term, wider: Option<&Tensor<2>>| {
            let pass = Pass { term, scale, wider, against, noise };
            match recompute {
                Recompute::None => self.at_once(batch, &pass, device),
                Recompute::Block => self.block_by_block(batch, &pass, device),
            }
        };
        let (first, others) = objective.terms.split_first().unwrap_or((&Term::NEXT, &[]));
        let Passed { loss, hidden, mut gradients, mut figures } = run(first, None);
        for term in others {
            let more = run(term, Some(&hidden));
            let both = gradients.into_iter().zip(more.gradients);
            gradients = both.map(|(sum, more)| optim::accumulate(sum, vec![more])).collect();
            figures.add(more.figures);
        }
        Learnt { loss, gradients, figures }
    }

    /// What the blocks read in a pass.
    fn read(&self, batch: Rows, pass: &Pass, device: &Device) -> Tensor<3> {
        let x = self.embed(batch, device);
        match &pass.noise {
            Some(noise) => noise.added(x, batch),
            None => x,
        }
    }

    /// One graph of everything.
    fn at_once(&self, batch: Rows, pass: &Pass, device: &Device) -> Passed {
        let lesson = Lesson::of(pass.term, pass.against, batch, device);
        let mut trace = lesson.as_ref().map(|_| Trace::of_attention());
        let x = self.read(batch, pass, device);
        let hidden = self.last_hidden_of(x, batch, pass.term.kv_rank(), device, trace.as_mut());
        let seen = hidden.clone().detach();
        let TermLoss { mut minimised, loss, mut figures } =
            self.loss_of_term(pass.term, hidden, batch, pass.wider, pass.against, lesson.as_ref());
        let mut loss = plain(loss);
        if let (Some(lesson), Some(trace)) = (&lesson, trace) {
            for (layer, own) in trace.attn_out.into_iter().enumerate() {
                minimised = minimised + lesson.learn(layer, own, &mut loss, &mut figures);
            }
        }
        let mut gradients = gradients_of(minimised, pass.scale);
        Passed { loss, hidden: seen, gradients: take(self, &mut gradients), figures }
    }

    /// Takes each trained parameter's gradient (zeros where there is none), flattened, in the order of
    /// [`CausalLm::trained_parameters`].
    pub fn take_gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        take(self, gradients)
    }

    /// Forward without a graph, keeping each block's input; then back from the head, one block's graph at a time.
    fn block_by_block(&self, batch: Rows, pass: &Pass, device: &Device) -> Passed {
        let Rows { rows, seq_len, .. } = batch;
        let (model, inner) = (self.valid(), device.clone().inner());
        let kv_rank = pass.term.kv_rank();
        let context = Context { kv_rank, ..model.context(batch.document_starts, seq_len, &inner) };
        let mut x = model.read(batch, pass, &inner);
        let mut inputs = Vec::with_capacity(model.model.layers.len());
        for block in &model.model.layers {
            inputs.push(x.clone());
            x = block.forward(x, Seen::Rows(&context), None);
        }
        drop(model);
        let leaf = |x: Tensor<3>| x.autodiff().require_grad();
        let pulled = |x: Tensor<3>, gradients: &mut Gradients| {
            x.grad_remove(gradients).unwrap_or_else(|| x.without_autodiff().zeros_like())
        };
        let x = leaf(x);
        let hidden = self.model.norm.forward(x.clone()).reshape([rows * seq_len, self.config.hidden_size]);
        let seen = hidden.clone().detach();
        let lesson = Lesson::of(pass.term, pass.against, batch, device);
        let TermLoss { minimised, loss, mut figures } =
            self.loss_of_term(pass.term, hidden, batch, pass.wider, pass.against, lesson.as_ref());
        let mut gradients = gradients_of(minimised, pass.scale);
        let mut loss = plain(loss);
        let mut pull = pulled(x, &mut gradients);
        let (norm, head) = (take(&self.model.norm, &mut gradients), take(&self.lm_head, &mut gradients));
        // Without a head of its own, the embedding is it.
        let as_head = self.lm_head.is_none().then(|| take(&self.model.embed_tokens, &mut gradients));
        let context = Context { kv_rank, ..self.context(batch.document_starts, seq_len, device) };
        let mut blocks = Vec::new();
        for (layer, (block, x)) in self.model.layers.iter().zip(inputs).enumerate().rev() {
            let x = leaf(x);
            let mut trace = lesson.as_ref().map(|_| Trace::of_attention());
            let y = block.forward(x.clone(), Seen::Rows(&context), trace.as_mut());
            let own = trace.and_then(|mut trace| trace.attn_out.pop());
            let mut gradients = match (&lesson, own) {
                (Some(lesson), Some(own)) => {
                    let part = lesson.learn(layer, own, &mut loss, &mut figures);
                    ((y * pull.autodiff()).sum() + part * pass.scale).backward()
                }
                _ => pull_back(y, pull),
            };
            pull = pulled(x, &mut gradients);
            blocks.push(take(block, &mut gradients));
        }
        let embedding = &self.model.embed_tokens;
        let looked_up = match embedding.is_trained() {
            true => take(embedding, &mut pull_back(self.embed(batch, device), pull)),
            false => Vec::new(),
        };
        let table = match as_head {
            Some(as_head) => as_head.into_iter().zip(looked_up).map(|(head, looked_up)| head + looked_up).collect(),
            None => looked_up,
        };
        let parts = [table].into_iter().chain(blocks.into_iter().rev()).chain([norm, head]);
        Passed { loss, hidden: seen, gradients: parts.flatten().collect(), figures }
    }
}

#[cfg(test)]
mod tests {
    use lowkey_kernels::loss::distill_sum;

    use super::*;
    use crate::fixtures::{self, distance, scrambled, values};
    use lowkey_batch::IGNORE;

    /// Two passes of two models are what one objective says of one model.
    #[test]
    fn a_narrower_pass_is_the_cut_model_and_its_gradients_join_those_of_the_whole() {
        let device = Device::flex().autodiff();
        for (kind, config) in fixtures::every_kind() {
            let Some(least) = config.kv_ranks().into_iter().min().filter(|least| *least > 1) else { continue };
            let model = scrambled(&config, 6, &device);
            let input_ids: Vec<u32> = (0..14).map(|i| i * 5 % config.vocab_size as u32).collect();
            let targets: Vec<i64> = (0..14).map(|i| i * 3 % 7).collect();
            let starts = [0; 14];
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows: 2,
                seq_len: 7,
                input_ids: &input_ids,
                targets: &targets,
                document_starts: &starts,
            };
            let rank = least / 2;
            let hidden = model.last_hidden(batch, Some(rank), &device, None);
            let cut = model.valid().with_kv_ranks(&vec![rank; config.layers.len()]).unwrap();
            let of_cut = cut.last_hidden(batch, None, &Device::flex(), None);
            assert!(distance(&values(hidden.clone()), &values(of_cut)) < 1e-5, "{kind}");

            let terms = |distillation: f64| [Term::NEXT, Term::Prefix { rank, distillation }];
            let objective = Objective { scale: 1.0, terms: &terms(0.0) };
            let (loss, found) = model.loss_and_gradients(batch, objective, Recompute::None, &device);
            let whole = model.loss(batch, 0.0, &device);
            assert_eq!(values(loss.nats), values(whole.nats.clone()), "{kind}: the loss told is that of the whole");
            let both = (whole.nats + model.loss_of(hidden, batch, 0.0).nats) * 0.5;
            let expected = model.take_gradients(&mut both.backward());
            for ((found, expected), parameter) in found.into_iter().zip(expected).zip(model.parameters()) {
                let (found, expected) = (values(found), values(expected));
                let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert!(distance(&found, &expected) <= 3e-6 * size, "{kind}: {}", parameter.name);
            }
            // All of it learnt from the first pass, which learns nothing from the second.
            let lesson = Objective { scale: 1.0, terms: &terms(1.0) };
            let (_, taught) = model.loss_and_gradients(batch, lesson, Recompute::None, &device);
            let hidden = model.last_hidden(batch, Some(rank), &device, None);
            let teacher = model.last_hidden(batch, None, &device, None);
            let head = model.head_weight();
            let apart = distill_sum(hidden, head, teacher, &targets, 1.0);
            let expected = model.take_gradients(&mut ((apart + model.loss(batch, 0.0, &device).nats) * 0.5).backward());
            for ((found, expected), parameter) in taught.into_iter().zip(expected).zip(model.parameters()) {
                let (found, expected) = (values(found), values(expected));
                let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert!(distance(&found, &expected) <= 3e-6 * size, "{kind}: {}", parameter.name);
            }
        }
    }

    #[test]
    fn what_holds_the_log_partition_is_the_whole_widths_alone_whatever_a_narrower_pass_learns_from() {
        let device = Device::flex().autodiff();
        for (kind, config) in fixtures::every_kind() {
            let Some(least) = config.kv_ranks().into_iter().min().filter(|least| *least > 1) else { continue };
            let model = scrambled(&config, 6, &device);
            let input_ids: Vec<u32> = (0..14).map(|i| i * 5 % config.vocab_size as u32).collect();
            let targets: Vec<i64> = (0..14).map(|i| i * 3 % 7).collect();
            let starts = [0; 14];
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows: 2,
                seq_len: 7,
                input_ids: &input_ids,
                targets: &targets,
                document_starts: &starts,
            };
            let narrow = [least / 2];
            let gradients = |z_loss: f64, narrow: &[usize], distillation: f64| {
                let narrow = narrow.iter().map(|rank| Term::Prefix { rank: *rank, distillation });
                let terms: Vec<Term> = std::iter::once(Term::Next { z_loss }).chain(narrow).collect();
                let objective = Objective { scale: terms.len() as f64, terms: &terms };
                let (_, gradients) = model.loss_and_gradients(batch, objective, Recompute::None, &device);
                gradients.into_iter().map(values).collect::<Vec<_>>()
            };
            let added = |narrow: &[usize], distillation: f64| -> Vec<Vec<f32>> {
                let (with, without) = (gradients(0.5, narrow, distillation), gradients(0.0, narrow, distillation));
                let less = |(a, b): (Vec<f32>, Vec<f32>)| a.iter().zip(b).map(|(a, b)| a - b).collect();
                with.into_iter().zip(without).map(less).collect()
            };
            let whole = added(&[], 0.0);
            for distillation in [0.0, 0.5, 1.0] {
                for (found, expected) in added(&narrow, distillation).into_iter().zip(&whole) {
                    let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                    assert!(distance(&found, expected) <= 1e-4 * size, "{kind}, distillation {distillation}");
                }
            }
        }
    }

    /// What is frozen changes nothing for the others, to the last bit, and has no gradient of its own.
    #[test]
    fn the_gradients_of_what_is_trained_are_those_of_a_model_that_trains_everything() {
        let device = Device::flex().autodiff();
        for (kind, config) in fixtures::every_kind() {
            let model = scrambled(&config, 4, &device);
            let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % config.vocab_size as u32).collect();
            let targets: Vec<i64> = (0..18).map(|i| if i == 7 { IGNORE } else { i * 3 % 7 }).collect();
            let starts: Vec<u32> = (0..18).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows: 2,
                seq_len: 9,
                input_ids: &input_ids,
                targets: &targets,
                document_starts: &starts,
            };
            let objective = Objective { scale: 0.1, terms: &[Term::Next { z_loss: 0.01 }] };
            for recompute in [Recompute::None, Recompute::Block] {
                let (loss, all) = model.loss_and_gradients(batch, objective, recompute, &device);
                let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
                for part in ["norm", "kv_b_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed", "lm_head", ".0."]
                {
                    let part = |name: &str| name.contains(part);
                    if !names.iter().any(|name| part(name)) {
                        continue;
                    }
                    let frozen = model.clone().with_trained(|spec| part(&spec.name));
                    let (same, found) = frozen.loss_and_gradients(batch, objective, recompute, &device);
                    assert_eq!(values(loss.nats.clone()), values(same.nats), "{kind}");
                    let expected: Vec<_> =
                        all.iter().zip(&names).filter(|(_, name)| part(name)).map(|(g, _)| values(g.clone())).collect();
                    assert_eq!(found.into_iter().map(values).collect::<Vec<_>>(), expected, "{kind}, {recompute:?}");
                }
            }
        }
    }

    /// What is trained may have no part in a term at all: it then has gradients of zero.
    #[test]
    fn a_term_that_reaches_nothing_that_is_trained_gives_zeros() {
        let device = Device::flex().autodiff();
        let config = fixtures::config(crate::attention::AttentionConfig::Mla(fixtures::mla()));
        let model = scrambled(&config, 4, &device).with_trained(|spec| spec.name == "lm_head.weight");
        let mut gradients = gradients_of(Tensor::<1>::ones([1], &device), 0.5);
        let taken = model.take_gradients(&mut gradients);
        assert_eq!(taken.len(), model.trained_parameters().len());
        assert!(taken.into_iter().flat_map(values).all(|x| x == 0.0));
        // One that reaches it gives the gradient itself, factor and all.
        let table = model.head_weight();
        let [rows, width] = table.dims();
        let mut gradients = gradients_of(table.sum() * 3.0, 0.5);
        let taken: Vec<f32> = model.take_gradients(&mut gradients).into_iter().flat_map(values).collect();
        assert_eq!(taken, vec![1.5; rows * width]);
    }

    #[test]
    fn the_head_alone_is_trained_by_every_term_however_it_is_computed() {
        let device = Device::flex().autodiff();
        let config = fixtures::config(crate::attention::AttentionConfig::Mla(fixtures::mla()));
        let model = scrambled(&config, 4, &device).with_trained(|spec| spec.name == "lm_head.weight");
        let input_ids: Vec<u32> = (0..8).collect();
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: 4,
            input_ids: &input_ids,
            targets: &[1, 2, IGNORE, 4, 5, 6, 0, 3],
            document_starts: &[0; 8],
        };
        for distillation in [0.0, 0.5, 1.0] {
            let terms = [Term::Next { z_loss: 0.01 }, Term::Prefix { rank: 3, distillation }];
            let objective = Objective { scale: 0.1, terms: &terms };
            let [whole, again] = [Recompute::None, Recompute::Block].map(|recompute| {
                let (_, gradients) = model.loss_and_gradients(batch, objective, recompute, &device);
                gradients.into_iter().flat_map(values).collect::<Vec<f32>>()
            });
            assert!(whole.iter().any(|x| *x != 0.0) && distance(&whole, &again) < 1e-6, "{distillation}");
        }
    }

    #[test]
    fn gradients_block_by_block_are_the_gradients() {
        let device = Device::flex().autodiff();
        for (kind, config) in fixtures::every_kind() {
            let model = scrambled(&config, 4, &device);
            let (rows, seq_len) = (2, 9);
            let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % config.vocab_size as u32).collect();
            let targets: Vec<i64> = (0..18).map(|i| if i == 7 { IGNORE } else { i * 3 % 7 }).collect();
            let document_starts: Vec<u32> = (0..18).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
            let batch = Rows {
                vectors: None,
                pairs: false,
                rows,
                seq_len,
                input_ids: &input_ids,
                targets: &targets,
                document_starts: &document_starts,
            };
            let narrow: &[usize] = if config.kv_ranks().is_empty() { &[] } else { &[1, 4] };
            let narrow = narrow.iter().map(|rank| Term::Prefix { rank: *rank, distillation: 0.7 });
            let terms: Vec<Term> = std::iter::once(Term::Next { z_loss: 0.01 }).chain(narrow).collect();
            let objective = Objective { scale: 0.1, terms: &terms };
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
