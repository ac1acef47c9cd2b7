//! What a head reads of a shared key in which a frequency comes several times.
//!
//! A pair of rows is a complex number, and a score the real part of Σₚ q̄ₚ κₚ e^(iθΔ) over the pairs p of each frequency. Where a head's
//! queries are multiples qₚ = αₚ q of one of them, as in every model that was made of full keys, the sum is q̄ (Σₚ ᾱₚ κₚ): the head needs
//! one pair of keys of its own.

use faer::{Mat, c64};

use super::layer::Layer;

/// What of a head's part of a score may be left out as rounding, of what the strongest pair makes.
const NOTHING: f64 = 1e-6;

/// A map of (x, 1) to a complex number.
pub(crate) type Row = Vec<c64>;

/// The complex row of two real ones.
pub(crate) fn row(map: &Mat<f64>, [re, im]: [usize; 2]) -> Row {
    (0..map.ncols()).map(|j| c64::new(map[(re, j)], map[(im, j)])).collect()
}

/// Pairs of equal frequency, the fastest first.
pub(crate) fn grouped(frequencies: &[f64]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..frequencies.len()).collect();
    order.sort_by(|a, b| frequencies[*b].total_cmp(&frequencies[*a]));
    order.chunk_by(|a, b| frequencies[*a] == frequencies[*b]).map(<[usize]>::to_vec).collect()
}

/// The one pair of query and key that does for those of a head in `pairs`; none where it takes more.
pub(crate) fn merged(layer: &Layer, head: usize, pairs: &[usize]) -> Option<[Row; 2]> {
    let of_head = layer.query_turning(head);
    let queries: Vec<Row> = pairs.iter().map(|p| row(&of_head, layer.pairs[*p])).collect();
    let keys: Vec<Row> = pairs.iter().map(|p| row(&layer.shared, layer.pairs[*p])).collect();
    let strength = |p: usize| norm(&queries[p]) * norm(&keys[p]);
    let best = (0..pairs.len()).max_by(|a, b| strength(*a).total_cmp(&strength(*b)).then(b.cmp(a)))?;
    let (strongest, query) = (strength(best), &queries[best]);
    let energy = norm(query).powi(2);
    let mut key = keys[best].clone();
    for p in (0..pairs.len()).filter(|p| *p != best && energy > 0.0) {
        let product: c64 = query.iter().zip(&queries[p]).map(|(a, b)| a.conj() * b).sum();
        let times = product / energy;
        let rest: Row = query.iter().zip(&queries[p]).map(|(a, b)| b - times * a).collect();
        if norm(&rest) * norm(&keys[p]) > NOTHING * strongest {
            return None;
        }
        for (sum, part) in key.iter_mut().zip(&keys[p]) {
            *sum += times.conj() * part;
        }
    }
    Some([query.clone(), key])
}

fn norm(row: &[c64]) -> f64 {
    row.iter().map(|x| x.norm_sqr()).sum::<f64>().sqrt()
}
