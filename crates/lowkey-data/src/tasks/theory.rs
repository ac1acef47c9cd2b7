//! What the best possible model reaches, where it can be computed.
//!
//! # Linear recall (S1)
//!
//! An item v ~ N(0, I_m) is stored as a latent of r numbers, and an attention whose weights depend on places alone hands a
//! linear map of that latent to the query. Errors are per number of v, so that an answer of 0 has error 1.
//!
//! *A linear latent*, c = A v with A of rank r. The best estimate is the projection of v on the row space of A, whatever reads c,
//! and the m − r directions outside of it are lost: [`linear_floor`] = (m − r)/m. (For a Gaussian v the conditional mean is
//! linear, so that no decoder beats it. A smooth non-linear *encoder* does not help the linear latent of MLA, which is one matrix
//! from the normalised hidden state.)
//!
//! *MLA's latent* passes an RMSNorm on its way into the cache: c = (A v + a)/rms(A v + a), a being what the constant channel
//! contributes. (The norm before it scales v and the constant alike, which this one cancels.) Let r ≤ m, A of rank r, and s the
//! part of v in the row space of A. Norm and gain leave the direction of A v + a, hence that of s + s₀ with A s₀ = a. For a = 0:
//! s = ρ u with u = s/|s| uniform on the sphere and ρ = |s| ~ χ_r independent of it, so the conditional mean is `E[ρ] u` and what
//! is lost beyond the m − r directions is
//!
//! ```text
//! E|s − E[ρ] u|² = E[ρ²] − E[ρ]² = Var χ_r = r − 2 (Γ((r+1)/2) / Γ(r/2))²     (→ 1/2 for large r)
//! ```
//!
//! so that [`normalised_floor`] = (m − r + Var χ_r)/m, and the decoder that reaches it is linear. A constant does not help: with
//! a ≠ 0 the posterior of ρ has density ∝ ρ^(r−1) exp(−(ρ − s₀·u)²/2), and its mean variance rises from Var χ_r at a = 0 to 1 for
//! |a| → ∞, where the sphere becomes a plane and one whole direction is lost (the module's tests integrate it); an A of smaller
//! rank loses at least that. For r > m the constant has a direction to itself, the norm can be undone, and the floor is 0.
//!
//! Two ways around these lines exist in the architecture, and neither is a wider latent. All latents may be so small that the
//! norm's ε (1e-6) is what they are divided by; then the norm is linear and the first line holds. And the rotated key k_pe comes
//! from the hidden state, not from the latent: attention *weights* that depend on content carry about a number per head past the
//! latent, and the two together are R numbers more. Training does find that: with 4 heads and R = 32 the error at r = 16, m = 32
//! falls to about (m − r − 4 + Var χ_r)/m, below (m − r)/m, and even one head with R = 8 takes some of its dimension now and then.
//! One head and R = 4, with `rope_theta = 10` so that both frequencies find the place, leave no room for it: such a run ends on
//! [`normalised_floor`].
//!
//! # Position (S6)
//!
//! Without a rotated key, a single block sees the past as a set: [`position_chance`].
//!
//! # Multi-key match (S4)
//!
//! [`multi_key_width`] numbers must be in the latent for exact answers. Below, the trade between finding and telling has no
//! closed form here.

/// The variance of the length of an r-dimensional standard normal vector.
pub fn chi_variance(rank: usize) -> f64 {
    // g(r) = Γ((r+1)/2)/Γ(r/2): g(1) = 1/√π, and g(r) g(r+1) = Γ(r/2 + 1)/Γ(r/2) = r/2.
    let ratio = (1..rank).fold(std::f64::consts::PI.sqrt().recip(), |g, r| r as f64 / 2.0 / g);
    if rank == 0 { 0.0 } else { rank as f64 - 2.0 * ratio * ratio }
}

/// Least mean squared error per number of recalling N(0, I) of `width` numbers through a linear latent of `rank` numbers.
pub fn linear_floor(rank: usize, width: usize) -> f64 {
    width.saturating_sub(rank) as f64 / width.max(1) as f64
}

/// The same through a latent of `rank` numbers of which the norm leaves only the direction.
pub fn normalised_floor(rank: usize, width: usize) -> f64 {
    if rank > width { 0.0 } else { ((width - rank) as f64 + chi_variance(rank)) / width.max(1) as f64 }
}

/// Accuracy of a guess among the symbols read before, over positions `lag..length`: at position t one of t.
pub fn position_chance(length: usize, lag: usize) -> f64 {
    let lag = lag.max(1);
    let asked = length.saturating_sub(lag).max(1);
    (lag..length).map(|t| 1.0 / t as f64).sum::<f64>() / asked as f64
}

/// Numbers that the latent of an item must carry for exact answers: all attributes, and the value.
pub fn multi_key_width(attributes: usize, key_width: usize, value_width: usize) -> usize {
    attributes * key_width + value_width
}

#[cfg(test)]
mod tests {
    use super::super::draw::{Draw, Side};
    use super::*;

    #[test]
    fn the_variance_of_a_length_is_that_of_its_distribution() {
        // χ_1 is a half-normal, χ_2 Rayleigh's, χ_3 Maxwell's distribution.
        let pi = std::f64::consts::PI;
        for (rank, expected) in [(0, 0.0), (1, 1.0 - 2.0 / pi), (2, 2.0 - pi / 2.0), (3, 3.0 - 8.0 / pi)] {
            assert!((chi_variance(rank) - expected).abs() < 1e-14, "{rank}");
        }
        // Var χ_r = 1/2 − 1/(8 r) + O(1/r²)
        let limit = |r: usize| 0.5 - 1.0 / (8.0 * r as f64);
        assert!((chi_variance(1000) - limit(1000)).abs() < 1e-6, "{}", chi_variance(1000));
    }

    /// Mean posterior variance of ρ = |s + s₀| given its direction, s ~ N(0, I_r), |s₀| = `shift`.
    fn lost_with_a_constant(rank: usize, shift: f64) -> f64 {
        let count = 4000;
        let mut draw = Draw::new(1, Side::Validation, rank as u64);
        let mut total = 0.0;
        for _ in 0..count {
            let mut s: Vec<f64> = draw.normals(rank).into_iter().map(f64::from).collect();
            s[0] += shift;
            let length = s.iter().map(|x| x * x).sum::<f64>().sqrt();
            let along = shift * s[0] / length;
            let most = 8.0 + shift + (rank as f64).sqrt();
            let steps = 600;
            let (mut mass, mut first, mut second) = (0.0, 0.0, 0.0);
            for i in 0..steps {
                let rho = (f64::from(i) + 0.5) * most / f64::from(steps);
                let density = ((rank - 1) as f64 * rho.ln() - (rho - along).powi(2) / 2.0).exp();
                mass += density;
                first += density * rho;
                second += density * rho * rho;
            }
            total += second / mass - (first / mass).powi(2);
        }
        total / f64::from(count)
    }

    #[test]
    fn no_constant_lets_a_normalised_latent_keep_more() {
        for rank in [1, 2, 4, 16] {
            let lost = [0.0, 0.5, 1.0, 2.0, 4.0, 16.0].map(|shift| lost_with_a_constant(rank, shift));
            assert!((lost[0] - chi_variance(rank)).abs() < 1e-3, "{rank}: {lost:?}");
            assert!(lost.windows(2).all(|pair| pair[0] < pair[1]), "{rank}: {lost:?}");
            assert!(lost[5] > 0.9 && lost[5] < 1.0 + 1e-3, "{rank}: {lost:?}");
        }
    }

    #[test]
    fn the_direction_of_a_projection_tells_as_much_as_the_line_says() {
        let (width, count) = (6, 60_000);
        let mut draw = Draw::new(7, Side::Validation, 0);
        for rank in 1..=width {
            let mean = (rank as f64 - chi_variance(rank)).sqrt();
            let (mut linear, mut normalised) = (0.0, 0.0);
            for _ in 0..count {
                let v: Vec<f64> = draw.normals(width).into_iter().map(f64::from).collect();
                let square = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
                let (kept, lost) = (square(&v[..rank]).sqrt(), square(&v[rank..]));
                linear += lost;
                normalised += lost + (kept - mean).powi(2);
            }
            let numbers = f64::from(count) * width as f64;
            assert!((linear / numbers - linear_floor(rank, width)).abs() < 6e-3, "{rank}");
            assert!((normalised / numbers - normalised_floor(rank, width)).abs() < 6e-3, "{rank}");
        }
        assert_eq!((linear_floor(9, 6), normalised_floor(7, 6)), (0.0, 0.0));
    }

    #[test]
    fn a_guess_among_the_symbols_read_is_right_as_often_as_said() {
        assert!((position_chance(5, 2) - (1.0 / 2.0 + 1.0 / 3.0 + 1.0 / 4.0) / 3.0).abs() < 1e-15);
        assert_eq!(position_chance(2, 1), 1.0);
        assert_eq!(multi_key_width(2, 4, 8), 16);
    }
}
