//! Terms that are held against another model: their gradients against those of plain tensor operations.

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int};

use super::preference::{Preference, PreferenceLoss};
use super::*;
use crate::fixtures::{self, distance, scrambled, values};
use crate::gradients::Recompute;
use crate::model::{Trace, ids_tensor};

const ROWS: usize = 4;
const SEQ: usize = 9;

/// Two pairs: three tokens of a prompt, then answers of different lengths.
struct Pairs {
    ids: Vec<u32>,
    targets: Vec<i64>,
    starts: Vec<u32>,
}

impl Pairs {
    fn new() -> Self {
        let lengths = [4, 6, 3, 5];
        let ids: Vec<u32> = (0..(ROWS * SEQ) as u32).map(|i| (i * 5 + i / 9) % 29).collect();
        let targets = (0..ROWS * SEQ).map(|i| {
            let (row, at) = (i / SEQ, i % SEQ);
            if (2..2 + lengths[row]).contains(&at) { i64::from(ids[(i + 1) % ids.len()]) } else { IGNORE }
        });
        Self { targets: targets.collect(), ids, starts: vec![0; ROWS * SEQ] }
    }

    fn rows(&self) -> Rows<'_> {
        Rows {
            rows: ROWS,
            seq_len: SEQ,
            input_ids: &self.ids,
            targets: &self.targets,
            document_starts: &self.starts,
            vectors: None,
            pairs: true,
        }
    }
}

fn preference(loss: PreferenceLoss) -> Preference {
    Preference { losses: vec![(loss, 1.0)], beta: 0.3, label_smoothing: 0.1, gamma: 0.5, cpo_alpha: 1.0 }
}

/// Log-probabilities of each row's targets, summed, from whole logits, `[rows]`.
fn plain_sums(model: &CausalLm, pairs: &Pairs, device: &Device) -> Tensor<1> {
    let context = model.context(&pairs.starts, SEQ, device);
    let logits = model.logits(model.hidden(ids_tensor(&pairs.ids, ROWS, SEQ, device), &context, None));
    let index: Vec<i32> = pairs.targets.iter().map(|target| (*target).max(0) as i32).collect();
    let index = Tensor::<3, Int>::from_data(TensorData::new(index, [ROWS, SEQ, 1]), device);
    let asked: Vec<f32> = pairs.targets.iter().map(|target| f32::from(u8::from(*target != IGNORE))).collect();
    let asked = Tensor::<2>::from_data(TensorData::new(asked, [ROWS, SEQ]), device);
    let picked = log_softmax(logits, 2).gather(2, index).reshape([ROWS, SEQ]);
    (picked * asked).sum_dim(1).reshape([ROWS])
}

fn assert_gradients(what: &str, model: &CausalLm, found: Vec<Tensor<1>>, expected: Vec<Tensor<1>>) {
    let parameters = model.parameters();
    assert_eq!((found.len(), expected.len()), (parameters.len(), parameters.len()), "{what}");
    for ((found, expected), parameter) in found.into_iter().zip(expected).zip(parameters) {
        let (found, expected) = (values(found), values(expected));
        let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        assert!(distance(&found, &expected) <= 1e-5 * size, "{what}: {}", parameter.name);
    }
}

#[test]
fn a_step_of_pairs_goes_down_the_losses_of_plain_tensors() {
    let device = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let (model, pairs) = (scrambled(&config, 4, &device), Pairs::new());
        let other = scrambled(&config, 5, &device).valid();
        let (reference, tokens) = other.row_log_probs(pairs.rows(), &Device::flex());
        assert_eq!(tokens, [4, 6, 3, 5]);
        for loss in PreferenceLoss::ALL {
            let terms = [Term::Preference(preference(loss))];
            let objective = Objective { scale: 0.5, terms: &terms };
            let against = Against { reference: Some(&reference), teacher: None };
            // The same loss as a function of tensors: its slopes are held to torch's elsewhere.
            let sums = plain_sums(&model, &pairs, &device);
            let host: Vec<f64> = values(sums.clone()).into_iter().map(f64::from).collect();
            let (slopes, figures) = preference(loss).judge_rows(&host, &tokens, Some(&reference));
            let slopes: Vec<f32> = slopes.into_iter().map(|slope| slope as f32).collect();
            let slopes = Tensor::<1>::from_data(TensorData::new(slopes, [ROWS]), &device);
            let expected = model.take_gradients(&mut ((sums * slopes).sum() * 0.5).backward());
            for recompute in [Recompute::None, Recompute::Block] {
                let learnt = model.learn(pairs.rows(), objective, against, None, recompute, &device);
                let told = f64::from(values(learnt.loss.nats)[0]);
                assert!(
                    (told - figures.loss).abs() <= 1e-5 * figures.loss.abs(),
                    "{kind} {loss:?}: {told} {}",
                    figures.loss
                );
                let found = learnt.figures.means(&[], figures.pairs);
                assert_eq!((figures.pairs, found["rewards/accuracies"]), (2, figures.preferred as f64 / 2.0));
                assert_gradients(&format!("{kind} {loss:?}"), &model, learnt.gradients, expected.clone());
            }
        }
    }
}

#[test]
fn a_model_that_is_its_reference_begins_at_ln_2_to_the_last_bit() {
    let device = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let (model, pairs) = (scrambled(&config, 4, &device), Pairs::new());
        let (reference, _) = model.valid().row_log_probs(pairs.rows(), &Device::flex());
        let against = Against { reference: Some(&reference), teacher: None };
        for recompute in [Recompute::None, Recompute::Block] {
            for (loss, expected) in
                [(PreferenceLoss::Sigmoid, std::f64::consts::LN_2), (PreferenceLoss::Ipo, 2.5 * 2.5)]
            {
                let terms = [Term::Preference(Preference { beta: 0.2, ..preference(loss) })];
                let learnt = model.learn(
                    pairs.rows(),
                    Objective { scale: 0.5, terms: &terms },
                    against,
                    None,
                    recompute,
                    &device,
                );
                let Term::Preference(preference) = &terms[0] else { unreachable!() };
                let (sums, tokens) = model.valid().row_log_probs(pairs.rows(), &Device::flex());
                let (_, figures) = preference.judge_rows(&sums, &tokens, Some(&reference));
                assert_eq!(figures.mean_loss(), expected, "{kind} {loss:?} {recompute:?}");
                assert_eq!(values(learnt.loss.nats), [(2.0 * expected) as f32]);
                let told = learnt.figures.means(&[], 2);
                for name in ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"] {
                    assert_eq!(told[name], 0.0, "{kind} {loss:?} {recompute:?}: {name}");
                }
            }
        }
    }
}

#[test]
fn learning_from_another_model_goes_down_the_distance_of_plain_tensors() {
    let device = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let (model, pairs) = (scrambled(&config, 4, &device), Pairs::new());
        let teacher = scrambled(&fixtures::every_kind()[0].1, 5, &device).valid();
        for (beta, temperature, share) in [(0.0, 1.0, 1.0), (0.5, 0.9, 0.7), (1.0, 2.0, 1.0)] {
            let divergence = Divergence { beta, temperature, share };
            let terms = [Term::Distillation { divergence, attention: 0.0 }];
            let objective = Objective { scale: 0.1, terms: &terms };
            let against = Against { reference: None, teacher: Some(Teacher::Model(&teacher)) };
            let last = |model: &CausalLm, device: &Device| model.last_hidden(pairs.rows(), None, device, None);
            let index: Vec<i32> = pairs.targets.iter().map(|target| (*target).max(-1) as i32).collect();
            let index = Tensor::<1, Int>::from_data(TensorData::new(index, [ROWS * SEQ]), &device);
            let lesson = [last(&teacher, &Device::flex()).autodiff(), teacher.head_weight().autodiff()];
            let distance = || {
                let (hidden, head) = (last(&model, &device), model.head_weight());
                lowkey_kernels::reference::diverge_sum(hidden, head, lesson.clone(), index.clone(), divergence)
            };
            let plain = distance();
            let expected = model.take_gradients(&mut (plain.clone() * 0.1).backward());
            for recompute in [Recompute::None, Recompute::Block] {
                let learnt = model.learn(pairs.rows(), objective, against, None, recompute, &device);
                let (told, plain) = (values(learnt.loss.nats)[0], values(plain.clone())[0]);
                assert!((told / plain - 1.0).abs() < 1e-5, "{kind} {divergence:?}: {told} {plain}");
                assert_eq!(learnt.loss.targets, 18);
                assert_gradients(&format!("{kind} {divergence:?}"), &model, learnt.gradients, expected.clone());
            }
            // What the layers' attention gives is learnt beside it, where it is asked for.
            let weight = 0.6;
            let terms = [Term::Distillation { divergence, attention: weight }];
            let objective = Objective { scale: 0.1, terms: &terms };
            let traced = |model: &CausalLm, device: &Device| {
                let mut trace = Trace::default();
                model.last_hidden(pairs.rows(), None, device, Some(&mut trace));
                trace.attn_out
            };
            let asked: Vec<f32> =
                pairs.targets.iter().map(|target| if *target == IGNORE { 0.0 } else { 1.0 }).collect();
            let asked = Tensor::<1>::from_floats(&asked[..], &device).reshape([ROWS, SEQ, 1]);
            let layers = traced(&model, &device).into_iter().zip(traced(&teacher, &Device::flex()));
            let apart = layers.map(|(own, taught)| {
                let taught = taught.autodiff();
                let relative = (own - taught.clone()).square().sum_dim(2) / taught.square().sum_dim(2);
                (relative * asked.clone()).sum()
            });
            let apart = apart.reduce(|sum, more| sum + more).unwrap() / config.layers.len() as f64;
            let whole = distance() + apart.clone() * weight;
            let expected_of_both = model.take_gradients(&mut (whole.clone() * 0.1).backward());
            for recompute in [Recompute::None, Recompute::Block] {
                let learnt = model.learn(pairs.rows(), objective, against, None, recompute, &device);
                let (told, whole) = (values(learnt.loss.nats)[0], values(whole.clone())[0]);
                assert!((told / whole - 1.0).abs() < 1e-5, "{kind} {recompute:?}: {told} {whole}");
                let read: Vec<f32> = learnt.figures.on_device().into_iter().flat_map(values).collect();
                let (told, apart) = (learnt.figures.means(&read, 1)["attention_error"], values(apart.clone())[0]);
                assert!((told / f64::from(apart) - 1.0).abs() < 1e-5, "{kind} {recompute:?}: {told} {apart}");
                assert_gradients(
                    &format!("{kind}, attention, {recompute:?}"),
                    &model,
                    learnt.gradients,
                    expected_of_both.clone(),
                );
            }
            // All of the vocabulary but one token, and that one: the same as all of it.
            let top = teacher.top_tokens(pairs.rows(), config.vocab_size - 1, temperature, &Device::flex());
            let against = Against { reference: None, teacher: Some(Teacher::Top(&top)) };
            let learnt = model.learn(pairs.rows(), objective, against, None, Recompute::None, &device);
            assert_gradients(&format!("{kind} {divergence:?}, top"), &model, learnt.gradients, expected);
        }
    }
}
