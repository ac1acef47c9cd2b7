//! Steps on pairs of answers, and what is kept of another model.

use lowkey_model::Recompute;
use lowkey_model::objective::Term;
use lowkey_model::objective::preference::{Preference, PreferenceLoss};

use super::*;
use crate::fixtures::{Lcg, bits, model, passes, replica, weight_bits};
use crate::run_config::OptimizerKind;
use crate::step::StepSettings;
use crate::workers::{PassSettings, Workers};
use crate::world::World;

const VOCAB: usize = 29;
const SEQ: usize = 11;

/// Prompts of three tokens; the chosen answer repeats an even token, the rejected one an odd one.
fn pairs(rows: usize, seed: u64) -> lowkey_batch::Batch {
    let mut random = Lcg(seed);
    let mut batch = lowkey_batch::Batch { rows, seq_len: SEQ, pairs: true, ..lowkey_batch::Batch::default() };
    for row in 0..rows {
        let (length, token) = (2 + random.below(5), 2 * random.below(VOCAB / 2) + row % 2);
        for at in 0..SEQ {
            batch.input_ids.push(if at < 3 { at as u32 } else { token as u32 });
            batch.targets.push(if (2..2 + length).contains(&at) { token as i64 } else { IGNORE });
            batch.document_starts.push(0);
        }
    }
    batch
}

fn terms(loss: PreferenceLoss) -> [Term; 1] {
    let losses = vec![(loss, 1.0)];
    [Term::Preference(Preference { losses, beta: 0.5, label_smoothing: 0.1, gamma: 0.5, cpo_alpha: 1.0 })]
}

fn counterpart(kept: Option<Arc<Kept>>, asked: Asked) -> Counterpart {
    let device = Device::flex();
    let model = model(VOCAB, 16, 5, &device.clone().autodiff()).valid();
    Counterpart { model, device, asked, kept, precision: Precision::F32 }
}

#[test]
fn pairs_stay_together_however_a_step_is_divided() {
    let device = Device::flex().autodiff();
    // Another seed than the reference's.
    let (model, batch, terms) = (model(VOCAB, 16, 6, &device), pairs(12, 1), terms(PreferenceLoss::SigmoidNorm));
    let reference = counterpart(None, Asked::Rows);
    let step = |threads: usize, micro_batch: usize, recompute: Recompute| {
        let settings = PassSettings { terms: &terms, other: Some(&reference), recompute, ..passes(micro_batch) };
        Workers::new(threads, micro_batch).unwrap().gradients(&model, &batch, settings, &device)
    };
    let whole = step(1, 12, Recompute::None);
    let figures = whole.figures.means(&[], 6);
    assert_eq!(whole.targets, 6);
    let judge = |rows| {
        let Term::Preference(preference) = &terms[0] else { unreachable!() };
        let (sums, tokens) = model.valid().row_log_probs(rows, &Device::flex());
        preference.judge_rows(&sums, &tokens, Some(&reference.measures(rows))).1
    };
    let judged = judge(batch.all());
    assert!((whole.loss().unwrap() - judged.mean_loss()).abs() < 1e-6);
    assert_eq!((judged.pairs, judged.preferred as f64 / 6.0), (6, figures["rewards/accuracies"]));
    for (threads, micro_batch, recompute) in
        [(1, 2, Recompute::None), (2, 12, Recompute::None), (3, 8, Recompute::Block), (5, 4, Recompute::None)]
    {
        let found = step(threads, micro_batch, recompute);
        let case = format!("{threads} threads, passes of {micro_batch}");
        assert!((found.loss().unwrap() - whole.loss().unwrap()).abs() < 1e-6, "{case}");
        let told = found.figures.means(&[], found.targets);
        assert_eq!((found.targets, told["rewards/accuracies"]), (6, figures["rewards/accuracies"]), "{case}");
        assert!(told.keys().eq(figures.keys()), "{case}");
        assert!(told.values().zip(figures.values()).all(|(a, b)| (a - b).abs() < 1e-5), "{case}: {told:?} {figures:?}");
        for (found, expected) in found.gradients.iter().zip(&whole.gradients) {
            let (found, expected) = (crate::fixtures::values(found), crate::fixtures::values(expected));
            let size = expected.iter().fold(1e-4f32, |m, x| m.max(x.abs()));
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-4 * size), "{case}");
        }
    }
}

#[test]
fn a_run_on_pairs_begins_at_ln_2_and_learns_which_answer_was_chosen() {
    for members in [1, 2] {
        let member = || {
            let mut replica = replica(OptimizerKind::AdamW);
            replica.other = Some(counterpart(None, Asked::Rows));
            replica
        };
        let mut world = World::new(member(), (1..members).map(|_| member()).collect());
        let terms = terms(PreferenceLoss::Sigmoid);
        let settings = StepSettings { passes: PassSettings { terms: &terms, ..passes(4) }, grad_clip: Some(1.0) };
        let mut seen = Vec::new();
        for step in 0..30 {
            let taken = settings.step(&mut world, &pairs(8, step), step, 1e-2, None).unwrap();
            seen.push(taken.wait(&world.main().model).unwrap());
        }
        assert_eq!(seen[0].loss, f64::from(std::f32::consts::LN_2), "{members} members");
        let last = seen.last().unwrap();
        assert!(last.loss < 0.3 && last.named["rewards/accuracies"] == 1.0, "{members} members: {last:?}");
        assert!(world.agree());
    }
}

#[test]
fn what_is_kept_changes_nothing_and_is_asked_once() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Some(Arc::new(Kept::open(dir.path(), "a").unwrap()));
    let batch = pairs(4, 3);
    let live = counterpart(None, Asked::Rows).measures(batch.all());
    let first = counterpart(open(), Asked::Rows);
    assert_eq!(first.measures(batch.all()), live);
    first.in_order().unwrap();
    drop(first);
    // A model of other weights, which is not asked.
    let mut second = counterpart(open(), Asked::Rows);
    second.model = model(VOCAB, 16, 9, &Device::flex().autodiff()).valid();
    assert_eq!(second.measures(batch.all()), live);
    assert_ne!(second.measures(pairs(4, 4).all()), live);
}

#[test]
fn likeliest_tokens_are_the_same_whether_they_were_kept_or_computed() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Some(Arc::new(Kept::open(dir.path(), "top").unwrap()));
    let (batch, asked) = (pairs(4, 3), Asked::Tokens { top_k: Some(5), temperature: 1.5 });
    let top = |counterpart: &Counterpart| match counterpart.says(batch.all()) {
        Said::Top(top) => top,
        other => panic!("{other:?}"),
    };
    let live = top(&counterpart(None, asked));
    let computed = top(&counterpart(open(), asked));
    let mut second = counterpart(open(), asked);
    second.model = model(VOCAB, 16, 9, &Device::flex().autodiff()).valid();
    assert_eq!(top(&second), computed);
    assert_eq!(live.ids, computed.ids);
    for (live, kept) in live.log_probs.iter().zip(&computed.log_probs) {
        assert!((live - kept).abs() < 2e-3 * live.abs().max(1.0), "{live} {kept}");
    }
    for row in computed.log_probs.chunks(6) {
        assert!((row.iter().map(|x| x.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn bytes_that_are_no_such_tokens_are_not_taken_for_some() {
    let top = TopTokens { k: 2, ids: vec![3, 1, 0, 2], log_probs: vec![-0.5, -1.5, -2.0, -0.1, -3.0, -4.0] };
    let bytes = packed(&top, 0..2);
    assert_eq!(bytes.len(), 2 * (6 * 2 + 2));
    assert_eq!(unpacked(&bytes, 2, 2, 4).unwrap().ids, top.ids);
    assert_eq!(unpacked(&packed(&top, 1..2), 2, 1, 4).unwrap().ids, [0, 2]);
    assert_eq!(unpacked(&bytes, 2, 1, 4), None);
    assert_eq!(unpacked(&bytes[1..], 2, 2, 4), None);
    assert_eq!(unpacked(&bytes, 2, 2, 3), None, "a token that the vocabulary lacks");
    let mut wrong = bytes.clone();
    wrong[17..20].fill(0xff);
    assert_eq!(unpacked(&wrong, 2, 2, 4), None, "what is no number");
}

#[test]
fn a_step_from_a_teacher_is_the_same_for_any_weights_that_were_kept() {
    let dir = tempfile::tempdir().unwrap();
    let asked = Asked::Tokens { top_k: Some(8), temperature: 1.0 };
    let terms = [Term::Distillation {
        divergence: lowkey_model::objective::Divergence { beta: 0.0, temperature: 1.0, share: 0.5 },
        attention: 0.0,
    }];
    let train = || {
        let mut replica = replica(OptimizerKind::AdamW);
        replica.other = Some(counterpart(Some(Arc::new(Kept::open(dir.path(), "t").unwrap())), asked));
        let mut world = World::new(replica, Vec::new());
        let settings = StepSettings { passes: PassSettings { terms: &terms, ..passes(4) }, grad_clip: Some(1.0) };
        for step in 0..3 {
            settings.step(&mut world, &pairs(4, step), step, 1e-2, None).unwrap();
        }
        (weight_bits(&world.main().model), bits(&world.gradients(&pairs(4, 9), settings.passes).unwrap()[0].gradients))
    };
    assert!(train() == train());
}
