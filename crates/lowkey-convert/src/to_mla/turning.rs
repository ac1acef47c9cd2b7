//! Which complex directions of the keys go on turning with their position, and what stands in for the others.
//!
//! RoPE multiplies the complex number that a pair of rows makes by e^(iθp). It commutes with every complex matrix that mixes numbers
//! of the same frequency, so the keys κ ∈ ℂᴳ of G heads may become Bκ and a query of head g the row of A that makes up for it: with
//! A·B = 1 no score changes, wherever query and key stand. (The orthogonal and unitary ones among such matrices are RoRoPE's, TransMLA,
//! arXiv 2502.07864.) With fewer rows the scores q̄ₕ e_gᵀ A B κ miss least, in the mean over texts, where A·B projects on the first
//! eigenvectors of E^½ E[κκ*] E^½, E the energy of each head's queries: the eigenvalue of each is what it would cost to leave it out.

use std::ops::Range;

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

/// The keys of a band of frequencies in one layer: of one, or of neighbours that are taken for one (TransMLA's FreqFold), so that what
/// turns can be chosen among the numbers of all of them.
#[derive(Clone, Debug)]
pub(crate) struct Turning {
    /// The frequencies whose keys these are.
    pub(crate) members: Range<usize>,
    /// The one with which they turn.
    pub(crate) frequency: usize,
    /// B `[r, M·G]`, columns by member and then by head: what is rotated of the keys.
    pub(crate) key: Mat<c64>,
    /// A `[M·G, r]`: by whose rows queries read it.
    pub(crate) query: Mat<c64>,
    /// What stands in for the rotation of the rest, of each member: its mean over distances of queries and keys, of all constants the
    /// one by which scores miss least.
    pub(crate) rests: Vec<c64>,
}

impl Turning {
    /// All keys of a frequency as they are.
    pub(crate) fn whole(frequency: usize, groups: usize) -> Self {
        Self {
            members: frequency..frequency + 1,
            frequency,
            key: Mat::identity(groups, groups),
            query: Mat::identity(groups, groups),
            rests: vec![c64::new(0.0, 0.0)],
        }
    }

    /// Whether nothing is left without rotation.
    pub(crate) fn is_whole(&self) -> bool {
        self.key.nrows() == self.key.ncols()
    }

    /// Columns of B: member, place among the members, and key head.
    pub(crate) fn columns(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let groups = self.key.ncols() / self.members.len().max(1);
        self.members.clone().flat_map(move |l| (0..groups).map(move |g| (l, g)))
    }

    /// The row of A by which a head's query reads with frequency `l`, one of the members.
    pub(crate) fn row(&self, l: usize, group: usize) -> usize {
        let groups = self.key.ncols() / self.members.len().max(1);
        (l - self.members.start) * groups + group
    }

    /// 1 − A·B, `[M·G, M·G]`: what of the keys does not turn.
    pub(crate) fn left(&self) -> Mat<c64> {
        let n = self.key.ncols();
        Mat::<c64>::identity(n, n) - &self.query * &self.key
    }
}

/// The complex directions of one band in one layer, the strongest first.
#[derive(Clone, Debug)]
pub(crate) struct Directions {
    members: Range<usize>,
    /// A `[M·G, M·G]`
    query: Mat<c64>,
    /// B `[M·G, M·G]`
    key: Mat<c64>,
    /// The mean square of the logits' part that each makes.
    pub(crate) energies: Vec<f64>,
}

/// Share of the strongest head's energy that a head has at least, so that one whose queries are nothing has an inverse.
const LEAST: f64 = 1e-12;

impl Directions {
    /// Of all frequencies, `fold` neighbours in each band, for inputs (x, 1) of second moment `inputs`.
    pub(crate) fn of_layer(heads: &Heads, inputs: &Mat<f64>, fold: usize, layer: usize) -> Result<Vec<Self>> {
        // All products with the moment at once: one by one it would be read for every row.
        let seen = Seen { heads, queries: &heads.query * inputs, keys: &heads.key * inputs };
        bands(heads.frequencies(), fold).map(|members| seen.band(members, layer)).collect()
    }

    /// The frequency with which what is kept turns: of several one in the middle.
    pub(crate) fn frequency(&self) -> usize {
        self.members.start + (self.members.len() - 1) / 2
    }

    /// All go on turning, mixed as they are.
    #[cfg(test)]
    pub(crate) fn mixed(&self) -> Turning {
        Turning {
            members: self.members.clone(),
            frequency: self.frequency(),
            key: self.key.clone(),
            query: self.query.clone(),
            rests: vec![c64::new(0.0, 0.0); self.members.len()],
        }
    }

    /// The first `count` go on turning; `rests[l]` stands in for frequency l. All of them are the keys as they are.
    pub(crate) fn keep(&self, count: usize, rests: &[c64]) -> Vec<Turning> {
        let all = self.energies.len();
        if count == all {
            return self.members.clone().map(|l| Turning::whole(l, all / self.members.len().max(1))).collect();
        }
        vec![Turning {
            members: self.members.clone(),
            frequency: self.frequency(),
            key: self.key.subrows(0, count).to_owned(),
            query: self.query.subcols(0, count).to_owned(),
            rests: rests.get(self.members.clone()).unwrap_or_default().to_vec(),
        }]
    }
}

/// The frequencies, `fold` neighbours in each band.
pub(crate) fn bands(frequencies: usize, fold: usize) -> impl Iterator<Item = Range<usize>> {
    let fold = fold.max(1);
    (0..frequencies).step_by(fold).map(move |l| l..(l + fold).min(frequencies))
}

/// A layer's maps times the moment of their inputs.
struct Seen<'a> {
    heads: &'a Heads,
    queries: Mat<f64>,
    keys: Mat<f64>,
}

impl Seen<'_> {
    fn band(&self, members: Range<usize>, layer: usize) -> Result<Directions> {
        let heads = self.heads;
        let groups = heads.dims.kv_heads;
        let columns: Vec<(usize, usize)> = members.clone().flat_map(|l| (0..groups).map(move |g| (l, g))).collect();
        let n = columns.len();
        let mut energy = vec![0.0; n];
        for head in 0..heads.dims.heads {
            for (m, l) in members.clone().enumerate() {
                for row in heads.pair(head, l) {
                    energy[m * groups + heads.group(head)] += self.queries.row(row) * heads.query.row(row).transpose();
                }
            }
        }
        let least = LEAST * energy.iter().fold(f64::MIN_POSITIVE, |most, e| most.max(*e));
        let root: Vec<f64> = energy.iter().map(|e| e.max(least).sqrt()).collect();
        let product = |i: usize, part: usize, k: usize, of: usize| {
            let [(l, g), (other, h)] = [columns[i], columns[k]];
            self.keys.row(heads.pair(g, l)[part]) * heads.key.row(heads.pair(h, other)[of]).transpose()
        };
        // E[κ_i κ̄_k], times the roots of the queries' energies.
        let moment = Mat::from_fn(n, n, |i, k| {
            let real = product(i, 0, k, 0) + product(i, 1, k, 1);
            let imaginary = product(i, 1, k, 0) - product(i, 0, k, 1);
            c64::new(real, imaginary) * root[i] * root[k]
        });
        let origin = Origin { layer, what: "the keys of a frequency" };
        let (energies, vectors) = hermitian(&moment, origin)?;
        let scale = heads.dims.scale.powi(2);
        Ok(Directions {
            members,
            query: Mat::from_fn(n, n, |i, j| vectors[(i, j)] / root[i]),
            key: Mat::from_fn(n, n, |j, i| vectors[(i, j)].conj() * root[i]),
            energies: energies.into_iter().map(|e| e * scale).collect(),
        })
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

/// How many directions of each band go on turning, `pairs` in all. `costs[b][j]`: what it would cost to leave out direction j of band b.
pub(crate) fn share(costs: &[Vec<f64>], pairs: usize, keep: Keep) -> Vec<usize> {
    let each = costs.iter().enumerate();
    let mut order: Vec<(usize, usize)> = each.flat_map(|(b, costs)| (0..costs.len()).map(move |j| (b, j))).collect();
    match keep {
        // Stable, and the costs of a band fall: its directions are taken in order.
        Keep::Energy => order.sort_by(|a, b| costs[b.0][b.1].total_cmp(&costs[a.0][a.1])),
        Keep::Fastest => {}
        // Where the last round does not reach all bands it is spread over them.
        Keep::Uniform => {
            let spread = costs.len();
            let last = pairs % spread.max(1);
            // From the fastest on, in equal steps: of G heads' frequencies those that DeepSeek's attention would give a key so wide.
            let taken = |b: usize| (b * last) % spread < last;
            order.sort_by_key(|(b, j)| (*j, if *j == pairs / spread.max(1) { !taken(*b) } else { false }, *b));
        }
    }
    let mut counts = vec![0; costs.len()];
    order.iter().take(pairs).for_each(|(b, _)| counts[*b] += 1);
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
