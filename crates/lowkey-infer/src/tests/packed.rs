//! Decoding from packed matrices.

use lowkey_kernels::quantized_linear::Quantization;

use super::formats::error;
use super::*;
use crate::{CacheDtype, Decoder};

/// Matrices in bf16 say what they say, whatever the form; with a cache in bf16 what is rounded besides moves the logits by little.
#[test]
fn packed_matrices_decode_as_their_numbers_do() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let config = ModelConfig { initializer_range: Some(0.2), ..config };
        let model = CausalLm::init(&config, seed as u64, &Device::flex());
        let ids = tokens(40, 1200);
        for quantization in [Quantization::Bf16, Quantization::Int8] {
            let packed = model.packed_to_read(quantization).unwrap();
            let expected = uncached(&packed, &ids);
            let moved = error(&expected, &uncached(&model, &ids));
            assert!(moved > 1e-5 && moved < 0.05, "{name}, {quantization:?}: {moved:.1e}");
            for (dtype, most) in [(CacheDtype::F32, 1e-5), (CacheDtype::Bf16, 2e-2)] {
                for form in [Form::Expanded, Form::Absorbed, Form::Auto] {
                    for chunk in [1, 15] {
                        let mut decoder = Decoder::with_cache(&packed, [1, 40], dtype, form, &Device::flex()).unwrap();
                        let parts = ids.chunks(chunk);
                        let found: Vec<Vec<f32>> =
                            parts.flat_map(|part| rows(packed.logits(decoder.advance(&[part]).unwrap()))).collect();
                        let error = error(&found, &expected);
                        assert!(error < most, "{name}, {quantization:?}, {dtype}, {form}, chunk {chunk}: {error:.1e}");
                    }
                }
            }
        }
    }
}
