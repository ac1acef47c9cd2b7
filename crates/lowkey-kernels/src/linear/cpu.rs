//! The linear map on the CPU, on rows where they lie.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::autodiff::{LinearGradients, LinearOps, ProjectState};
use crate::cpu::linear::{Tokens, input_gradient, project, weight_gradient};
use crate::cpu::tensors::{dims, new};
use crate::precision::Precision;

/// A tensor's memory and how far its rows of the last axis are apart, where all rows have one distance; else a copy that does.
pub(crate) fn rows(tensor: &FlexTensor) -> FlexTensor {
    if row_stride(tensor).is_some() { tensor.clone() } else { tensor.to_contiguous() }
}

/// The one distance between the rows of a tensor, where there is one and the numbers of a row lie side by side.
fn row_stride(tensor: &FlexTensor) -> Option<usize> {
    let layout = tensor.layout();
    let (shape, strides) = (layout.shape(), layout.strides());
    let last = shape.num_dims() - 1;
    let side_by_side = shape[last] == 1 || strides[last] == 1;
    // The distance is that of the innermost axis with several rows; the axes outside must go on from it.
    let mut distance: Option<(usize, usize)> = None;
    for axis in (0..last).rev().filter(|axis| shape[*axis] > 1) {
        let stride = usize::try_from(strides[axis]).ok()?;
        match &mut distance {
            None => distance = Some((stride, shape[axis])),
            Some((first, count)) if stride == *first * *count => *count *= shape[axis],
            Some(_) => return None,
        }
    }
    let stride = distance.map_or(shape[last], |(stride, _)| stride);
    (side_by_side && stride >= shape[last]).then_some(stride)
}

/// The rows of a tensor that [`rows`] returned.
pub(crate) fn tokens(tensor: &FlexTensor) -> Tokens<'_> {
    let shape = tensor.layout().shape();
    let width = shape[shape.num_dims() - 1];
    let data = &tensor.storage::<f32>()[tensor.layout().start_offset()..];
    let count = shape.num_elements() / width.max(1);
    Tokens { data, count, stride: row_stride(tensor).unwrap_or(width) }
}

fn projected(
    precision: Precision,
    x: &FlexTensor,
    weight: &FlexTensor,
    mut out: FlexTensor,
    accumulate: bool,
) -> FlexTensor {
    let (x, weight) = (rows(x), weight.to_contiguous());
    let [_, d_in] = dims::<2>(&weight);
    project(precision, tokens(&x), weight.storage(), d_in, out.storage_mut(), accumulate);
    out
}

impl LinearOps for Flex {
    fn project(x: FlexTensor, weight: FlexTensor, precision: Precision) -> FlexTensor {
        let [batch, seq, _] = dims::<3>(&x);
        let [d_out, _] = dims::<2>(&weight);
        projected(precision, &x, &weight, new([batch, seq, d_out]), false)
    }

    fn add_project(residual: FlexTensor, x: FlexTensor, weight: FlexTensor, precision: Precision) -> FlexTensor {
        // Where nobody else holds the residual, the sum takes its place.
        let out = residual.to_contiguous();
        drop(residual);
        projected(precision, &x, &weight, out, true)
    }
}

impl LinearGradients for Flex {
    fn project_grad(saved: ProjectState<Self>, grad: FlexTensor, precision: Precision) -> [Option<FlexTensor>; 2] {
        let grad = grad.to_contiguous();
        let [batch, seq, d_out] = dims::<3>(&grad);
        let d_x = saved.weight.map(|weight| {
            let [_, d_in] = dims::<2>(&weight);
            let mut d_x = new([batch, seq, d_in]);
            let weight = weight.to_contiguous();
            input_gradient(precision, grad.storage(), weight.storage(), d_in, d_x.storage_mut(), false);
            d_x
        });
        let d_weight = saved.x.map(|x| {
            let ([.., d_in], x) = (dims::<3>(&x), rows(&x));
            let mut d_weight = new([d_out, d_in]);
            weight_gradient(precision, grad.storage(), tokens(&x), d_in, d_weight.storage_mut());
            d_weight
        });
        [d_x, d_weight]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{DType, Shape};

    #[test]
    fn rows_of_one_distance_are_read_where_they_lie() {
        let whole = FlexTensor::zeros(Shape::from(vec![2, 3, 10]), DType::F32);
        assert_eq!(row_stride(&whole), Some(10));
        assert_eq!(row_stride(&whole.narrow(2, 4, 5)), Some(10));
        assert_eq!(row_stride(&whole.narrow(1, 1, 2)), None, "rows of two batches with a hole between");
        assert_eq!(row_stride(&whole.narrow(0, 1, 1).narrow(1, 1, 2)), Some(10));
        assert_eq!(row_stride(&whole.transpose(1, 2)), None);
        let part = whole.narrow(1, 2, 1).narrow(2, 1, 3);
        assert_eq!((row_stride(&part), tokens(&part).count), (Some(30), 2));
    }
}
