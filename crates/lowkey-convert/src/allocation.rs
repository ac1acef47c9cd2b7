//! Water-filling: where a budget of directions is worth most.

use serde::Serialize;

/// What it costs to cut one layer alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Curve {
    /// Index of the layer.
    pub layer: usize,
    /// Directions kept and the loss above that of the whole model, nats per token; by rising rank, the last one the full width.
    pub points: Vec<(usize, f64)>,
}

/// The ranks at which a curve is measured: 1, then sixteenths that lie closer where the curve bends, and the full width.
pub(crate) fn grid(full: usize) -> Vec<usize> {
    let parts = [1, 2, 3, 4, 6, 8, 10, 12, 14, 16].map(|sixteenths| (full * sixteenths).div_ceil(16));
    let mut ranks: Vec<usize> = [1].into_iter().chain(parts).collect();
    ranks.dedup();
    ranks
}

/// The corners of a curve's lower convex hull: what is reached by mixing its points, as a function of the rank.
fn hull(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let mut corners: Vec<(usize, f64)> = Vec::new();
    for point in points {
        while let [.., a, b] = corners[..] {
            // b lies on or above the line from a to the new point.
            let above = (b.1 - a.1) * (point.0 - a.0) as f64 >= (point.1 - a.1) * (b.0 - a.0) as f64;
            if !above {
                break;
            }
            corners.pop();
        }
        corners.push(*point);
    }
    corners
}

/// Ranks that sum to `budget`, or to the least there can be where it is smaller: first the least of each curve, then along the hulls
/// by falling gain per direction. Every rank grows with the budget or stays.
pub(crate) fn allocate(curves: &[Curve], budget: usize) -> Vec<usize> {
    let least = |curve: &Curve| curve.points.first().map_or(0, |point| point.0);
    let mut ranks: Vec<usize> = curves.iter().map(least).collect();
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (at, curve) in curves.iter().enumerate() {
        for pair in hull(&curve.points).windows(2) {
            let width = pair[1].0 - pair[0].0;
            steps.push(((pair[0].1 - pair[1].1) / width as f64, at, width));
        }
    }
    // Stable: within a layer hulls have falling slopes, and equal ones stay in order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut left = budget.saturating_sub(ranks.iter().sum());
    for (_, at, width) in steps {
        let given = width.min(left);
        if let Some(rank) = ranks.get_mut(at) {
            *rank += given;
        }
        left -= given;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(layer: usize, points: &[(usize, f64)]) -> Curve {
        Curve { layer, points: points.to_vec() }
    }

    #[test]
    fn a_hull_is_convex_and_below() {
        let points = [(1, 8.0), (2, 7.5), (4, 2.0), (6, 1.9), (8, 0.0), (16, 0.1)];
        assert_eq!(hull(&points), vec![(1, 8.0), (4, 2.0), (8, 0.0), (16, 0.1)]);
        assert_eq!(hull(&[(3, 1.0)]), vec![(3, 1.0)]);
    }

    #[test]
    fn a_grid_ends_at_the_full_width() {
        for full in 1..200 {
            let ranks = grid(full);
            assert_eq!((ranks[0], ranks[ranks.len() - 1]), (1, full));
            assert!(ranks.windows(2).all(|pair| pair[0] < pair[1]), "{ranks:?}");
        }
    }

    /// By trying all allocations between convex curves.
    #[test]
    fn an_allocation_is_the_best_there_is_and_grows() {
        let cost = |scale: f64, power: f64| move |rank: usize| scale * (rank as f64).powf(-power);
        let laws = [cost(1.0, 1.0), cost(3.0, 0.5), cost(0.2, 2.0)];
        let curves: Vec<Curve> = laws
            .iter()
            .enumerate()
            .map(|(i, law)| curve(i, &(1..=8).map(|rank| (rank, law(rank))).collect::<Vec<_>>()))
            .collect();
        let total = |ranks: &[usize]| ranks.iter().zip(&laws).map(|(rank, law)| law(*rank)).sum::<f64>();
        let mut last = vec![0; 3];
        for budget in 3..=24 {
            let ranks = allocate(&curves, budget);
            assert_eq!(ranks.iter().sum::<usize>(), budget);
            let mut best = f64::MAX;
            for a in 1..=8 {
                for b in 1..=8 {
                    let c = budget as i64 - a as i64 - b as i64;
                    if (1..=8).contains(&c) {
                        best = best.min(total(&[a, b, c as usize]));
                    }
                }
            }
            assert!((total(&ranks) - best).abs() < 1e-12, "{budget}: {ranks:?}");
            assert!(ranks.iter().zip(&last).all(|(now, before)| now >= before), "{last:?} then {ranks:?}");
            last = ranks;
        }
    }
}
