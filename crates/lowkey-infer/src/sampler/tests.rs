use super::*;

/// Probabilities 0.4, 0.3, 0.2, 0.1 in a shuffled order, as logits with an offset that no softmax sees.
const PROBABILITIES: [f64; 4] = [0.2, 0.4, 0.1, 0.3];

fn logits() -> Vec<f32> {
    PROBABILITIES.iter().map(|p| (p.ln() + 3.0) as f32).collect()
}

fn random(seed: u64) -> SamplingConfig {
    SamplingConfig { temperature: 1.0, seed, ..SamplingConfig::default() }
}

/// Fractions of each token over many draws from the same logits.
fn frequencies(config: &SamplingConfig, logits: &[f32], history: &[u32]) -> Vec<f64> {
    const DRAWS: usize = 40_000;
    let mut sampler = Sampler::new(config, 0).unwrap();
    let mut counts = vec![0_usize; logits.len()];
    for _ in 0..DRAWS {
        counts[sampler.sample(logits, history).unwrap() as usize] += 1;
    }
    counts.into_iter().map(|count| count as f64 / DRAWS as f64).collect()
}

/// Five standard deviations of a fraction over 40,000 draws are at most 0.0125. What is excluded must never be drawn.
fn assert_drawn(config: &SamplingConfig, expected: [f64; 4]) {
    let total: f64 = expected.iter().sum();
    let found = frequencies(config, &logits(), &[]);
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected / total).abs() < 0.0125, "{found} for {} under {config:?}", expected / total);
        assert!(expected > 0.0 || *found == 0.0, "an excluded token was drawn under {config:?}");
    }
}

#[test]
fn draws_follow_the_probabilities() {
    assert_drawn(&random(1), PROBABILITIES);
}

#[test]
fn temperature_sharpens() {
    let config = SamplingConfig { temperature: 0.5, ..random(2) };
    assert_drawn(&config, PROBABILITIES.map(|p| p * p));
}

#[test]
fn top_k_keeps_the_k_most_probable() {
    assert_drawn(&SamplingConfig { top_k: Some(2), ..random(3) }, [0.0, 0.4, 0.0, 0.3]);
    assert_drawn(&SamplingConfig { top_k: Some(99), ..random(4) }, PROBABILITIES);
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_p() {
    // 0.4 < 0.65 ≤ 0.4 + 0.3 < 0.75 ≤ 0.4 + 0.3 + 0.2
    assert_drawn(&SamplingConfig { top_p: Some(0.65), ..random(5) }, [0.0, 0.4, 0.0, 0.3]);
    assert_drawn(&SamplingConfig { top_p: Some(0.75), ..random(6) }, [0.2, 0.4, 0.0, 0.3]);
    assert_drawn(&SamplingConfig { top_p: Some(1e-9), ..random(7) }, [0.0, 0.4, 0.0, 0.0]);
    assert_drawn(&SamplingConfig { top_p: Some(1.0), ..random(8) }, PROBABILITIES);
}

#[test]
fn top_p_measures_the_mass_that_top_k_left() {
    // Of 0.4, 0.3, 0.2 the first two hold 0.78, so 0.75 is reached without the third.
    let config = SamplingConfig { top_k: Some(3), top_p: Some(0.75), ..random(9) };
    assert_drawn(&config, [0.0, 0.4, 0.0, 0.3]);
}

#[test]
fn min_p_is_relative_to_the_largest() {
    assert_drawn(&SamplingConfig { min_p: Some(0.45), ..random(10) }, [0.2, 0.4, 0.0, 0.3]);
    assert_drawn(&SamplingConfig { min_p: Some(1.0), ..random(11) }, [0.0, 0.4, 0.0, 0.0]);
}

#[test]
fn equal_logits_at_the_edge_of_top_k_go_to_the_lowest_ids() {
    let config = SamplingConfig { top_k: Some(2), ..random(12) };
    let found = frequencies(&config, &[1.0, 1.0, 1.0, 1.0], &[]);
    assert!(found[0] > 0.4 && found[1] > 0.4 && found[2..] == [0.0, 0.0], "{found:?}");
}

#[test]
fn greedy_takes_the_lowest_of_equal_ids() {
    let mut greedy = Sampler::new(&SamplingConfig::default(), 0).unwrap();
    assert_eq!(greedy.sample(&[-1.0, 2.0, 0.5, 2.0], &[]).unwrap(), 1);
    assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -7.0], &[]).unwrap(), 1);
}

#[test]
fn the_penalty_divides_positive_and_multiplies_negative_logits_once() {
    let config = SamplingConfig { repetition_penalty: 2.0, ..SamplingConfig::default() };
    let mut greedy = Sampler::new(&config, 0).unwrap();
    // 3 → 1.5, once, although it occurred twice: still above 1.4, no longer above 1.6.
    assert_eq!(greedy.sample(&[3.0, 1.4], &[0, 0]).unwrap(), 0);
    assert_eq!(greedy.sample(&[3.0, 1.6], &[0, 0]).unwrap(), 1);
    // −1 → −2.
    assert_eq!(greedy.sample(&[-1.0, -1.9], &[0]).unwrap(), 1);
    assert_eq!(greedy.sample(&[-1.0, -2.1], &[0]).unwrap(), 0);
    // The probability of a penalised token, exactly: logits ln 4 / 2 = ln 2 against 0.
    let config = SamplingConfig { repetition_penalty: 2.0, ..random(13) };
    let found = frequencies(&config, &[4f32.ln(), 0.0], &[0]);
    assert!((found[0] - 2.0 / 3.0).abs() < 0.0125, "{found:?}");
}

#[test]
fn a_seed_fixes_the_draws_and_a_stream_changes_them() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
    let draw = |seed, stream| -> Vec<u32> {
        let config = SamplingConfig { top_k: Some(50), top_p: Some(0.95), ..random(seed) };
        let mut sampler = Sampler::new(&config, stream).unwrap();
        (0..40).map(|_| sampler.sample(&logits, &[]).unwrap()).collect()
    };
    assert_eq!(draw(7, 0), draw(7, 0));
    assert_ne!(draw(7, 0), draw(8, 0));
    assert_ne!(draw(7, 0), draw(7, 1));
}

#[test]
fn a_setting_out_of_range_is_named_with_its_value() {
    let base = SamplingConfig::default;
    let bad = [
        ("temperature", "-0.5", SamplingConfig { temperature: -0.5, ..base() }),
        ("temperature", "NaN", SamplingConfig { temperature: f64::NAN, ..base() }),
        ("top_k", "0", SamplingConfig { top_k: Some(0), ..base() }),
        ("top_p", "0", SamplingConfig { top_p: Some(0.0), ..base() }),
        ("top_p", "1.5", SamplingConfig { top_p: Some(1.5), ..base() }),
        ("top_p", "NaN", SamplingConfig { top_p: Some(f64::NAN), ..base() }),
        ("min_p", "-0.1", SamplingConfig { min_p: Some(-0.1), ..base() }),
        ("repetition_penalty", "0", SamplingConfig { repetition_penalty: 0.0, ..base() }),
        ("repetition_penalty", "inf", SamplingConfig { repetition_penalty: f64::INFINITY, ..base() }),
    ];
    for (name, text, config) in bad {
        match Sampler::new(&config, 0) {
            Err(Error::Setting { field, value, .. }) => assert_eq!((field, value.as_str()), (name, text)),
            other => panic!("{name} = {text}: {other:?}"),
        }
    }
    assert!(SamplingConfig { top_p: Some(1.0), min_p: Some(0.0), top_k: Some(1), ..base() }.check().is_ok());
}

#[test]
fn logits_that_give_no_probability_are_an_error() {
    for config in [SamplingConfig::default(), random(0)] {
        let mut sampler = Sampler::new(&config, 0).unwrap();
        assert!(matches!(sampler.sample(&[0.0, f32::NAN], &[]), Err(Error::Logit { token: 1, .. })));
        assert!(matches!(sampler.sample(&[f32::INFINITY, 0.0], &[]), Err(Error::Logit { token: 0, .. })));
        let masked = [f32::NEG_INFINITY; 3];
        assert!(matches!(sampler.sample(&masked, &[]), Err(Error::NoCandidate { vocab_size: 3 })));
        assert!(matches!(sampler.sample(&[], &[]), Err(Error::NoCandidate { vocab_size: 0 })));
    }
}

#[test]
fn a_very_low_temperature_is_greedy_and_a_masked_token_never_comes() {
    let config = SamplingConfig { temperature: 1e-300, ..random(14) };
    assert_eq!(frequencies(&config, &[0.5, 0.5001, f32::NEG_INFINITY], &[])[1], 1.0);
    let config = SamplingConfig { temperature: 1e300, ..random(15) };
    assert_eq!(frequencies(&config, &[0.0, 9.0, f32::NEG_INFINITY], &[])[2], 0.0);
}
