//! The certificate of an export: what it was made of, what it holds, and how far it is from its source.

use std::path::Path;

use lowkey_files::{hash::FileHash, read_text};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::evidence::{Greedy, LogitEvidence, Text};
use crate::plan::LayerPlan;
pub use crate::target::Bounds;
use crate::target::Target;

/// File name of the certificate that programs read.
pub(crate) const JSON: &str = "certificate.json";

/// File name of the one that people read.
pub(crate) const MARKDOWN: &str = "CERTIFICATE.md";

/// Largest certificate that is read: it holds the text that was compared.
pub(crate) const LARGEST: u64 = 256 << 20;

/// Version of the layout below.
const FORMAT: u32 = 1;

/// How far a tensor, or the worst of several, is from what it should hold. Both figures are relative to the tensor's own size,
/// so that a number that happens to lie near 0 does not decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    /// max |x − x₀| / max |x₀|
    pub max: f64,
    /// ‖x − x₀‖₂ / ‖x₀‖₂
    pub rms: f64,
}

impl TensorError {
    /// The difference of a stored tensor from the exact one.
    pub(crate) fn of(found: impl Iterator<Item = f64>, exact: impl Iterator<Item = f64>) -> Self {
        let (mut worst, mut largest, mut error, mut norm) = (0.0f64, 0.0f64, 0.0, 0.0);
        for (x, exact) in found.zip(exact) {
            let difference = (x - exact).abs();
            // max() passes over NaN, and a stored NaN is as wrong as can be.
            worst = worst.max(if difference.is_nan() { f64::INFINITY } else { difference });
            largest = largest.max(exact.abs());
            error += difference * difference;
            norm += exact * exact;
        }
        let ratio = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a / b };
        Self { max: ratio(worst, largest), rms: ratio(error, norm).sqrt() }
    }

    pub(crate) fn worst(self, other: Self) -> Self {
        Self { max: self.max.max(other.max), rms: self.rms.max(other.rms) }
    }
}

/// The error of the weights of a layer, or of what lies outside the layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightEvidence {
    /// `layer 3`, or `embeddings, head and final norm`.
    pub part: String,
    /// The worst of its tensors against the source.
    #[serde(flatten)]
    pub error: TensorError,
}

/// The error of a product or a split against the same in f64.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProductEvidence {
    /// Name in the side file.
    pub tensor: String,
    /// Against the source's weights, multiplied in f64.
    #[serde(flatten)]
    pub error: TensorError,
}

/// Everything that is recomputed from the files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Each layer's weights, and the rest, against the source's.
    pub weights: Vec<WeightEvidence>,
    /// Splits and products against f64.
    pub products: Vec<ProductEvidence>,
    /// Logits on the text.
    pub logits: LogitEvidence,
    /// Greedy continuations.
    pub greedy: Vec<Greedy>,
}

/// The certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Version of this layout.
    pub format: u32,
    /// Version of lowkey that wrote it.
    pub lowkey: String,
    /// What was exported to.
    pub target: Target,
    /// The source's name and files.
    pub source: SourceFiles,
    /// The export's files but this one and its readable twin.
    pub outputs: Vec<FileHash>,
    /// The choice of form for each layer, where there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plan: Vec<LayerPlan>,
    /// What stands elsewhere than in the source, or in another number format.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What was demanded.
    pub bounds: Bounds,
    /// What was found.
    pub evidence: Evidence,
    /// The text that both models read.
    pub text: Text,
}

/// Where an export came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFiles {
    /// Name of the model's folder.
    pub name: String,
    /// Its files.
    pub files: Vec<FileHash>,
}

impl Certificate {
    pub(crate) fn new(target: Target, source: SourceFiles, bounds: Bounds, evidence: Evidence, text: Text) -> Self {
        let lowkey = env!("CARGO_PKG_VERSION").into();
        Self {
            format: FORMAT,
            lowkey,
            target,
            source,
            outputs: Vec::new(),
            plan: Vec::new(),
            notes: Vec::new(),
            bounds,
            evidence,
            text,
        }
    }

    /// Reads the certificate of an export.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] where there is none or it is damaged.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(JSON);
        let text = read_text(&path, LARGEST)?;
        let certificate: Self = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("is no certificate ({e}); export the model again")))?;
        if certificate.format != FORMAT {
            let why = format!("has format {}; this version reads {FORMAT}", certificate.format);
            return Err(Error::file(&path, why));
        }
        Ok(certificate)
    }
}

/// Whether two figures are the same measurement, as far as two machines round alike: by a share of the larger, or both too small
/// to tell from rounding.
fn same(recorded: f64, found: f64, share: f64, noise: f64) -> bool {
    let most = recorded.abs().max(found.abs());
    recorded == found || (recorded - found).abs() <= share * most || most <= noise
}

impl Evidence {
    /// A line for each figure of this, the recorded evidence, that is not what is found now. Without the source its weights are not
    /// at hand, nor is what was measured on it.
    pub(crate) fn contradictions(&self, found: &Self, with_source: bool) -> Vec<String> {
        // Errors of tensors are exact but for the order of a sum; those of logits are made of rounding, which differs between
        // processors and numbers of threads.
        const TENSOR: f64 = 1e-2;
        const ROUNDING: f64 = 0.9;
        const PERPLEXITY: f64 = 1e-4;
        let mut lines = Vec::new();
        let mut compare = |what: String, recorded: f64, found: f64, share: f64, noise: f64| {
            if !same(recorded, found, share, noise) {
                lines.push(format!("{what}: the certificate records {recorded:.4e}, found now {found:.4e}"));
            }
        };
        let (l, f) = (&self.logits, &found.logits);
        compare("positions compared".into(), l.positions as f64, f.positions as f64, 0.0, 0.0);
        compare("the export's perplexity".into(), l.perplexity_export, f.perplexity_export, PERPLEXITY, 0.0);
        if with_source {
            compare("the source's perplexity".into(), l.perplexity_source, f.perplexity_source, PERPLEXITY, 0.0);
            compare("largest difference of logits".into(), l.max_abs, f.max_abs, ROUNDING, 1e-4);
            compare("relative error of the logits".into(), l.max_relative, f.max_relative, ROUNDING, 1e-5);
            compare("mean KL divergence".into(), l.mean_kl, f.mean_kl, ROUNDING, 1e-8);
            // Two positions may be ties.
            let ties = 2.0 / l.positions.max(1) as f64;
            compare("share of the same top tokens".into(), l.top1_agreement, f.top1_agreement, ties, 0.0);
            let parts = |evidence: &Self| -> Vec<(String, TensorError)> {
                let weights = evidence.weights.iter().map(|w| (format!("weights of {}", w.part), w.error));
                weights.chain(evidence.products.iter().map(|p| (p.tensor.clone(), p.error))).collect()
            };
            let (recorded, now) = (parts(self), parts(found));
            let names =
                |parts: &[(String, TensorError)]| parts.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
            if names(&recorded) == names(&now) {
                for ((name, recorded), (_, now)) in recorded.into_iter().zip(now) {
                    compare(format!("{name}: largest relative error"), recorded.max, now.max, TENSOR, 1e-12);
                    compare(format!("{name}: RMS relative error"), recorded.rms, now.rms, TENSOR, 1e-12);
                }
            } else {
                lines.push("the certificate speaks of other tensors than there are".into());
            }
        }
        if self.greedy.len() != found.greedy.len() {
            lines.push(format!("greedy continuations: {} recorded, {} found", self.greedy.len(), found.greedy.len()));
        }
        for (i, (recorded, now)) in self.greedy.iter().zip(&found.greedy).enumerate() {
            let parts = recorded.source.iter().zip(&recorded.export).take_while(|(a, b)| a == b).count();
            let whole = recorded.source.len() == parts && recorded.export.len() == parts;
            if recorded.prompt != now.prompt || recorded.agree != parts || recorded.margin.is_some() == whole {
                lines.push(format!("greedy continuation {}: not what the certificate's text and tokens give", i + 1));
            }
        }
        lines
    }

    /// A line for each figure that is worse than what is demanded.
    pub fn failures(&self, bounds: &Bounds) -> Vec<String> {
        let mut failures = Vec::new();
        // Written so that NaN fails.
        let within = |x: f64, most: f64| x <= most;
        let tensors = self.weights.iter().map(|w| (format!("weights of {}", w.part), w.error));
        let products = self.products.iter().map(|p| (p.tensor.clone(), p.error));
        for (what, error) in tensors.chain(products) {
            for (kind, found, most) in [("max", error.max, bounds.weight_max), ("RMS", error.rms, bounds.weight_rms)] {
                if !within(found, most) {
                    failures.push(format!("{what}: {kind} relative error {found:.3e} > {most:.3e}"));
                }
            }
        }
        let l = &self.logits;
        let change = (l.perplexity_export / l.perplexity_source - 1.0).abs();
        let figures = [
            ("relative error of the logits", l.max_relative, bounds.logit),
            ("mean KL divergence", l.mean_kl, bounds.kl),
            ("relative change of the perplexity", change, bounds.perplexity),
            ("share of positions with another top token", 1.0 - l.top1_agreement, 1.0 - bounds.top1),
        ];
        for (what, found, most) in figures {
            if !within(found, most) {
                failures.push(format!("{what}: {found:.3e} > {most:.3e}"));
            }
        }
        if bounds.greedy {
            for (i, greedy) in self.greedy.iter().enumerate() {
                if let Some(margin) = greedy.margin
                    && !within(margin.abs(), bounds.logit)
                {
                    failures.push(format!(
                        "greedy continuation {}: parts from the source's after {} of {} tokens, where the source's \
                         preference of {margin:.3e} is no tie",
                        i + 1,
                        greedy.agree,
                        greedy.source.len()
                    ));
                }
            }
        }
        failures
    }
}
