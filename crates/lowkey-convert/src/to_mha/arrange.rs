//! Where the numbers of a head lie, and by which frequencies its pairs turn.

use lowkey_model::ModelConfig;
use lowkey_model::rope::{RopeConfig, RopeType};

/// By what the frequency of a pair is divided that does not turn: in a million tokens it turns by less than what 64 bits tell from
/// nothing. A power of two, about 10²⁵, which times the largest base of a rotation is still a number of 32 bits.
const STILL: f64 = (1u128 << 83) as f64;

/// Frequencies whose ratio is this near to 1 are the same.
const SAME: f64 = 1e-12;

/// The places of a head's numbers. Pair i of a head are its numbers i and i + D/2.
#[derive(Clone, Debug)]
pub(crate) struct Arrangement {
    /// D, an even number.
    pub(crate) width: usize,
    /// The pair of each frequency that turns.
    pub(crate) turning: Vec<usize>,
    /// The place of each number that does not.
    pub(crate) still: Vec<usize>,
    /// The rotation; none where it is that of the model.
    pub(crate) rope: Option<RopeConfig>,
}

/// A head for pairs that turn with `frequencies`, the fastest first, `still` numbers that do not, and values of `value` numbers.
pub(crate) fn arrange(config: &ModelConfig, frequencies: &[f64], still: usize, value: usize) -> Arrangement {
    let pairs = frequencies.len();
    let width = (2 * pairs + still).max(value).max(2).next_multiple_of(2);
    let same = |a: f64, b: f64| (a - b).abs() <= SAME * b.abs();
    let own = config.rope.inverse_frequencies(width, config.max_position_embeddings);
    // LongRoPE's divisors go with a width, which is another one here.
    let kept = config.rope.rope_type != RopeType::Longrope || width == config.rotary_dim();
    if kept && 2 * pairs == width && own.iter().zip(frequencies).all(|(own, wanted)| same(*own, *wanted)) {
        return Arrangement { width, turning: (0..pairs).collect(), still: Vec::new(), rope: None };
    }
    let plain = RopeConfig { rope_theta: config.rope.rope_theta, ..RopeConfig::default() };
    let plain = plain.inverse_frequencies(width, config.max_position_embeddings);
    let mut divisors = vec![STILL; width / 2];
    let mut free: Vec<usize> = (0..width / 2).collect();
    let mut turning = Vec::with_capacity(pairs);
    for wanted in frequencies {
        // The nearest one: a divisor of 1 where a head of this width has the frequency.
        let far = |i: &usize| (plain[*i] / wanted).ln().abs();
        let Some(place) = (0..free.len()).min_by(|a, b| far(&free[*a]).total_cmp(&far(&free[*b]))) else { break };
        let pair = free.remove(place);
        divisors[pair] = if same(plain[pair], *wanted) { 1.0 } else { plain[pair] / wanted };
        turning.push(pair);
    }
    let still = free.iter().flat_map(|pair| [*pair, pair + width / 2]).take(still).collect();
    let rope = RopeConfig {
        rope_theta: config.rope.rope_theta,
        rope_type: RopeType::Longrope,
        factor: Some(1.0),
        original_max_position_embeddings: Some(config.max_position_embeddings),
        attention_factor: Some(1.0),
        short_factor: Some(divisors.clone()),
        long_factor: Some(divisors),
        ..RopeConfig::default()
    };
    Arrangement { width, turning, still, rope: Some(rope) }
}
