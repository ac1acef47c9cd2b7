//! What other programs leave in weight files: names under which a tensor stands, and number formats that have values in f32.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;

use super::Entry;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Gives tensors the names that the model knows them by.
///
/// - `aliases` (name → the name under which it is stored) come from files in which tensors that share their memory are stored
///   once; which of the names is kept is left to chance.
/// - A base model is saved without the prefix of the model around it, and without an output head.
/// - Of a tied model a file may hold the one matrix as head only.
///
/// Returns whether it was a base model.
pub(super) fn settle_names(
    tensors: &mut BTreeMap<String, Entry>,
    aliases: BTreeMap<String, String>,
    tied: bool,
) -> bool {
    for (name, stored) in aliases {
        if let (false, Some(entry)) = (tensors.contains_key(&name), tensors.get(&stored)) {
            tensors.insert(name, entry.clone());
        }
    }
    let base = tensors.contains_key("embed_tokens.weight") && !tensors.keys().any(|name| name.starts_with("model."));
    if base {
        let whole = |name: String| if name == HEAD { name } else { format!("model.{name}") };
        *tensors = std::mem::take(tensors).into_iter().map(|(name, entry)| (whole(name), entry)).collect();
    }
    if tied
        && !tensors.contains_key(EMBEDDING)
        && let Some(head) = tensors.remove(HEAD)
    {
        tensors.insert(EMBEDDING.into(), head);
    }
    base
}

/// Lets the one matrix of a tied model stand under both of its names.
pub(super) fn untie(tensors: &mut BTreeMap<String, Entry>) {
    if let Some(entry) = tensors.get(EMBEDDING) {
        tensors.insert(HEAD.into(), entry.clone());
    }
}

/// Little-endian numbers in f32, which holds all of these exactly but the 64-bit ones: those are rounded, as in every program
/// that computes in f32.
///
/// # Errors
/// Why not: a format of no weights, or a number that f32 has no room for.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::BF16 => Ok(pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        Dtype::F16 => Ok(pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|b| {
                let wide = f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                let narrow = wide as f32;
                match wide.is_finite() && !narrow.is_finite() {
                    true => Err(format!("holds {wide}, which no 32-bit number is")),
                    false => Ok(narrow),
                }
            })
            .collect(),
        // The upper half of an f16.
        Dtype::F8_E5M2 => Ok(bytes.iter().map(|b| f16::from_bits(u16::from(*b) << 8).to_f32()).collect()),
        // Its one code that is no number has no place among weights.
        Dtype::F8_E4M3 => match bytes.iter().position(|b| b & 0x7f == 0x7f) {
            Some(at) => Err(format!("holds a code that is no number (NaN), at place {at}")),
            None => Ok(bytes.iter().map(|b| e4m3(*b)).collect()),
        },
        other => Err(format!(
            "has dtype {other:?}; only F32, BF16, F16, F64, F8_E4M3 and F8_E5M2 are read: save it in one of them"
        )),
    }
}

/// Sign, four bits of exponent, three of mantissa; no infinities (Micikevicius et al., arXiv 2209.05433).
pub(super) fn e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 0xf), f32::from(bits & 7));
    sign * match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_read_as_their_formats_define_them() {
        let read = |dtype, byte| decode(dtype, &[byte]).unwrap()[0];
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0xc0, -2.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(read(Dtype::F8_E4M3, byte), value, "{byte:#x}");
        }
        for code in [0x7f, 0xff] {
            assert!(decode(Dtype::F8_E4M3, &[0, code]).unwrap_err().contains("no number (NaN), at place 1"));
        }
        assert!(read(Dtype::F8_E4M3, 0x80).is_sign_negative());
        for (byte, value) in [(0x01, 2f32.powi(-16)), (0x3c, 1.0), (0xbe, -1.5), (0x7b, 57344.0)] {
            assert_eq!(read(Dtype::F8_E5M2, byte), value, "{byte:#x}");
        }
        assert_eq!(read(Dtype::F8_E5M2, 0x7c), f32::INFINITY);
    }

    #[test]
    fn each_of_the_256_codes_of_e4m3_is_its_formula() {
        let mut finite = 0;
        for code in 0..=u8::MAX {
            let sign = if code < 128 { 1.0 } else { -1.0 };
            let (exponent, mantissa) = ((code / 8 % 16) as f64, (code % 8) as f64);
            // OFP8: 2^(e−7) · (1 + m/8), below e = 1 without the one; 448 is the largest.
            let expected =
                if exponent == 0.0 { mantissa / 512.0 } else { (exponent - 7.0).exp2() * (1.0 + mantissa / 8.0) };
            match decode(Dtype::F8_E4M3, &[code]) {
                Ok(value) => {
                    assert_eq!(f64::from(value[0]), sign * expected, "{code:#x}");
                    assert!(value[0].abs() <= 448.0 && value[0].is_sign_negative() == (code >= 128));
                    finite += 1;
                }
                Err(why) => assert!(code % 128 == 127 && why.contains("NaN"), "{code:#x}: {why}"),
            }
        }
        assert_eq!(finite, 254);
    }

    #[test]
    fn sixty_four_bits_are_rounded_and_never_become_infinite() {
        let bytes = |x: f64| x.to_le_bytes();
        assert_eq!(decode(Dtype::F64, &bytes(0.1)).unwrap(), [0.1f32]);
        assert_eq!(decode(Dtype::F64, &bytes(f64::INFINITY)).unwrap(), [f32::INFINITY]);
        assert!(decode(Dtype::F64, &bytes(1e300)).unwrap_err().contains("holds 1"));
    }
}
