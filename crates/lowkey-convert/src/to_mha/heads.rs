//! The queries, keys and values of a layer's heads, and where their numbers lie.

use faer::{Mat, c64};
use lowkey_model::ModelConfig;

use super::arrange::Arrangement;
use super::build::Weights;
use super::layer::Layer;
use super::pairs::{Row, grouped, merged, row};

/// How far two heads may be apart and still be one, in units of the largest number: rounding.
const SAME: f64 = 1e-6;

/// A layer's heads: parts that turn as complex rows, parts that do not as real ones.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// Of each pair that turns.
    pub(crate) frequencies: Vec<f64>,
    /// How many numbers of a key do not.
    pub(crate) still: usize,
    /// Of each query head.
    queries: Vec<Part>,
    /// Of each key head.
    keys: Vec<Part>,
    /// Of each key head, `[V, d+1]`.
    pub(crate) values: Vec<Mat<f64>>,
    /// Of each query head, `[d, V]`.
    out: Vec<Mat<f64>>,
    out_bias: Mat<f64>,
}

/// A query or a key.
#[derive(Clone, Debug)]
struct Part {
    turning: Vec<Row>,
    /// `[still, d+1]`
    still: Mat<f64>,
}

/// Keys and values for each query head.
pub(crate) fn each(layers: &[Layer], frequencies: &[f64]) -> Vec<Parts> {
    let heads = layers.first().map_or(0, |layer| layer.sizes[0]);
    let groups = grouped(frequencies);
    // Layers have the same sizes: where one head of one layer needs several pairs, all have them.
    let one: Vec<bool> = groups
        .iter()
        .map(|pairs| layers.iter().all(|layer| (0..heads).all(|head| merged(layer, head, pairs).is_some())))
        .collect();
    let still = read(layers, heads);
    let mut turning = Vec::new();
    for (pairs, one) in groups.iter().zip(&one) {
        let slots = if *one { 1 } else { pairs.len() };
        turning.extend(pairs.iter().take(slots).map(|p| frequencies[*p]));
    }
    let of_layer = |layer: &Layer| {
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for head in 0..heads {
            let (mut query, mut key) = (Vec::new(), Vec::new());
            let rotated = layer.query_turning(head);
            for (pairs, one) in groups.iter().zip(&one) {
                match merged(layer, head, pairs).filter(|_| *one) {
                    Some([q, k]) => {
                        query.push(q);
                        key.push(k);
                    }
                    None => {
                        query.extend(pairs.iter().map(|p| row(&rotated, layer.pairs[*p])));
                        key.extend(pairs.iter().map(|p| row(&layer.shared, layer.pairs[*p])));
                    }
                }
            }
            let [w_uk, w_uv] = layer.readers(head);
            let mut unturned = w_uk * &layer.latent;
            without_bias(&mut unturned);
            queries.push(Part { turning: query, still: picked(&layer.query_still(head), &still) });
            keys.push(Part { turning: key, still: picked(&unturned, &still) });
            values.push(w_uv * &layer.latent);
        }
        Parts {
            frequencies: turning.clone(),
            still: still.len(),
            queries,
            keys,
            values,
            out: (0..heads).map(|head| layer.out_of(head)).collect(),
            out_bias: layer.out_bias.clone(),
        }
    };
    let parts: Vec<Parts> = layers.iter().map(of_layer).collect();
    let mut counts = (1..=heads).rev().filter(|count| heads.is_multiple_of(*count));
    let several = counts.find(|several| parts.iter().all(|layer| layer.share(*several))).unwrap_or(1);
    parts.into_iter().map(|layer| layer.one_for(several)).collect()
}

/// One key and value head: the shared key beside the latent, and the latent.
pub(crate) fn single(layers: &[Layer], frequencies: &[f64]) -> Vec<Parts> {
    let rank = layers.iter().map(|layer| layer.latent.nrows()).max().unwrap_or(0);
    let of_layer = |layer: &Layer| {
        let [heads, ..] = layer.sizes;
        let filled =
            |map: Mat<f64>| Mat::from_fn(rank, map.ncols(), |i, j| if i < map.nrows() { map[(i, j)] } else { 0.0 });
        let latent = filled(layer.latent.clone());
        let mut key = latent.clone();
        without_bias(&mut key);
        let turning = |map: &Mat<f64>| layer.pairs.iter().map(|pair| row(map, *pair)).collect();
        let query = |head| {
            let [w_uk, _] = layer.readers(head);
            let still = filled(w_uk.transpose() * layer.query_still(head));
            Part { turning: turning(&layer.query_turning(head)), still }
        };
        let out = |head| {
            let [_, w_uv] = layer.readers(head);
            let out = layer.out_of(head) * w_uv;
            Mat::from_fn(out.nrows(), rank, |i, j| if j < out.ncols() { out[(i, j)] } else { 0.0 })
        };
        Parts {
            frequencies: frequencies.to_vec(),
            still: rank,
            queries: (0..heads).map(query).collect(),
            keys: vec![Part { turning: turning(&layer.shared), still: key }],
            values: vec![latent],
            out: (0..heads).map(out).collect(),
            out_bias: layer.out_bias.clone(),
        }
    };
    layers.iter().map(of_layer).collect()
}

/// Numbers without position that some head of some layer has in its query and in its key: the others make no score.
fn read(layers: &[Layer], heads: usize) -> Vec<usize> {
    let nope = layers.first().map_or(0, |layer| layer.sizes[1]);
    let some = |map: &Mat<f64>, i: usize| map.row(i).iter().any(|x| *x != 0.0);
    let used = |i: usize| {
        layers
            .iter()
            .any(|layer| (0..heads).any(|head| some(&layer.query_still(head), i) && some(&layer.readers(head)[0], i)))
    };
    (0..nope).filter(|i| used(*i)).collect()
}

fn picked(map: &Mat<f64>, rows: &[usize]) -> Mat<f64> {
    Mat::from_fn(rows.len(), map.ncols(), |i, j| map[(rows[i], j)])
}

/// What is the same for all keys is seen by no softmax.
fn without_bias(key: &mut Mat<f64>) {
    let last = key.ncols() - 1;
    (0..key.nrows()).for_each(|i| key[(i, last)] = 0.0);
}

impl Parts {
    /// Whether each `several` neighbours have the same key and the same value.
    fn share(&self, several: usize) -> bool {
        let close = |a: &[f64], b: &[f64]| {
            let most = a.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            a.iter().zip(b).all(|(a, b)| (a - b).abs() <= SAME * most)
        };
        let key = |head: usize| self.keys[head].numbers();
        let value = |head: usize| numbers(&self.values[head]);
        (0..self.keys.len()).all(|head| {
            let first = head / several * several;
            first == head || close(&key(first), &key(head)) && close(&value(first), &value(head))
        })
    }

    /// The first key and value of each `several` neighbours.
    fn one_for(self, several: usize) -> Self {
        Self {
            keys: self.keys.into_iter().step_by(several).collect(),
            values: self.values.into_iter().step_by(several).collect(),
            ..self
        }
    }

    /// The maps of attention with heads of the given arrangement.
    pub(crate) fn arranged(&self, config: &ModelConfig, places: &Arrangement) -> Weights {
        let width = places.width;
        let columns = self.values.first().map_or(1, Mat::ncols);
        let stacked = |heads: &[Part], still: f64, turning: f64| {
            let mut map = Mat::zeros(heads.len() * width, columns);
            for (head, part) in heads.iter().enumerate() {
                part.put(&mut map, head * width, places, still, turning);
            }
            map
        };
        // Logits are scaled by 1/√D there, and cosines and sines by what the arrangement's rotation scales them by.
        let scale = config.softmax_scale() * (width as f64).sqrt();
        let turning = if places.rope.is_some() { config.rope.table_factor().powi(2) } else { 1.0 };
        let mut value = Mat::zeros(self.values.len() * width, columns);
        for (head, map) in self.values.iter().enumerate() {
            value.subrows_mut(head * width, map.nrows()).copy_from(map);
        }
        let mut out = Mat::zeros(self.out_bias.nrows(), self.out.len() * width);
        for (head, map) in self.out.iter().enumerate() {
            out.subcols_mut(head * width, map.ncols()).copy_from(map);
        }
        Weights {
            query: stacked(&self.queries, scale, scale * turning),
            key: stacked(&self.keys, 1.0, 1.0),
            value,
            out,
            out_bias: self.out_bias.clone(),
            groups: self.keys.len(),
        }
    }
}

impl Part {
    fn numbers(&self) -> Vec<f64> {
        let turning = self.turning.iter().flatten().flat_map(|x: &c64| [x.re, x.im]);
        turning.chain(numbers(&self.still)).collect()
    }

    fn put(&self, map: &mut Mat<f64>, first: usize, places: &Arrangement, still: f64, turning: f64) {
        let half = places.width / 2;
        for (complex, at) in self.turning.iter().zip(&places.turning) {
            for (j, x) in complex.iter().enumerate() {
                map[(first + at, j)] = turning * x.re;
                map[(first + at + half, j)] = turning * x.im;
            }
        }
        for (i, at) in places.still.iter().enumerate() {
            for j in 0..self.still.ncols() {
                map[(first + at, j)] = still * self.still[(i, j)];
            }
        }
    }
}

fn numbers(map: &Mat<f64>) -> Vec<f64> {
    (0..map.nrows()).flat_map(|i| (0..map.ncols()).map(move |j| map[(i, j)])).collect()
}
