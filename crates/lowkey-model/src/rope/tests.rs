use std::f64::consts::{PI, TAU};

use burn::tensor::Device;

use super::*;
use crate::fixtures::values;

fn yarn(factor: f64, original: usize) -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(factor),
        original_max_position_embeddings: Some(original),
        ..RopeConfig::default()
    }
}

fn close(got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= 1e-12 * e.abs(), "frequency {i}: {g} instead of {e}");
    }
}

/// The published formula, written as the original code has it: two geometric series and a mask between them.
fn published_yarn(theta: f64, dim: usize, factor: f64, low: f64, high: f64) -> Vec<f64> {
    (0..dim / 2)
        .map(|i| {
            let position_frequency = theta.powf(2.0 * i as f64 / dim as f64);
            let (extrapolated, interpolated) = (1.0 / position_frequency, 1.0 / (factor * position_frequency));
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let mask = 1.0 - ramp;
            interpolated * (1.0 - mask) + extrapolated * mask
        })
        .collect()
}

/// The fractional pair index that turns `turns` times within `original` positions.
fn correction(theta: f64, dim: usize, original: f64, turns: f64) -> f64 {
    dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
}

#[test]
fn plain_frequencies_are_geometric() {
    close(&RopeConfig::default().inverse_frequencies(8, 64), &[1.0, 0.1, 0.01, 0.001]);
    assert!(RopeConfig::default().inverse_frequencies(0, 64).is_empty());
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let rope = RopeConfig { rope_type: RopeType::Linear, factor: Some(4.0), ..RopeConfig::default() };
    close(&rope.inverse_frequencies(8, 64), &[0.25, 0.025, 0.0025, 0.00025]);
    assert_eq!(rope.table_factor(), 1.0);
}

#[test]
fn deepseek_v3_ramps_from_pair_10_to_pair_23() {
    // R = 64, θ = 10000, 4096 positions extended 40 times: the bounds that DeepSeek's own code computes.
    assert_eq!(correction(1e4, 64, 4096.0, 32.0).floor(), 10.0);
    assert_eq!(correction(1e4, 64, 4096.0, 1.0).ceil(), 23.0);
    let got =
        RopeConfig { beta_fast: Some(32.0), beta_slow: Some(1.0), ..yarn(40.0, 4096) }.inverse_frequencies(64, 163_840);
    close(&got, &published_yarn(1e4, 64, 40.0, 10.0, 23.0));
    let plain = |i: i32| 10_000f64.powf(-f64::from(i) / 32.0);
    close(&got[..11], &(0..11).map(plain).collect::<Vec<_>>());
    close(&got[23..], &(23..32).map(|i| plain(i) / 40.0).collect::<Vec<_>>());
    close(&got[11..12], &[plain(11) * (12.0 / 13.0 + 1.0 / 13.0 / 40.0)]);
}

#[test]
fn absent_and_zero_betas_mean_32_and_1() {
    let expected =
        RopeConfig { beta_fast: Some(32.0), beta_slow: Some(1.0), ..yarn(8.0, 2048) }.inverse_frequencies(32, 0);
    close(&yarn(8.0, 2048).inverse_frequencies(32, 0), &expected);
    let zero = RopeConfig { beta_fast: Some(0.0), beta_slow: Some(0.0), ..yarn(8.0, 2048) };
    close(&zero.inverse_frequencies(32, 0), &expected);
    let other = RopeConfig { beta_fast: Some(16.0), ..yarn(8.0, 2048) };
    assert_ne!(other.inverse_frequencies(32, 0), expected);
}

#[test]
fn without_truncation_the_bounds_stay_fractional() {
    let (low, high) = (correction(5e4, 48, 1000.0, 20.0), correction(5e4, 48, 1000.0, 2.0));
    assert!(low.fract() > 0.01 && high.fract() > 0.01 && low > 0.0);
    let rope = RopeConfig {
        rope_theta: 5e4,
        beta_fast: Some(20.0),
        beta_slow: Some(2.0),
        truncate: Some(false),
        ..yarn(6.0, 1000)
    };
    close(&rope.inverse_frequencies(48, 0), &published_yarn(5e4, 48, 6.0, low, high));
    let truncated = RopeConfig { truncate: Some(true), ..rope };
    close(&truncated.inverse_frequencies(48, 0), &published_yarn(5e4, 48, 6.0, low.floor(), high.ceil()));
}

#[test]
fn the_upper_bound_is_clamped_to_the_width_less_one_not_to_half_of_it() {
    // 10⁸ positions: the slow bound lies at pair 7.2, beyond the last pair of R = 8 (3) and beyond R − 1 = 7.
    let (low, high) = (correction(1e4, 8, 1e8, 32.0), correction(1e4, 8, 1e8, 1.0));
    assert!(low.floor() == 5.0 && high.ceil() == 8.0);
    let rope = RopeConfig { beta_fast: Some(1e6), ..yarn(10.0, 100_000_000) };
    let low = correction(1e4, 8, 1e8, 1e6).floor();
    assert_eq!(low, 1.0);
    close(&rope.inverse_frequencies(8, 0), &published_yarn(1e4, 8, 10.0, 1.0, 7.0));
    // And the lower one to 0: 10⁹ turns are a negative pair.
    let rope = RopeConfig { beta_fast: Some(1e9), ..rope };
    assert!(correction(1e4, 8, 1e8, 1e9) < 0.0);
    close(&rope.inverse_frequencies(8, 0), &published_yarn(1e4, 8, 10.0, 0.0, 7.0));
}

#[test]
fn equal_bounds_make_a_step() {
    // Six positions: both bounds are negative before the clamp, so that low = high = 0; pair 0 stays, all others shrink.
    assert!(correction(1e4, 8, 6.0, 1.0).ceil() <= 0.0);
    let got = yarn(2.0, 6).inverse_frequencies(8, 0);
    close(&got, &[1.0, 0.05, 0.005, 0.0005]);
    // Fractional bounds, both at pair 2.3: the step is no wider than a thousandth of a pair.
    let turns = 1e4 / TAU / 1e4f64.powf(2.3 / 4.0);
    let rope =
        RopeConfig { beta_fast: Some(turns), beta_slow: Some(turns), truncate: Some(false), ..yarn(2.0, 10_000) };
    assert!((correction(1e4, 8, 1e4, turns) - 2.3).abs() < 1e-12);
    close(&rope.inverse_frequencies(8, 0), &[1.0, 0.1, 0.01, 0.0005]);
}

#[test]
fn an_absent_original_length_is_the_longest_position() {
    let absent = RopeConfig { original_max_position_embeddings: None, ..yarn(4.0, 1) };
    close(&absent.inverse_frequencies(16, 512), &yarn(4.0, 512).inverse_frequencies(16, 9999));
}

#[test]
fn the_factor_on_cosines_follows_its_four_cases() {
    let ln4 = 4f64.ln();
    for (attention_factor, mscale, all, expected) in [
        (None, None, None, 0.1 * ln4 + 1.0),
        (None, Some(1.4), Some(0.6), (0.14 * ln4 + 1.0) / (0.06 * ln4 + 1.0)),
        (None, Some(0.7), Some(0.7), 1.0),
        // Either one alone is ignored, and so is a zero.
        (None, Some(1.4), None, 0.1 * ln4 + 1.0),
        (None, None, Some(0.6), 0.1 * ln4 + 1.0),
        (None, Some(1.4), Some(0.0), 0.1 * ln4 + 1.0),
        (None, Some(0.0), Some(0.6), 0.1 * ln4 + 1.0),
        (Some(0.8), Some(1.4), Some(0.6), 0.8),
    ] {
        let rope = RopeConfig { attention_factor, mscale, mscale_all_dim: all, ..yarn(4.0, 16) };
        let got = rope.table_factor();
        assert!((got - expected).abs() < 1e-15, "{mscale:?} {all:?}: {got} instead of {expected}");
    }
    assert_eq!(yarn(0.5, 16).table_factor(), 1.0, "a factor of at most 1 scales nothing");
    let linear = RopeConfig { rope_type: RopeType::Linear, mscale: Some(2.0), ..yarn(4.0, 16) };
    assert_eq!(linear.table_factor(), 1.0);
}

#[test]
fn the_factor_on_logits_is_the_square_of_mscale_all_dim() {
    let m = 0.1 * 0.707 * 40f64.ln() + 1.0;
    let rope = RopeConfig { mscale: Some(1.0), mscale_all_dim: Some(0.707), ..yarn(40.0, 4096) };
    assert!((rope.logit_factor() - m * m).abs() < 1e-15);
    assert_eq!(RopeConfig { mscale_all_dim: None, ..rope.clone() }.logit_factor(), 1.0);
    assert_eq!(RopeConfig { mscale_all_dim: Some(0.0), ..rope.clone() }.logit_factor(), 1.0);
    assert_eq!(RopeConfig { factor: Some(1.0), ..rope.clone() }.logit_factor(), 1.0);
    assert_eq!(RopeConfig { rope_type: RopeType::Default, ..rope.clone() }.logit_factor(), 1.0);
    // transformers applies it under every other type as well.
    assert!((RopeConfig { rope_type: RopeType::Linear, ..rope }.logit_factor() - m * m).abs() < 1e-15);
}

#[test]
fn llama3_keeps_fast_frequencies_divides_slow_ones_and_ramps_between() {
    let rope = RopeConfig {
        rope_theta: 500_000.0,
        rope_type: RopeType::Llama3,
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        ..yarn(8.0, 8192)
    };
    let mut branches = [0; 3];
    let expected: Vec<f64> = (0..64)
        .map(|i| {
            let frequency = 500_000f64.powf(-f64::from(i) / 64.0);
            let wavelength = TAU / frequency;
            if wavelength < 8192.0 / 4.0 {
                branches[0] += 1;
                frequency
            } else if wavelength > 8192.0 / 1.0 {
                branches[1] += 1;
                frequency / 8.0
            } else {
                branches[2] += 1;
                let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                (1.0 - smooth) * frequency / 8.0 + smooth * frequency
            }
        })
        .collect();
    assert!(branches.iter().all(|n| *n > 3), "{branches:?}");
    close(&rope.inverse_frequencies(128, 131_072), &expected);
    assert_eq!(rope.table_factor(), 1.0);
}

#[test]
fn tables_far_from_zero_are_as_exact_as_f32_can_say() {
    let rope = RopeConfig { mscale: Some(1.4), mscale_all_dim: Some(0.6), ..yarn(4.0, 4096) };
    let positions = vec![vec![0, 99_999, 100_000], vec![5, 6, 1_000_003]];
    let (frequencies, factor) = (rope.inverse_frequencies(16, 4096), rope.table_factor());
    let table = RopeTable::new(&frequencies, factor, &positions, &Device::flex());
    assert_eq!(table.cos.dims(), [2, 3, 1, 8]);
    let angles: Vec<f64> = positions
        .iter()
        .flatten()
        .flat_map(|p| frequencies.iter().map(|f| *p as f64 * f).collect::<Vec<_>>())
        .collect();
    for (got, angle) in values(table.cos).iter().zip(&angles) {
        assert!((f64::from(*got) - factor * angle.cos()).abs() < 1e-7, "cos {angle}");
    }
    for (got, angle) in values(table.sin).iter().zip(&angles) {
        assert!((f64::from(*got) - factor * angle.sin()).abs() < 1e-7, "sin {angle}");
    }
}

#[test]
fn a_table_without_columns_or_rows_is_no_error() {
    assert_eq!(RopeTable::new(&[], 1.0, &[vec![0, 1, 2]], &Device::flex()).cos.dims(), [1, 3, 1, 0]);
}

#[test]
fn every_rule_names_its_key() {
    let scaled = |rope_type| RopeConfig { rope_type, ..yarn(4.0, 16) };
    let llama3 = RopeConfig { low_freq_factor: Some(1.0), high_freq_factor: Some(4.0), ..scaled(RopeType::Llama3) };
    assert!(llama3.check(8, 64).is_ok() && scaled(RopeType::Yarn).check(8, 64).is_ok());
    let bad = [
        ("rope_theta", RopeConfig { rope_theta: 0.0, ..RopeConfig::default() }),
        ("rope_theta", RopeConfig { rope_theta: f64::NAN, ..RopeConfig::default() }),
        ("rope_theta", RopeConfig { rope_theta: 1.0, ..scaled(RopeType::Yarn) }),
        ("rope_theta", RopeConfig { factor: Some(1e-320), ..scaled(RopeType::Linear) }),
        ("rope_parameters.factor", RopeConfig { factor: None, ..scaled(RopeType::Linear) }),
        // No type uses it, and still it means nothing.
        ("rope_parameters.factor", RopeConfig { factor: Some(0.0), ..RopeConfig::default() }),
        ("rope_parameters.factor", RopeConfig { factor: Some(f64::NAN), ..RopeConfig::default() }),
        ("rope_parameters.factor", RopeConfig { factor: Some(-1.0), ..scaled(RopeType::Yarn) }),
        (
            "rope_parameters.original_max_position_embeddings",
            RopeConfig { original_max_position_embeddings: Some(0), ..scaled(RopeType::Yarn) },
        ),
        ("rope_parameters.beta_fast", RopeConfig { beta_fast: Some(-1.0), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.beta_slow", RopeConfig { beta_slow: Some(f64::INFINITY), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.mscale", RopeConfig { mscale: Some(-0.5), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.mscale_all_dim", RopeConfig { mscale_all_dim: Some(f64::NAN), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.attention_factor", RopeConfig { attention_factor: Some(-1.0), ..scaled(RopeType::Yarn) }),
        // Each finite, and too much together or for an f32.
        ("rope_parameters.mscale", RopeConfig { mscale_all_dim: Some(1e300), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.mscale", RopeConfig { attention_factor: Some(1e39), ..scaled(RopeType::Yarn) }),
        ("rope_parameters.low_freq_factor", RopeConfig { low_freq_factor: None, ..llama3.clone() }),
        ("rope_parameters.high_freq_factor", RopeConfig { high_freq_factor: Some(0.0), ..llama3.clone() }),
        ("rope_parameters.high_freq_factor", RopeConfig { high_freq_factor: Some(1.0), ..llama3 }),
    ];
    for (key, rope) in bad {
        match rope.check(8, 64) {
            Err(Error::Config { key: got, .. } | Error::MissingKey { key: got, .. }) => {
                assert_eq!(got, key, "{rope:?}");
            }
            other => panic!("{rope:?}: {other:?}"),
        }
    }
}

#[test]
fn longrope_divides_each_frequency_by_its_own_number() {
    let divisors = Some(vec![1.0, 2.0, 4.0, 8e24]);
    let mut rope = RopeConfig {
        rope_type: RopeType::Longrope,
        original_max_position_embeddings: Some(64),
        short_factor: divisors.clone(),
        long_factor: divisors,
        ..RopeConfig::default()
    };
    close(&rope.inverse_frequencies(8, 64), &[1.0, 0.05, 0.0025, 1.25e-28]);
    assert!(rope.check(8, 64).is_ok() && rope.check(8, 256).is_ok());
    // The factor of the lengths, as files without one mean it: √(1 + ln 4 / ln 64).
    assert_eq!(rope.table_factor(), 1.0);
    rope.settle(256);
    assert!((rope.table_factor() - (4f64 / 3.0).sqrt()).abs() < 1e-12);
    let given = RopeConfig { attention_factor: Some(0.5), ..rope.clone() };
    assert_eq!(given.table_factor(), 0.5);
    let message = |rope: &RopeConfig, longest| rope.check(8, longest).unwrap_err().to_string();
    let other = RopeConfig { long_factor: Some(vec![3.0; 4]), ..rope.clone() };
    assert!(other.check(8, 64).is_ok());
    assert!(message(&other, 65).contains("beyond 64 tokens"));
    for (wrong, fragment) in [
        (RopeConfig { short_factor: None, ..rope.clone() }, "short_factor is missing"),
        (RopeConfig { long_factor: Some(vec![1.0; 3]), ..rope.clone() }, "each of the 4 rotated pairs"),
        (RopeConfig { long_factor: Some(vec![1.0, 0.0, 1.0, 1.0]), ..rope.clone() }, "finite numbers > 0"),
    ] {
        assert!(message(&wrong, 64).contains(fragment), "{}", message(&wrong, 64));
    }
}
