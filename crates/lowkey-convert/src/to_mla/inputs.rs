//! What a text makes of the inputs of attention.

use burn::tensor::Device;
use faer::Mat;
use lowkey_model::{CausalLm, model::Block};

use crate::Observer;
use crate::error::Result;
use crate::matrix::to_mat;
use crate::moments::check_text;
use crate::stream::Stream;

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
        let moments =
            Stream::each_layer(model, text, device, ("inputs", observe), |_, block, stream| moment(block, stream))?;
        Ok(Self { moments, distances: distances(text), centred: true })
    }

    /// Of one layer, whose block a text has come before.
    pub(crate) fn of_layer(block: &Block, stream: &Stream, text: &[Vec<u32>]) -> Result<Self> {
        Ok(Self { moments: vec![moment(block, stream)?], distances: distances(text), centred: true })
    }
}

/// E\[(x, 1)(x, 1)ᵀ\] of what a block's attention reads, `[d+1, d+1]`.
fn moment(block: &Block, stream: &Stream) -> Result<Mat<f64>> {
    let mut sum = Mat::<f64>::zeros(0, 0);
    let mut tokens = 0;
    for x in stream.inputs(block) {
        let x = to_mat(x.squeeze_dim::<2>(0), "inputs of attention")?;
        let d = x.ncols();
        let x = Mat::from_fn(x.nrows(), d + 1, |i, j| if j < d { x[(i, j)] } else { 1.0 });
        if sum.nrows() == 0 {
            sum = Mat::zeros(d + 1, d + 1);
        }
        sum += x.transpose() * &x;
        tokens += x.nrows();
    }
    Ok(faer::Scale(1.0 / tokens.max(1) as f64) * sum)
}

/// How many pairs of query and key of a text lie each distance apart.
fn distances(text: &[Vec<u32>]) -> Vec<f64> {
    let mut sums = vec![0.0; text.iter().map(Vec::len).max().unwrap_or(0)];
    for ids in text {
        let pairs = (0..ids.len()).map(|distance| (ids.len() - distance) as f64);
        sums.iter_mut().zip(pairs).for_each(|(sum, pairs)| *sum += pairs);
    }
    sums
}
