use lowkey_model::objective::preference::{Preference, PreferenceLoss};

use super::*;
use crate::run_config::tests::{load, minimal, refusal};

fn with(objective: &str) -> String {
    minimal() + "[[objective]]\n" + objective
}

const DISTILLATION: &str = "kind = \"distillation\"\nteacher = \"some/model\"\n";
const PREFERENCE: &str = "kind = \"preference\"\nreference = \"some/model\"\n";

#[test]
fn without_a_word_the_next_token_is_learnt() {
    for text in [minimal(), with("kind = \"next_token\"")] {
        let config = load(&text, &["training.z_loss=1e-4"]).unwrap();
        assert_eq!(config.first_term(), Term::Next { z_loss: 1e-4 });
        assert!(config.other_model().is_none() && !config.prefers());
    }
    assert!(!load(&minimal(), &[]).unwrap().to_toml().unwrap().contains("objective"));
}

#[test]
fn losses_come_alone_or_as_a_list_with_weights() {
    let config = load(&with(PREFERENCE), &[]).unwrap();
    let expected = Preference {
        losses: vec![(PreferenceLoss::Sigmoid, 1.0)],
        beta: 0.1,
        label_smoothing: 0.0,
        gamma: 0.5,
        cpo_alpha: 1.0,
    };
    assert_eq!(config.first_term(), Term::Preference(expected));
    assert_eq!(config.other_model().unwrap().dir, Path::new("some/model"));
    let several =
        "loss_type = [\"sigmoid\", \"robust\"]\nloss_weights = [0.8, 0.2]\nlabel_smoothing = 0.1\nbeta = 0.3\n";
    let config = load(&with(&format!("{PREFERENCE}{several}")), &[]).unwrap();
    let Term::Preference(found) = config.first_term() else { panic!("a preference") };
    assert_eq!(found.losses, [(PreferenceLoss::Sigmoid, 0.8), (PreferenceLoss::Robust, 0.2)]);
    assert_eq!((found.beta, found.label_smoothing), (0.3, 0.1));
    // Written out, it reads back the same.
    let written = config.to_toml().unwrap();
    assert_eq!(load(&written, &[]).unwrap().objective, config.objective);
    let free = load(&with("kind = \"preference\"\nloss_type = \"simpo\"\ncpo_alpha = 0.0\n"), &[]).unwrap();
    assert!(free.other_model().is_none() && free.prefers());
}

#[test]
fn the_reference_is_the_model_that_a_run_starts_from() {
    let model = format!("[model]{}", crate::fixtures::MODEL);
    let text = with("kind = \"preference\"\n").replace(&model, "[init]\nfrom = \"a/model\"\n");
    let config = load(&text, &[]).unwrap();
    assert_eq!(config.other_model().unwrap().dir, Path::new("a/model"));
    // Beside an adapter it is there already, unless parts of it are trained whole.
    let is_base = |more: &str| {
        let config = load(&format!("{text}{more}"), &[]).unwrap();
        config.other_is_base(config.adapter.as_ref())
    };
    let adapter = "\n[adapter]\ntarget_modules = \"all-linear\"\n";
    assert!(is_base(adapter) && !is_base(""));
    assert!(!is_base(&format!("{adapter}modules_to_save = [\"norm\"]\n")));
    assert!(!is_base(&format!("\nreference = \"b/model\"\n{adapter}")));
}

#[test]
fn what_does_not_go_together_is_refused_with_the_mend() {
    let preference = |more: &str| with(&format!("{PREFERENCE}{more}"));
    let distillation = |more: &str| with(&format!("{DISTILLATION}{more}"));
    for (text, overrides, expected) in [
        (with("kind = \"dpo\""), &[][..], "dpo"),
        (preference("gamma = 1.0"), &[], "gamma"),
        (preference("loss_type = \"best\""), &[], "must be sigmoid"),
        (preference("loss_type = []"), &[], "objective.loss_type = []: name a loss"),
        (preference("loss_weights = [1.0, 2.0]"), &[], "has 2 numbers for 1 losses"),
        (preference("loss_weights = [-1.0]"), &[], "must be finite numbers ≥ 0"),
        (preference("beta = 0.0"), &[], "objective.beta = 0: must be a finite number > 0"),
        (preference("label_smoothing = 0.1"), &[], "belongs to loss_type = \"robust\""),
        (preference("loss_type = \"robust\"\nlabel_smoothing = 0.5"), &[], "must lie in 0 ≤ ε < 0.5"),
        (preference("simpo_gamma = 0.1"), &[], "belongs to loss_type = \"simpo\""),
        (preference("loss_type = \"orpo\""), &[], "objective.reference = some/model: simpo and orpo"),
        (with("kind = \"preference\""), &[], "objective.reference = (absent)"),
        (preference(""), &["training.batch_size=7"], "training.batch_size = 7: must be even"),
        (preference(""), &["training.batch_size=6", "run.devices=[\"cpu\", \"cpu\"]"], "must be a multiple of 4"),
        (preference(""), &["training.micro_batch_size=3"], "training.micro_batch_size = 3: must be even"),
        (preference(""), &["training.z_loss=1e-4"], "training.z_loss = 0.0001"),
        (distillation(""), &["training.z_loss=1e-4"], "training.z_loss = 0.0001"),
        (distillation("beta = 1.5"), &[], "objective.beta = 1.5: must lie between 0 and 1"),
        (distillation("share = -0.1"), &[], "objective.share = -0.1"),
        (distillation("temperature = 0.0"), &[], "objective.temperature = 0"),
        (distillation("top_k = 0"), &[], "objective.top_k = 0"),
        (distillation("cache = \"kept\""), &[], "write top_k = 64"),
        (distillation("attention_weight = -1.0"), &[], "objective.attention_weight = -1: must be a finite number"),
        (distillation("attention_weight = 0.5\ntop_k = 4"), &[], "with top_k only what it predicts is asked"),
        (with(DISTILLATION) + "[[objective]]\n" + PREFERENCE, &[], "a run has one"),
    ] {
        let message = refusal(&text, overrides);
        assert!(message.contains(expected), "{message} lacks {expected}");
    }
}
