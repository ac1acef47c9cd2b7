//! The losses against torch's (`tests/reference/objectives.py`), against differences, and where they start.

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    loss_type: PreferenceLoss,
    /// beta, label smoothing, gamma, factor on the loss of the chosen answer
    setting: [f64; 4],
    tokens: [usize; 2],
    policy: [f64; 2],
    reference: [f64; 2],
    loss: f64,
    slopes: [f64; 2],
}

#[derive(Deserialize)]
struct Cases {
    pairs: Vec<Case>,
}

fn cases() -> Vec<Case> {
    let text = include_str!("../../../../../tests/reference/objectives.json");
    serde_json::from_str::<Cases>(text).unwrap().pairs
}

fn alone(loss: PreferenceLoss, [beta, label_smoothing, gamma, cpo_alpha]: [f64; 4]) -> Preference {
    Preference { losses: vec![(loss, 1.0)], beta, label_smoothing, gamma, cpo_alpha }
}

impl Case {
    fn answers(&self) -> [Answer; 2] {
        [0, 1].map(|i| Answer { log_p: self.policy[i], reference: self.reference[i], tokens: self.tokens[i] })
    }
}

fn close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1e-3), "{what}: {found} for {expected}");
}

#[test]
fn losses_and_slopes_are_those_of_torch() {
    let cases = cases();
    for loss in PreferenceLoss::ALL {
        assert!(cases.iter().filter(|case| case.loss_type == loss).count() >= 6, "{loss:?}");
    }
    for case in cases {
        let [chosen, rejected] = case.answers();
        let judged = alone(case.loss_type, case.setting).judge(chosen, rejected);
        let what = format!("{:?} {:?}", case.loss_type, case.setting);
        close(judged.loss, case.loss, &what);
        close(judged.chosen, case.slopes[0], &what);
        close(judged.rejected, case.slopes[1], &what);
    }
}

#[test]
fn slopes_are_those_of_differences() {
    for case in cases() {
        let preference = alone(case.loss_type, case.setting);
        let [chosen, rejected] = case.answers();
        let judged = preference.judge(chosen, rejected);
        let moved = |answer: Answer, by: f64| Answer { log_p: answer.log_p + by, ..answer };
        let step = 1e-5;
        let slope = |of: &dyn Fn(f64) -> f64| (of(step) - of(-step)) / (2.0 * step);
        let of_chosen = slope(&|by| preference.judge(moved(chosen, by), rejected).loss);
        let of_rejected = slope(&|by| preference.judge(chosen, moved(rejected, by)).loss);
        for (found, expected) in [(judged.chosen, of_chosen), (judged.rejected, of_rejected)] {
            assert!(
                (found - expected).abs() < 1e-6 * expected.abs().max(1.0),
                "{:?}: {found} {expected}",
                case.loss_type
            );
        }
    }
}

#[test]
fn a_model_that_is_its_reference_begins_at_the_known_losses() {
    for beta in [0.01, 0.1, 0.3, 2.0] {
        let answer = |log_p: f64, tokens| Answer { log_p, reference: log_p, tokens };
        let begin = |loss| alone(loss, [beta, 0.1, 0.5, 1.0]).judge(answer(-41.7, 9), answer(-3.3, 4)).loss;
        for loss in [PreferenceLoss::Sigmoid, PreferenceLoss::SigmoidNorm] {
            assert_eq!(begin(loss), std::f64::consts::LN_2, "{loss:?}");
        }
        assert_eq!(begin(PreferenceLoss::Ipo), (0.5 / beta) * (0.5 / beta));
        assert_eq!(begin(PreferenceLoss::Hinge), 1.0);
        close(begin(PreferenceLoss::Robust), std::f64::consts::LN_2, "robust");
    }
}

#[test]
fn a_list_is_the_weighted_sum_of_its_losses() {
    let case = &cases()[0];
    let [chosen, rejected] = case.answers();
    let losses: Vec<(PreferenceLoss, f64)> =
        PreferenceLoss::ALL.into_iter().enumerate().map(|(i, loss)| (loss, 0.3 + i as f64)).collect();
    let all = Preference { losses: losses.clone(), beta: 0.2, label_smoothing: 0.1, gamma: 0.5, cpo_alpha: 1.0 };
    let judged = all.judge(chosen, rejected);
    let one = |loss| alone(loss, [0.2, 0.1, 0.5, 1.0]).judge(chosen, rejected);
    let sum = |of: &dyn Fn(Judged) -> f64| losses.iter().map(|(loss, weight)| weight * of(one(*loss))).sum::<f64>();
    close(judged.loss, sum(&|one| one.loss), "loss");
    close(judged.chosen, sum(&|one| one.chosen), "chosen");
    close(judged.rejected, sum(&|one| one.rejected), "rejected");
    assert!(all.needs_reference());
    assert!(!alone(PreferenceLoss::Simpo, [0.2, 0.1, 0.5, 1.0]).needs_reference());
}

#[test]
fn nothing_overflows_at_the_edges() {
    for loss in PreferenceLoss::ALL {
        for (chosen, rejected) in [(0.0, -1e30), (-1e30, 0.0), (0.0, 0.0), (-1e-300, -1e4), (-1e4, -1e-300)] {
            let answer = |log_p| Answer { log_p, reference: -5.0, tokens: 3 };
            let judged = alone(loss, [0.1, 0.1, 0.5, 1.0]).judge(answer(chosen), answer(rejected));
            // The square of 1e30 is still a number.
            let all = [judged.loss, judged.chosen, judged.rejected];
            assert!(all.iter().all(|x| x.is_finite()), "{loss:?} {chosen} {rejected}: {all:?}");
        }
    }
    let empty = Answer { log_p: 0.0, reference: 0.0, tokens: 0 };
    let judged = alone(PreferenceLoss::SigmoidNorm, [0.1, 0.1, 0.5, 1.0]).judge(empty, empty);
    assert_eq!(judged.loss, std::f64::consts::LN_2);
}

#[test]
fn rows_are_judged_in_pairs_and_their_figures_are_means() {
    let preference = alone(PreferenceLoss::Sigmoid, [0.5, 0.0, 0.5, 1.0]);
    let (sums, tokens) = ([-3.0, -5.0, -8.0, -2.0], [2, 3, 4, 1]);
    let reference = [-4.0, -5.0, -7.0, -3.0];
    let (slopes, figures) = preference.judge_rows(&sums, &tokens, Some(&reference));
    // σ(−β Δ) with Δ = 1 − 0 and −1 − 1.
    let slope = |margin: f64| 0.5 / (1.0 + (0.5 * margin).exp());
    for (found, expected) in slopes.iter().zip([-slope(1.0), slope(1.0), -slope(-2.0), slope(-2.0)]) {
        close(*found, expected, "slope");
    }
    let expected = [
        ("rewards/chosen", 0.0),
        ("rewards/rejected", 0.25),
        ("rewards/accuracies", 0.5),
        ("rewards/margins", -0.25),
        ("logps/chosen", -5.5),
        ("logps/rejected", -3.5),
    ];
    let told = Figures::from(figures).means(&[], figures.pairs);
    assert_eq!(told, expected.map(|(name, mean)| (name.to_owned(), mean)).into());
    close(figures.mean_loss(), ((-0.5f64).exp().ln_1p() + 1f64.exp().ln_1p()) / 2.0, "loss");
    // Without a reference, of means.
    let free = alone(PreferenceLoss::Simpo, [2.0, 0.0, 0.5, 1.0]);
    let (_, figures) = free.judge_rows(&sums, &tokens, None);
    let told = Figures::from(figures).means(&[], 2);
    assert_eq!((told["logps/chosen"], told["rewards/chosen"]), ((-1.5 - 2.0) / 2.0, -3.5));
}
