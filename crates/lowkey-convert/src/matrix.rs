//! Between tensors and the matrices of the linear algebra library, and the three decompositions that are needed, in f64.

use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::{Mat, Side};
use lowkey_model::CausalLm;
use lowkey_model::model::Linear;

use crate::error::{Error, Result};

/// Where a matrix comes from, for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) layer: usize,
    pub(crate) what: &'static str,
}

impl Origin {
    pub(crate) fn failed(self) -> Error {
        Error::Decomposition { layer: self.layer, what: self.what }
    }

    pub(crate) fn check_finite(self, matrix: &Mat<f64>) -> Result<()> {
        let finite = (0..matrix.ncols()).all(|j| (0..matrix.nrows()).all(|i| matrix[(i, j)].is_finite()));
        if finite { Ok(()) } else { Err(Error::Overflow { layer: self.layer, what: self.what }) }
    }
}

/// A tensor's numbers in f64.
pub(crate) fn to_mat(tensor: Tensor<2>, what: &'static str) -> Result<Mat<f64>> {
    let [rows, columns] = tensor.dims();
    let values =
        tensor.cast(DType::F64).try_into_vec_as::<f64>().map_err(|e| Error::Device { what, why: format!("{e:?}") })?;
    Ok(Mat::from_fn(rows, columns, |i, j| values.get(i * columns + j).copied().unwrap_or(f64::NAN)))
}

/// [W | b], which acts on (x, 1).
pub(crate) fn affine(linear: &Linear, what: &'static str) -> Result<Mat<f64>> {
    let matrix = to_mat(linear.matrix(), what)?;
    let bias = match linear.bias() {
        Some(bias) => to_mat(bias.unsqueeze_dim(1), what)?,
        None => Mat::zeros(matrix.nrows(), 1),
    };
    let d = matrix.ncols();
    Ok(Mat::from_fn(matrix.nrows(), d + 1, |i, j| if j < d { matrix[(i, j)] } else { bias[(i, 0)] }))
}

/// The matrix as a tensor of the given format, rounded once.
pub(crate) fn to_tensor(matrix: &Mat<f64>, dtype: DType, device: &Device) -> Tensor<2> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let values: Vec<f64> = (0..rows).flat_map(|i| (0..columns).map(move |j| matrix[(i, j)])).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), (device, dtype))
}

/// Eigenvalues of a symmetric matrix, largest first, and the eigenvectors as columns in that order. Negative values, which only
/// rounding makes of a matrix of moments, come as 0.
pub(crate) fn eigen(matrix: &Mat<f64>, origin: Origin) -> Result<(Vec<f64>, Mat<f64>)> {
    origin.check_finite(matrix)?;
    let found = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| origin.failed())?;
    let n = matrix.nrows();
    let (values, vectors) = (found.S().column_vector(), found.U());
    let values = (0..n).rev().map(|i| values[i].max(0.0)).collect();
    Ok((values, Mat::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)])))
}

/// Singular values, largest first.
pub(crate) fn singular_values(matrix: &Mat<f64>, origin: Origin) -> Result<Vec<f64>> {
    origin.check_finite(matrix)?;
    matrix.singular_values().map_err(|_| origin.failed())
}

/// Σ diagonal.
pub(crate) fn trace(matrix: &Mat<f64>) -> f64 {
    (0..matrix.nrows().min(matrix.ncols())).map(|i| matrix[(i, i)]).sum()
}

/// Rows `from..to`.
pub(crate) fn rows(matrix: &Mat<f64>, from: usize, to: usize) -> Mat<f64> {
    matrix.subrows(from, to - from).to_owned()
}

/// Checks that every weight of a model is a number.
///
/// # Errors
/// [`Error::NotFinite`] naming the first parameter that holds NaN or an infinity.
pub fn check_finite(model: &CausalLm) -> Result<()> {
    for parameter in model.parameters() {
        let values = parameter.value.try_into_vec_as::<f32>();
        let values = values.map_err(|e| Error::Device { what: "a weight", why: format!("{e:?}") })?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite { tensor: parameter.name, value: *value });
        }
    }
    Ok(())
}
