//! The numbers of one step.

use crate::precision::Precision;

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Factor on the gradient: 1, or less where its global norm is clipped.
    pub clip: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// ε beside the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of the parameter.
    pub weight_decay: f64,
    /// Which step this is, counted from 1: the moments are corrected for having begun at zero.
    pub step: u64,
}

impl AdamWStep {
    /// `(1 − β₁ᵗ, √(1 − β₂ᵗ))`
    pub(crate) fn corrections(&self) -> (f64, f64) {
        let [beta1, beta2] = self.betas.map(|beta| 1.0 - beta.powf(self.step as f64));
        (beta1, beta2.sqrt())
    }
}

/// Root mean square of a Muon update at learning rate 1: about that of AdamW's (Moonlight, arXiv 2502.16982, section 2.2), so
/// that its learning rates and decays carry over.
pub(super) const MUON_RMS: f64 = 0.2;

/// The numbers of one Muon step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonStep {
    /// Factor on the gradient: 1, or less where its global norm is clipped.
    pub clip: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay μ of the momentum buffer.
    pub momentum: f64,
    /// Decoupled decay of the parameter.
    pub weight_decay: f64,
    /// What products are computed in, on a GPU; five steps of an iteration that corrects itself forgive 16 bits.
    pub precision: Precision,
}

impl MuonStep {
    /// Size of the update of a matrix at learning rate 1.
    pub(crate) fn scale(rows: usize, columns: usize) -> f64 {
        MUON_RMS * (rows.max(columns) as f64).sqrt()
    }
}
