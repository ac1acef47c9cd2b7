//! Matrices that are stored as codes of a few bits, with scales beside them.
//!
//! | stored | its parts beside it |
//! |---|---|
//! | `P.weight`, 8-bit floats | `P.weight_scale_inv` (DeepSeek) or `P.weight_scale`; a value is code · scale in spite of "inv" |
//! | `P.weight`, 8-bit integers | `P.weight_scale`, perhaps `P.weight_zero_point` |
//! | `P.weight_packed`, words of 32 bits | `P.weight_shape`, `P.weight_scale`, perhaps `P.weight_zero_point` and `P.weight_g_idx` |
//!
//! What bitsandbytes packs into 4 bits ([`nf4`]) says its shape itself.
//!
//! Scales of activations, which are of no use where the arithmetic is in f32, are left aside.

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::Dtype;

use super::quantisation::{Codes, Grain, Quantisation};
use super::stored::{decode, e4m3};
use super::{Entry, Weights, nf4};
use crate::error::{Error, Result};

/// What is said of activations.
const OF_ACTIVATIONS: [&str; 4] = ["input_scale", "input_zero_point", "output_scale", "output_zero_point"];

/// The parts of a matrix beside its codes.
#[derive(Clone)]
pub(super) struct Quantised {
    codes: Codes,
    /// Rows and columns that share a scale.
    block: (usize, usize),
    scale: Entry,
    zero: Option<Entry>,
    /// Which group of columns each column belongs to.
    groups: Option<Entry>,
}

/// Puts the parts of quantised matrices together under the name and shape of the matrix. No value of one is read.
///
/// # Errors
/// [`Error::File`] naming a tensor whose scale is missing or has another shape, or that is stored in a way that `quantisation` does
/// not speak of.
pub(super) fn settle(weights: &mut Weights, quantisation: &Quantisation) -> Result<()> {
    if quantisation.schemes.is_empty() {
        return Ok(());
    }
    let is_coded = |(name, entry): (&String, &Entry)| match entry.dtype {
        Dtype::F8_E4M3 | Dtype::I8 => name.strip_suffix(".weight").map(|module| (module.to_owned(), "weight")),
        _ => name.strip_suffix(".weight_packed").map(|module| (module.to_owned(), "weight_packed")),
    };
    let coded: Vec<(String, &str)> = weights.tensors.iter().filter_map(is_coded).collect();
    for (module, suffix) in coded {
        let Some(codes) = take(&mut weights.tensors, &module, suffix) else { continue };
        let path = weights.files[codes.file].0.clone();
        let whole = put_together(weights, &module, codes, suffix, quantisation);
        let whole = whole.map_err(|why| Error::file(&path, format!("tensor {module}.{suffix} {why}")))?;
        if weights.tensors.insert(format!("{module}.weight"), whole).is_some() {
            return Err(Error::file(&path, format!("tensor {module}.weight is there both plain and packed")));
        }
    }
    Ok(())
}

/// A part of a module, which is then no tensor of its own any more.
fn take(tensors: &mut BTreeMap<String, Entry>, module: &str, part: &str) -> Option<Entry> {
    tensors.remove(&format!("{module}.{part}"))
}

/// The matrix of a module from what the files have of it; `Err` says what is wrong with it.
fn put_together(
    weights: &mut Weights,
    module: &str,
    codes: Entry,
    suffix: &str,
    quantisation: &Quantisation,
) -> std::result::Result<Entry, String> {
    let packed = suffix == "weight_packed";
    let whole = match (packed, take_if(packed, weights, module, "weight_shape")) {
        (true, None) => return Err(format!("has no {module}.weight_shape beside it")),
        (true, Some(shape)) => sizes(shape.dtype, weights.bytes(&shape))
            .ok_or_else(|| format!("has a {module}.weight_shape that is not two whole numbers"))?,
        (false, _) => codes.shape.clone(),
    };
    let [rows, columns] = whole[..] else {
        return Err(format!("has shape {whole:?}: only matrices are read from {:?}", codes.dtype));
    };
    let stored = |kind: &Codes| match kind {
        Codes::E4m3 => codes.dtype == Dtype::F8_E4M3,
        Codes::Int8 => codes.dtype == Dtype::I8,
        Codes::Nf4 => false,
        Codes::Packed(bits) => {
            let words = columns.div_ceil((32 / bits) as usize);
            packed && codes.dtype == Dtype::I32 && codes.shape == [rows, words]
        }
    };
    let known: Vec<_> = quantisation.schemes.iter().filter(|scheme| stored(&scheme.codes)).collect();
    if known.is_empty() {
        let of = if packed { format!(" of a matrix {whole:?}") } else { String::new() };
        let found = format!("{:?} {:?}{of}", codes.dtype, codes.shape);
        return Err(format!(
            "is stored as {found}, which is no form that quantization_config of config.json speaks of"
        ));
    }
    let names: &[&str] =
        if codes.dtype == Dtype::F8_E4M3 { &["weight_scale_inv", "weight_scale"] } else { &["weight_scale"] };
    let scale = names.iter().find_map(|name| Some((*name, take(&mut weights.tensors, module, name)?)));
    let Some((scale_name, scale)) = scale else {
        let names = names.iter().map(|name| format!("{module}.{name}")).collect::<Vec<_>>().join(" and no ");
        return Err(format!(
            "has no scale: there is no {names}; without it its values are unknown: fetch all files again"
        ));
    };
    let fits = known.iter().find(|scheme| {
        let (r, c) = scheme.grain.block(rows, columns);
        let per_row = scheme.grain == Grain::Row && scale.shape == [rows];
        let one = scheme.grain == Grain::Tensor && scale.shape.iter().all(|n| *n == 1);
        per_row || one || scale.shape == [rows.div_ceil(r), columns.div_ceil(c)]
    });
    let Some(scheme) = fits else {
        let expected = known.iter().map(|scheme| {
            let (r, c) = scheme.grain.block(rows, columns);
            format!("{:?}", [rows.div_ceil(r), columns.div_ceil(c)])
        });
        let expected = expected.collect::<Vec<_>>().join(" or ");
        return Err(format!("has a {module}.{scale_name} of shape {:?}; expected {expected}", scale.shape));
    };
    let integers = scheme.codes != Codes::E4m3;
    let block = scheme.grain.block(rows, columns);
    let zero = take_if(integers, weights, module, "weight_zero_point");
    if let Some(zero) = &zero {
        let groups = columns.div_ceil(block.1);
        let wrapped = match scheme.codes {
            Codes::Packed(bits) => {
                zero.dtype == Dtype::I32 && zero.shape == [rows.div_ceil((32 / bits) as usize), groups]
            }
            _ => false,
        };
        if !(wrapped || zero.dtype == Dtype::I8 && zero.shape == scale.shape) {
            let found = format!("{:?} {:?}", zero.dtype, zero.shape);
            return Err(format!(
                "has a {module}.weight_zero_point of {found}, which does not fit its scale of {:?}",
                scale.shape
            ));
        }
    }
    let groups = take_if(integers, weights, module, "weight_g_idx");
    if let Some(groups) = &groups
        && (groups.dtype != Dtype::I32 || groups.shape != [columns])
    {
        let found = format!("{:?} {:?}", groups.dtype, groups.shape);
        return Err(format!("has a {module}.weight_g_idx of {found}; expected I32 [{columns}]"));
    }
    for part in OF_ACTIVATIONS {
        take(&mut weights.tensors, module, part);
    }
    let quantised = Quantised { codes: scheme.codes, block, scale, zero, groups };
    Ok(Entry { shape: whole, quantised: Some(Arc::new(quantised)), ..codes })
}

fn take_if(asked: bool, weights: &mut Weights, module: &str, part: &str) -> Option<Entry> {
    if asked { take(&mut weights.tensors, module, part) } else { None }
}

/// Two whole numbers of a tensor.
fn sizes(dtype: Dtype, bytes: &[u8]) -> Option<Vec<usize>> {
    let sizes: Vec<usize> = match dtype {
        Dtype::I64 => {
            bytes.as_chunks().0.iter().map(|b| usize::try_from(i64::from_le_bytes(*b)).ok()).collect::<Option<_>>()
        }
        Dtype::I32 => words(bytes).map(|word| usize::try_from(word as i32).ok()).collect(),
        _ => None,
    }?;
    (sizes.len() == 2).then_some(sizes)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b))
}

impl Quantised {
    /// That of a matrix in nf4 with these scales.
    pub(super) fn nf4(scale: Entry) -> Self {
        Self { codes: Codes::Nf4, block: (1, 1), scale, zero: None, groups: None }
    }

    /// The values of a matrix of `shape`, row by row; `part` gives the bytes of a part.
    ///
    /// # Errors
    /// What is wrong with the tensor: a code or a scale that is no number, a product that f32 has no room for, a group that is none.
    pub(super) fn decode<'a>(
        &self,
        shape: &[usize],
        codes: &[u8],
        part: impl Fn(&Entry) -> &'a [u8],
    ) -> std::result::Result<Vec<f32>, String> {
        if self.codes == Codes::Nf4 {
            return nf4::decode(codes, part(&self.scale), shape);
        }
        let &[rows, columns] = shape else { return Err(format!("has shape {shape:?} and is no matrix")) };
        let scales = scales(self.scale.dtype, part(&self.scale))?;
        let per_row = columns.div_ceil(self.block.1);
        let group = self.groups_of(columns, per_row, &part)?;
        let zeros = self.zeros(rows, per_row, scales.len(), &part);
        let mut values = self.numbers(codes, columns);
        for (i, row) in values.chunks_exact_mut(columns.max(1)).enumerate() {
            let first = i / self.block.0 * per_row;
            for (j, (value, group)) in row.iter_mut().zip(&group).enumerate() {
                let zero = zeros.as_ref().map_or(0.0, |zeros| zeros[first + group]);
                let scale = scales[first + group];
                let code = *value - zero;
                *value = code * scale;
                if !value.is_finite() {
                    let why = match code.is_nan() {
                        true => "holds a code that is no number (NaN)".to_owned(),
                        false => format!("holds {code} times the scale {scale:e}, too large for 32 bits,"),
                    };
                    return Err(format!("{why} in row {i}, column {j}"));
                }
            }
        }
        Ok(values)
    }

    /// What the codes stand for, without scales and zeros.
    fn numbers(&self, bytes: &[u8], columns: usize) -> Vec<f32> {
        match self.codes {
            Codes::E4m3 => {
                let table: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
                bytes.iter().map(|byte| table[usize::from(*byte)]).collect()
            }
            // Its levels and scales belong together.
            Codes::Nf4 => Vec::new(),
            Codes::Int8 => bytes.iter().map(|byte| f32::from(byte.cast_signed())).collect(),
            Codes::Packed(bits) => {
                let per_word = (32 / bits) as usize;
                let words: Vec<u32> = words(bytes).collect();
                let row = |row: &[u32]| {
                    (0..columns).map(|j| unpacked(row[j / per_word], j % per_word, bits)).collect::<Vec<_>>()
                };
                words.chunks_exact(columns.div_ceil(per_word).max(1)).flat_map(row).collect()
            }
        }
    }

    /// The group that each column belongs to.
    fn groups_of<'a>(
        &self,
        columns: usize,
        groups: usize,
        part: impl Fn(&Entry) -> &'a [u8],
    ) -> std::result::Result<Vec<usize>, String> {
        let in_order = || (0..columns).map(|j| j / self.block.1).collect();
        let Some(stored) = &self.groups else { return Ok(in_order()) };
        let stored: Vec<i32> = words(part(stored)).map(u32::cast_signed).collect();
        // As compressed-tensors marks what it has not ordered.
        if stored.contains(&-1) {
            return Ok(in_order());
        }
        let group = |at: &i32| {
            let found = usize::try_from(*at).ok().filter(|at| *at < groups);
            found.ok_or_else(|| format!("has a column of group {at} in weight_g_idx, and there are {groups} groups"))
        };
        stored.iter().map(group).collect()
    }

    /// What code stands for zero, for each scale.
    fn zeros<'a>(
        &self,
        rows: usize,
        groups: usize,
        scales: usize,
        part: impl Fn(&Entry) -> &'a [u8],
    ) -> Option<Vec<f32>> {
        let zero = self.zero.as_ref()?;
        let bytes = part(zero);
        Some(match (self.codes, zero.dtype) {
            (Codes::Packed(bits), Dtype::I32) => {
                let words: Vec<u32> = words(bytes).collect();
                let per_word = (32 / bits) as usize;
                // Packed along the rows.
                let at = |i: usize| {
                    unpacked(words[i / groups / per_word * groups + i % groups], i / groups % per_word, bits)
                };
                (0..rows.min(scales) * groups).map(at).collect()
            }
            _ => bytes.iter().map(|byte| f32::from(byte.cast_signed())).collect(),
        })
    }
}

/// The number at a place of a word.
fn unpacked(word: u32, place: usize, bits: u32) -> f32 {
    let code = word >> (place as u32 * bits) & ((1 << bits) - 1);
    (code.cast_signed() - (1 << (bits - 1))) as f32
}

/// Scales in f32. A byte is an exponent alone: 2^(byte − 127).
fn scales(dtype: Dtype, bytes: &[u8]) -> std::result::Result<Vec<f32>, String> {
    let exponent = |byte: &u8| match *byte {
        0 => f32::from_bits(1 << 22),
        u8::MAX => f32::NAN,
        byte => f32::from_bits(u32::from(byte) << 23),
    };
    let scales = match dtype {
        Dtype::F8_E8M0 | Dtype::U8 => bytes.iter().map(exponent).collect(),
        Dtype::F32 | Dtype::BF16 | Dtype::F16 => decode(dtype, bytes)?,
        other => return Err(format!("has a scale of {other:?}; only F32, BF16, F16 and F8_E8M0 are read")),
    };
    match scales.iter().position(|scale: &f32| !scale.is_finite()) {
        Some(at) => Err(format!("has a scale that is {}, at place {at}", scales[at])),
        None => Ok(scales),
    }
}
