//! Which complex directions of the keys go on turning with their position, and what stands in for the others.
//!
//! RoPE multiplies the complex number that a pair of rows makes by e^(iθp). It commutes with every complex matrix that mixes numbers
//! of the same frequency, so the keys κ ∈ ℂᴳ of G heads may become Bκ and a query of head g the row of A that makes up for it: with
//! A·B = 1 no score changes, wherever query and key stand. (The orthogonal and unitary ones among such matrices are RoRoPE's, TransMLA,
//! arXiv 2502.07864.) With fewer rows the scores q̄ₕ e_gᵀ A B κ miss least, in the mean over texts, where A·B projects on the first
//! eigenvectors of E^½ E[κκ*] E^½, E the energy of each head's queries: the eigenvalue of each is what it would cost to leave it out.

use faer::{Mat, Side, c64};
use serde::Serialize;

use super::heads::Heads;
use crate::error::{Error, Result};
use crate::matrix::Origin;

/// Which directions keep their rotation where not all can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Those whose scores would miss most without.
    Energy,
    /// As many of each frequency, the strongest first (TransMLA).
    Uniform,
    /// All of the fastest frequencies (MHA2MLA's "high").
    Fastest,
}

/// The keys of one frequency in one layer.
#[derive(Clone, Debug)]
pub(crate) struct Turning {
    /// B `[r, G]`: what is rotated of the keys.
    pub(crate) key: Mat<c64>,
    /// A `[G, r]`: by whose rows queries read it.
    pub(crate) query: Mat<c64>,
    /// What stands in for the rotation of the rest: its mean over distances of queries and keys, of all constants the one by which
    /// scores miss least.
    pub(crate) rest: c64,
}

impl Turning {
    /// All keys as they are.
    pub(crate) fn whole(groups: usize) -> Self {
        Self { key: Mat::identity(groups, groups), query: Mat::identity(groups, groups), rest: c64::new(0.0, 0.0) }
    }

    /// Whether nothing is left without rotation.
    pub(crate) fn is_whole(&self) -> bool {
        self.key.nrows() == self.key.ncols()
    }

    /// 1 − A·B, `[G, G]`: what of the keys does not turn.
    pub(crate) fn left(&self) -> Mat<c64> {
        let groups = self.key.ncols();
        Mat::<c64>::identity(groups, groups) - &self.query * &self.key
    }
}

/// The complex directions of one frequency in one layer, the strongest first.
#[derive(Clone, Debug)]
pub(crate) struct Directions {
    /// A `[G, G]`
    query: Mat<c64>,
    /// B `[G, G]`
    key: Mat<c64>,
    /// The mean square of the logits' part that each makes.
    pub(crate) energies: Vec<f64>,
}

/// Share of the strongest head's energy that a head has at least, so that one whose queries are nothing has an inverse.
const LEAST: f64 = 1e-12;

impl Directions {
    /// Of frequency `at`, for inputs (x, 1) of second moment `inputs`.
    pub(crate) fn of(heads: &Heads, inputs: &Mat<f64>, at: usize, layer: usize) -> Result<Self> {
        let groups = heads.dims.kv_heads;
        let mut energy = vec![0.0; groups];
        for head in 0..heads.dims.heads {
            for row in heads.pair(head, at) {
                let row = heads.query.row(row);
                energy[heads.group(head)] += row * inputs * row.transpose();
            }
        }
        let least = LEAST * energy.iter().fold(f64::MIN_POSITIVE, |most, e| most.max(*e));
        let root: Vec<f64> = energy.iter().map(|e| e.max(least).sqrt()).collect();
        let seen: Vec<[Mat<f64>; 2]> =
            (0..groups).map(|g| heads.pair(g, at).map(|row| heads.key.subrows(row, 1) * inputs)).collect();
        let product = |g: usize, part: usize, k: usize, of: usize| {
            let row = heads.key.row(heads.pair(k, at)[of]);
            seen[g][part].row(0) * row.transpose()
        };
        // E[κ_g κ̄_k], times the roots of the queries' energies.
        let moment = Mat::from_fn(groups, groups, |g, k| {
            let real = product(g, 0, k, 0) + product(g, 1, k, 1);
            let imaginary = product(g, 1, k, 0) - product(g, 0, k, 1);
            c64::new(real, imaginary) * root[g] * root[k]
        });
        let origin = Origin { layer, what: "the keys of a frequency" };
        let (energies, vectors) = hermitian(&moment, origin)?;
        let scale = heads.dims.scale.powi(2);
        Ok(Self {
            query: Mat::from_fn(groups, groups, |g, j| vectors[(g, j)] / root[g]),
            key: Mat::from_fn(groups, groups, |j, g| vectors[(g, j)].conj() * root[g]),
            energies: energies.into_iter().map(|e| e * scale).collect(),
        })
    }

    /// All go on turning, mixed as they are.
    #[cfg(test)]
    pub(crate) fn mixed(&self) -> Turning {
        Turning { key: self.key.clone(), query: self.query.clone(), rest: c64::new(0.0, 0.0) }
    }

    /// The first `count` go on turning. All of them are the keys as they are.
    pub(crate) fn keep(&self, count: usize, rest: c64) -> Turning {
        if count == self.energies.len() {
            return Turning::whole(count);
        }
        Turning { key: self.key.subrows(0, count).to_owned(), query: self.query.subcols(0, count).to_owned(), rest }
    }
}

/// Eigenvalues of a Hermitian matrix, largest first, and the eigenvectors as columns in that order.
fn hermitian(matrix: &Mat<c64>, origin: Origin) -> Result<(Vec<f64>, Mat<c64>)> {
    let n = matrix.nrows();
    if (0..n).any(|j| (0..n).any(|i| !(matrix[(i, j)].re.is_finite() && matrix[(i, j)].im.is_finite()))) {
        return Err(Error::Overflow { layer: origin.layer, what: origin.what });
    }
    let found = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| origin.failed())?;
    let (values, vectors) = (found.S().column_vector(), found.U());
    let values = (0..n).rev().map(|i| values[i].re.max(0.0)).collect();
    Ok((values, Mat::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)])))
}

/// How many directions of each frequency go on turning, `pairs` in all, of at most `groups` each. `costs[l][j]`: what it would cost to
/// leave out direction j of frequency l.
pub(crate) fn share(costs: &[Vec<f64>], groups: usize, pairs: usize, keep: Keep) -> Vec<usize> {
    let mut order: Vec<(usize, usize)> = (0..costs.len()).flat_map(|l| (0..groups).map(move |j| (l, j))).collect();
    match keep {
        // Stable, and the costs of a frequency fall: its directions are taken in order.
        Keep::Energy => order.sort_by(|a, b| costs[b.0][b.1].total_cmp(&costs[a.0][a.1])),
        Keep::Fastest => {}
        // Where the last round does not reach all frequencies it is spread over them.
        Keep::Uniform => {
            let spread = costs.len();
            let last = pairs % spread.max(1);
            // From the fastest on, in equal steps: of G heads' frequencies those that DeepSeek's attention would give a key so wide.
            let taken = |l: usize| (l * last) % spread < last;
            order.sort_by_key(|(l, j)| (*j, if *j == pairs / spread.max(1) { !taken(*l) } else { false }, *l));
        }
    }
    let mut counts = vec![0; costs.len()];
    order.iter().take(pairs).for_each(|(l, _)| counts[*l] += 1);
    counts
}

/// The mean of e^(−iθΔ) over distances of weight `distances[Δ]`.
pub(crate) fn mean_turn(frequency: f64, distances: &[f64]) -> c64 {
    let all: f64 = distances.iter().sum();
    let mut sum = c64::new(0.0, 0.0);
    for (distance, weight) in distances.iter().enumerate() {
        let (sin, cos) = (distance as f64 * frequency).sin_cos();
        sum += c64::new(cos, -sin) * *weight;
    }
    if all > 0.0 { sum / all } else { c64::new(1.0, 0.0) }
}
