//! The latent attention that one layer of full keys and values becomes.

use faer::{Mat, c64};

use super::heads::Heads;
use super::turning::Turning;
use crate::error::Result;
use crate::matrix::{Origin, singular_values};

/// Numbers without position where all of a key turns: DeepSeek's attention has no place for none. Their weights are zero.
const PAD: usize = 2;

/// Singular values below this share of the first are rounding.
const NOTHING: f64 = 1e-12;

/// What a layer of latent attention is made of, in f64. Maps of the hidden state have d columns and one of biases.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// N, R and V.
    pub(crate) sizes: [usize; 3],
    /// `[H(N+R), d+1]`
    pub(crate) query: Mat<f64>,
    /// W_DKV `[L, d]`.
    pub(crate) latent: Mat<f64>,
    /// Its bias `[L, 1]`, which takes the mean away.
    pub(crate) latent_bias: Mat<f64>,
    /// W_KR `[R, d+1]`
    pub(crate) shared: Mat<f64>,
    /// `[H(N+V), L]`
    pub(crate) up: Mat<f64>,
    /// `[d, 1]`
    pub(crate) out_bias: Mat<f64>,
}

impl Weights {
    /// Of a layer whose keys turn as `turning` says, which has each frequency once, for an attention whose logits are scaled by `scale`.
    ///
    /// What turns becomes the shared key, which each query reads at the places of its group's share. What does not, and the values,
    /// are linear in the hidden state: stacked they have some rank L, and a latent of that width holds them all. A bias that does not
    /// turn is the same for all keys, which a softmax does not see, and that of a value comes through as it is, since its weights sum
    /// to 1: it goes to the output. So does what inputs of the given mean `(x, 1)` make of them, and a latent holds only how an input
    /// differs: a direction less where it is cut, and the same where it is not.
    pub(crate) fn of(heads: &Heads, turning: &[Turning], scale: f64, mean: &Mat<f64>, layer: usize) -> Result<Self> {
        let (groups, width, rotary) = (heads.dims.kv_heads, heads.dims.head_dim, heads.dims.rotary_dim);
        let columns = heads.key.ncols();
        let d = columns - 1;
        let pairs: Vec<(&Turning, usize)> =
            turning.iter().flat_map(|turning| (0..turning.key.nrows()).map(move |j| (turning, j))).collect();
        // The frequencies of which something is left without rotation, and where each has its place among those of its band.
        let of_band = |turning: &'_ Turning| turning.members.clone().zip(turning.rests.clone()).collect::<Vec<_>>();
        let cut: Vec<(&Turning, usize, c64)> = turning
            .iter()
            .filter(|turning| !turning.is_whole())
            .flat_map(|turning| of_band(turning).into_iter().map(move |(l, rest)| (turning, l, rest)))
            .collect();
        let (half, still) = (pairs.len(), cut.len());
        let [nope, rope] = widths(heads, turning);
        let filled = 2 * still + width - rotary;

        let mut shared = Mat::zeros(rope, columns);
        for (p, (turning, j)) in pairs.iter().enumerate() {
            for (i, (l, g)) in turning.columns().enumerate() {
                add(&mut shared, [p, p + half], turning.key[(*j, i)], &heads.key, heads.pair(g, l));
            }
        }

        let factor = heads.dims.scale / scale;
        let mut query = Mat::zeros(heads.dims.heads * (nope + rope), columns);
        for head in 0..heads.dims.heads {
            let (group, first) = (heads.group(head), head * (nope + rope));
            for (i, (_, l, rest)) in cut.iter().enumerate() {
                let by = rest.conj() * factor;
                add(&mut query, [first + i, first + still + i], by, &heads.query, heads.pair(head, *l));
            }
            for i in 0..width - rotary {
                let from = head * width + rotary + i;
                query.row_mut(first + 2 * still + i).copy_from(faer::Scale(factor) * heads.query.row(from));
            }
            let first = first + nope;
            for (p, (turning, j)) in pairs.iter().enumerate() {
                for l in turning.members.clone() {
                    let by = turning.query[(turning.row(l, group), *j)].conj() * factor;
                    add(&mut query, [first + p, first + half + p], by, &heads.query, heads.pair(head, l));
                }
            }
        }

        // Per group the keys that do not turn, then its values.
        let mut stack = Mat::zeros(groups * (filled + width), columns);
        for group in 0..groups {
            let first = group * (filled + width);
            for (i, (turning, l, _)) in cut.iter().enumerate() {
                let (left, row) = (turning.left(), turning.row(*l, group));
                for (column, (of, g)) in turning.columns().enumerate() {
                    add(&mut stack, [first + i, first + still + i], left[(row, column)], &heads.key, heads.pair(g, of));
                }
            }
            for i in 0..width - rotary {
                stack.row_mut(first + 2 * still + i).copy_from(heads.key.row(group * width + rotary + i));
            }
            stack.subrows_mut(first + filled, width).copy_from(heads.value.subrows(group * width, width));
        }
        let mut out_bias = heads.out_bias.clone();
        for head in 0..heads.dims.heads {
            let first = heads.group(head) * width;
            let bias = heads.value.subrows(first, width) * mean;
            out_bias += heads.out.subcols(head * width, width) * bias;
        }

        let (latent, read) = factored(stack.subcols(0, d).to_owned(), layer)?;
        let mut up = Mat::zeros(heads.dims.heads * (nope + width), latent.nrows());
        for head in 0..heads.dims.heads {
            let (first, from) = (head * (nope + width), heads.group(head) * (filled + width));
            up.subrows_mut(first, filled).copy_from(read.subrows(from, filled));
            up.subrows_mut(first + nope, width).copy_from(read.subrows(from + filled, width));
        }
        let latent_bias = faer::Scale(-1.0) * (&latent * mean.subrows(0, d));
        Ok(Self { sizes: [nope, rope, width], query, latent, latent_bias, shared, up, out_bias })
    }
}

/// N and R.
pub(crate) fn widths(heads: &Heads, turning: &[Turning]) -> [usize; 2] {
    let still: usize = turning.iter().filter(|turning| !turning.is_whole()).map(|turning| turning.members.len()).sum();
    let filled = 2 * still + heads.dims.head_dim - heads.dims.rotary_dim;
    let pairs: usize = turning.iter().map(|turning| turning.key.nrows()).sum();
    [if filled == 0 { PAD } else { filled }, 2 * pairs]
}

/// `rows` of `to`, a complex number, plus `by` times that of the rows `of` of `from`.
fn add(to: &mut Mat<f64>, rows: [usize; 2], by: c64, from: &Mat<f64>, of: [usize; 2]) {
    for column in 0..to.ncols() {
        let (real, imaginary) = (from[(of[0], column)], from[(of[1], column)]);
        to[(rows[0], column)] += by.re * real - by.im * imaginary;
        to[(rows[1], column)] += by.re * imaginary + by.im * real;
    }
}

/// A latent of least width and its readers, whose product is the given matrix: the matrix itself, with readers that pick its rows,
/// unless its rank is less than it has rows.
fn factored(stack: Mat<f64>, layer: usize) -> Result<(Mat<f64>, Mat<f64>)> {
    let origin = Origin { layer, what: "the stacked keys and values" };
    origin.check_finite(&stack)?;
    let rows = stack.nrows();
    // At least one number, even of nothing.
    let rank_of = |values: &[f64]| {
        let largest = values.first().copied().unwrap_or(0.0);
        values.iter().filter(|value| **value > NOTHING * largest).count().max(1)
    };
    // Vectors take many times as long as values, and where all rows count nothing is asked of them.
    if rows <= stack.ncols() && rank_of(&singular_values(&stack, origin)?) == rows {
        return Ok((stack, Mat::identity(rows, rows)));
    }
    let svd = stack.thin_svd().map_err(|_| origin.failed())?;
    let values = svd.S().column_vector();
    let rank = rank_of(&(0..values.nrows()).map(|i| values[i]).collect::<Vec<_>>());
    let latent = svd.V().subcols(0, rank).transpose().to_owned();
    let read = Mat::from_fn(rows, rank, |i, j| svd.U()[(i, j)] * values[j]);
    Ok((latent, read))
}
