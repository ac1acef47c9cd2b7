//! The small layers: linear map, norm, embedding. Weights lie as Hugging Face stores them, `[d_out, d_in]`.

mod weight;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use lowkey_kernels::adapted::AdaptedMatrix;
use lowkey_kernels::quantized_linear::{Packed, QuantizedMatrix};
use lowkey_kernels::{embed, rms_norm};

use crate::adapter::{Adapter, AdapterPlan, Draws, QuantizedLayer};
use crate::input::Input;
use crate::tensor::{HeadRows, Role, TensorSpec};
pub(crate) use weight::Weight;

/// Supplies the values of each tensor: random ones, or those of a file. No values at all make an empty tensor, for a model that is
/// about to be refused: nothing as large as a wrong configuration claims is allocated.
pub(crate) struct Builder<'a> {
    device: &'a Device,
    fill: &'a mut dyn FnMut(&TensorSpec) -> Vec<f32>,
    /// The adapters of the maps that are built, and how their matrices are packed.
    adapters: Option<&'a AdapterPlan>,
    /// What has been built, in the order of the module's fields.
    pub(crate) built: Vec<TensorSpec>,
    /// The matrices that were packed, which are not among them.
    pub(crate) packed: Vec<QuantizedLayer>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        device: &'a Device,
        adapters: Option<&'a AdapterPlan>,
        fill: &'a mut dyn FnMut(&TensorSpec) -> Vec<f32>,
    ) -> Self {
        Self { device, fill, adapters, built: Vec::new(), packed: Vec::new() }
    }

    pub(crate) fn tensor<const D: usize>(
        &mut self,
        name: String,
        shape: [usize; D],
        role: Role,
        head_rows: HeadRows,
    ) -> Param<Tensor<D>> {
        self.of(TensorSpec::new(name, shape.to_vec(), role, head_rows))
    }

    /// The tensor of a specification, which has `D` dimensions.
    pub(crate) fn of<const D: usize>(&mut self, spec: TensorSpec) -> Param<Tensor<D>> {
        let (values, shape) = ((self.fill)(&spec), <[usize; D]>::try_from(&spec.shape[..]).unwrap_or([0; D]));
        self.parameter(spec, shape, values)
    }

    fn parameter<const D: usize>(&mut self, spec: TensorSpec, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        self.built.push(spec);
        let shape = if values.is_empty() { [0; D] } else { shape };
        Param::from_data(TensorData::new(values, shape), self.device)
    }

    /// A matrix, packed as soon as its values are there: of a model that is packed no more than one is whole at a time.
    fn weight(&mut self, name: String, shape: [usize; 2], role: Role, head_rows: HeadRows) -> Weight {
        let spec = TensorSpec::new(name, shape.to_vec(), role, head_rows);
        let values = (self.fill)(&spec);
        match self.adapters.and_then(|plan| plan.packs(&spec)) {
            Some(quantization) if !values.is_empty() => {
                let packed = Packed::new(&values, shape, quantization);
                self.packed.push(QuantizedLayer::new(&spec.name, &values, &packed));
                Weight::Packed(QuantizedMatrix::new(&packed, self.device))
            }
            _ => Weight::Whole(self.parameter(spec, shape, values)),
        }
    }

    pub(crate) fn vector(&mut self, name: String, len: usize, role: Role) -> Param<Tensor<1>> {
        self.tensor(name, [len], role, HeadRows::one(len))
    }
}

/// `y = x Wᵀ + b`, where W may be packed and may have an [`Adapter`] beside it.
#[derive(Module, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Param<Tensor<1>>>,
    adapter: Option<Adapter>,
}

impl Linear {
    /// A map from `d_in` to `d_out` numbers.
    pub(crate) fn build(b: &mut Builder, name: &str, [d_in, d_out]: [usize; 2], role: Role, bias: bool) -> Self {
        Self::build_rows(b, name, d_in, role, HeadRows::one(d_out), bias)
    }

    /// Maps from `d_in` numbers to the heads' parts, of so many rows each.
    pub(crate) fn build_heads(b: &mut Builder, name: &str, d_in: usize, head_rows: HeadRows, bias: bool) -> Self {
        Self::build_rows(b, name, d_in, Role::Matrix, head_rows, bias)
    }

    fn build_rows(b: &mut Builder, name: &str, d_in: usize, role: Role, head_rows: HeadRows, bias: bool) -> Self {
        let d_out = head_rows.total();
        Self {
            weight: b.weight(format!("{name}.weight"), [d_out, d_in], role, head_rows),
            bias: bias.then(|| b.vector(format!("{name}.bias"), d_out, Role::Bias)),
            adapter: b.adapters.and_then(|plan| plan.of(name)).map(|own| Adapter::build(b, name, [d_out, d_in], own)),
        }
    }

    /// W `[d_out, d_in]`, as the map applies it, its adapter's share included: the only way to it, for kernels that take the matrix
    /// as for whoever reads it. Of a packed matrix it is unpacked.
    pub fn matrix(&self) -> Tensor<2> {
        match &self.adapter {
            None => self.weight.matrix(),
            Some(adapter) => adapter.matrix(self.weight.matrix()),
        }
    }

    /// The matrix without its adapter, for whoever puts another one there.
    pub(crate) fn own_matrix(&self) -> Tensor<2> {
        self.weight.matrix()
    }

    /// Whether an adapter stands beside the matrix.
    pub(crate) fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// Whether its matrix is packed.
    pub(crate) fn is_packed(&self) -> bool {
        self.weight.is_packed()
    }

    /// Takes the adapter away; `merge` multiplies it into the matrix, which is then whole.
    pub(crate) fn end_adapter(&mut self, merge: bool) {
        let matrix = (merge && (self.is_adapted() || self.is_packed())).then(|| self.matrix());
        self.adapter = None;
        if let Some(matrix) = matrix {
            self.set_matrix(matrix);
        }
    }

    /// What its adapter leaves out in a pass that trains.
    pub(crate) fn set_draws(&mut self, draws: Option<Draws>) {
        self.adapter.iter_mut().for_each(|adapter| adapter.set_draws(draws));
    }

    /// Keeps of its adapter what no step will change any more.
    pub(crate) fn settle(&mut self) {
        let weight = &self.weight;
        self.adapter.iter_mut().for_each(|adapter| adapter.settle(weight));
    }

    /// Its numbers of rows and columns, `[d_out, d_in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// The format of the numbers that it multiplies with.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// Puts another matrix in its place, which is trained or frozen as the old one was. Of a map that has an adapter this is the
    /// matrix beside it: whoever means the whole takes a [merged](crate::CausalLm::merged) model.
    pub fn set_matrix(&mut self, matrix: Tensor<2>) {
        self.weight.set(matrix);
    }

    /// b `[d_out]`, where there is one.
    pub fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    /// Puts another bias in its place, or none.
    pub fn set_bias(&mut self, bias: Option<Tensor<1>>) {
        self.bias = bias.map(Param::from_tensor);
    }

    /// The matrix with its adapter, for an operation that takes both and no bias; `None` where the map is another.
    pub(crate) fn adapted(&self) -> Option<AdaptedMatrix> {
        let adapter = self.adapter.as_ref().filter(|_| self.bias.is_none())?;
        adapter.beside(&self.weight)
    }

    /// `[batch, seq, d_in]` → `[batch, seq, d_out]`.
    pub fn forward(&self, x: impl Into<Input>) -> Tensor<3> {
        let x = x.into();
        match &self.adapter {
            None => self.weight.linear(x, self.bias()),
            Some(adapter) => adapter.apply(None, x, &self.weight, self.bias()),
        }
    }

    /// `residual + y`, `residual [batch, seq, d_out]`.
    pub(crate) fn add_to(&self, residual: Tensor<3>, x: impl Into<Input>) -> Tensor<3> {
        let x = x.into();
        match &self.adapter {
            None => self.weight.add_linear(residual, x.value, self.bias()),
            Some(adapter) => adapter.apply(Some(residual), x, &self.weight, self.bias()),
        }
    }
}

/// Puts another value in a parameter's place, tracked as the old one was.
fn replace<const D: usize>(param: &mut Param<Tensor<D>>, value: Tensor<D>) {
    let (recorded, trained) = (param.is_autodiff(), param.is_require_grad());
    let new = Param::from_tensor(value.detach());
    *param = if recorded { new.set_require_grad(trained) } else { new };
}

/// Root-mean-square norm with a gain.
#[derive(Module, Debug)]
pub struct RmsNorm {
    weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    pub(crate) fn build(b: &mut Builder, name: &str, width: usize, eps: f64) -> Self {
        Self { weight: b.vector(format!("{name}.weight"), width, Role::Norm), eps }
    }

    /// The gain `[d]`.
    pub fn gain(&self) -> Tensor<1> {
        self.weight.val()
    }

    /// Puts another gain in its place.
    pub fn set_gain(&mut self, gain: Tensor<1>) {
        replace(&mut self.weight, gain);
    }

    /// `[..., d]` → `[..., d]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, self.gain(), self.eps)
    }
}

/// Token embedding, which may have an [`Adapter`] beside it.
#[derive(Module, Debug)]
pub struct Embedding {
    weight: Param<Tensor<2>>,
    adapter: Option<Adapter>,
}

impl Embedding {
    pub(crate) fn build(b: &mut Builder, name: &str, rows: usize, width: usize) -> Self {
        Self {
            weight: b.tensor(format!("{name}.weight"), [rows, width], Role::Embedding, HeadRows::one(rows)),
            adapter: b.adapters.and_then(|plan| plan.of(name)).map(|own| Adapter::build(b, name, [rows, width], own)),
        }
    }

    /// The table `[vocab_size, hidden_size]`, its adapter's share included.
    pub fn table(&self) -> Tensor<2> {
        match &self.adapter {
            None => self.own_table(),
            Some(adapter) => adapter.table(self.own_table()),
        }
    }

    /// The table without its adapter.
    pub(crate) fn own_table(&self) -> Tensor<2> {
        self.weight.val()
    }

    /// Puts another table in its place, which is trained or frozen as the old one was.
    pub(crate) fn set_table(&mut self, table: Tensor<2>) {
        replace(&mut self.weight, table);
    }

    /// Takes the adapter away; `merge` adds it to the table.
    pub(crate) fn end_adapter(&mut self, merge: bool) {
        let table = (merge && self.adapter.is_some()).then(|| self.table());
        self.adapter = None;
        if let Some(table) = table {
            self.set_table(table);
        }
    }

    /// Whether a gradient of it is wanted: of the table, or of an adapter.
    pub(crate) fn is_trained(&self) -> bool {
        self.weight.is_require_grad() || self.adapter.as_ref().is_some_and(Adapter::is_trained)
    }

    /// `[batch, seq]` → `[batch, seq, d]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let rows = embed(self.own_table(), ids.clone());
        match &self.adapter {
            None => rows,
            Some(adapter) => adapter.look_up(rows, ids),
        }
    }
}
