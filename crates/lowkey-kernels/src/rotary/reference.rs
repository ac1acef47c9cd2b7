//! The rotation in plain tensor operations.

use burn::tensor::Tensor;

/// See [`crate::rotate`].
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, from: usize, interleaved: bool) -> Tensor<4> {
    let [batch, seq, heads, width] = x.dims();
    let half = cos.dims()[3];
    let part = x.clone().narrow(3, from, 2 * half);
    let (first, second) = if interleaved {
        let pairs = part.reshape([batch, seq, heads * half, 2]);
        let one = |i| pairs.clone().narrow(3, i, 1).reshape([batch, seq, heads, half]);
        (one(0), one(1))
    } else {
        (part.clone().narrow(3, 0, half), part.narrow(3, half, half))
    };
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = first * sin + second * cos;
    let mut parts = vec![turned_first, turned_second];
    if from > 0 {
        parts.insert(0, x.clone().narrow(3, 0, from));
    }
    let after = width - from - 2 * half;
    if after > 0 {
        parts.push(x.narrow(3, width - after, after));
    }
    Tensor::cat(parts, 3)
}
