//! What a text makes of the inputs of attention.

use burn::tensor::Device;
use faer::Mat;
use lowkey_model::{CausalLm, ids_tensor, model::Trace};

use crate::error::Result;
use crate::matrix::to_mat;
use crate::moments::check_text;
use crate::{Observer, Progress};

/// The inputs of each layer's attention over a text.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// E\[(x, 1)(x, 1)ᵀ\] of each layer, `[d+1, d+1]`.
    pub(crate) moments: Vec<Mat<f64>>,
    /// How many pairs of query and key lie each distance apart.
    pub(crate) distances: Vec<f64>,
    /// Whether what is the same for all inputs goes into biases.
    centred: bool,
}

impl Inputs {
    /// For latents that hold the mean of keys and values as well: the output then has no bias because of it.
    #[must_use]
    pub fn uncentred(self) -> Self {
        Self { centred: false, ..self }
    }

    /// The part of each layer's (x, 1) that latents do not hold, `[d+1, 1]`: its mean or, for [`Inputs::uncentred`], the 1 alone.
    pub(crate) fn constants(&self) -> Vec<Mat<f64>> {
        let constant = |moment: &Mat<f64>| {
            let last = moment.ncols() - 1;
            Mat::from_fn(moment.nrows(), 1, |i, _| if self.centred || i == last { moment[(i, last)] } else { 0.0 })
        };
        self.moments.iter().map(constant).collect()
    }

    /// Distances of queries and keys by what they weigh: as often as they come, and with that power of the distance the less, as
    /// attention gives more to what is near.
    pub(crate) fn near(&self, power: i32) -> Vec<f64> {
        let weigh = |(distance, pairs): (usize, &f64)| pairs / ((distance + 1) as f64).powi(power);
        self.distances.iter().enumerate().map(weigh).collect()
    }

    /// Of each sequence by itself.
    ///
    /// # Errors
    /// [`Error::Text`](crate::Error::Text) for a text that the model cannot read.
    pub fn measure(model: &CausalLm, text: &[Vec<u32>], device: &Device, observe: Observer) -> Result<Self> {
        check_text(model, text)?;
        let (d, layers) = (model.config.hidden_size, model.config.layers.len());
        let mut moments = vec![Mat::<f64>::zeros(d + 1, d + 1); layers];
        let mut distances = vec![0.0; text.iter().map(Vec::len).max().unwrap_or(0)];
        for (done, ids) in text.iter().enumerate() {
            observe(Progress { doing: "inputs", done, of: text.len() });
            if ids.is_empty() {
                continue;
            }
            let context = model.context(&vec![0; ids.len()], ids.len(), device);
            let mut trace = Trace::of_hidden();
            model.hidden(ids_tensor(ids, 1, ids.len(), device), &context, Some(&mut trace));
            for ((block, hidden), moment) in model.model.layers.iter().zip(trace.hidden).zip(&mut moments) {
                let x = to_mat(block.input_layernorm.forward(hidden).squeeze_dim::<2>(0), "inputs of attention")?;
                let x = Mat::from_fn(x.nrows(), d + 1, |i, j| if j < d { x[(i, j)] } else { 1.0 });
                *moment += x.transpose() * &x;
            }
            let pairs = (0..ids.len()).map(|distance| (ids.len() - distance) as f64);
            distances.iter_mut().zip(pairs).for_each(|(sum, pairs)| *sum += pairs);
        }
        let tokens: usize = text.iter().map(Vec::len).sum();
        let moments = moments.iter().map(|sum| faer::Scale(1.0 / tokens.max(1) as f64) * sum).collect();
        Ok(Self { moments, distances, centred: true })
    }
}
