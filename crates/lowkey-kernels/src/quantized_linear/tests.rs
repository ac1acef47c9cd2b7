//! Packed matrices against what their layout says, and the packed linear map against the plain one of the unpacked matrix.

use super::*;
use crate::cpu::linear::FEW;
use crate::fixtures::{Leaf, assert_close, compare, device, host, plain_device, random};

/// Those whose numbers share scales.
const SCALED: [Quantization; 3] = [Quantization::Int8, Quantization::Int4, Quantization::Nf4];

/// Numbers off zero, of unequal size from row to row, with rows of zeros.
fn numbers([d_out, d_in]: [usize; 2]) -> Vec<f32> {
    let of_row = |row: usize| if row % 7 == 3 { 0.0 } else { 0.1 + (row % 5) as f32 };
    let number = |i: usize| ((i * 7919 + 13) % 2003) as f32 / 1000.0 - 0.6;
    (0..d_out * d_in).map(|i| number(i) * of_row(i / d_in)).collect()
}

fn packed(shape: [usize; 2], quantization: Quantization) -> Packed {
    Packed::new(&numbers(shape), shape, quantization)
}

/// The numbers that share a scale.
fn blocks([d_out, d_in]: [usize; 2], quantization: Quantization) -> Vec<std::ops::Range<usize>> {
    let (stretch, block) = match quantization {
        Quantization::Int8 => (d_in, d_in),
        Quantization::Int4 => (d_in, 64),
        Quantization::Nf4 | Quantization::Bf16 => (d_out * d_in, 64),
    };
    let stretches = (0..d_out * d_in).step_by(stretch);
    let blocks = stretches.flat_map(|from| (from..from + stretch).step_by(block).map(move |at| (at, from + stretch)));
    blocks.map(|(at, end)| at..(at + block).min(end)).collect()
}

const SHAPES: [[usize; 2]; 7] = [[1, 1], [5, 37], [3, 64], [8, 65], [11, 129], [310, 300], [2, 700]];

#[test]
fn each_number_becomes_the_nearest_that_its_scale_allows() {
    for shape in SHAPES {
        for quantization in SCALED {
            let (values, packed) = (numbers(shape), packed(shape, quantization));
            let found = packed.values();
            let blocks = blocks(shape, quantization);
            assert_eq!(packed.scales.len(), blocks.len(), "{shape:?}, {quantization:?}");
            for (block, scale) in blocks.into_iter().zip(&packed.scales) {
                let largest = values[block.clone()].iter().fold(0f32, |m, x| m.max(x.abs()));
                let levels: Vec<f32> = match quantization {
                    Quantization::Int8 => (-127..=127).map(|code| code as f32 * (largest / 127.0)).collect(),
                    Quantization::Int4 => (-7..=7).map(|code| code as f32 * (largest / 7.0)).collect(),
                    Quantization::Nf4 | Quantization::Bf16 => NF4.iter().map(|level| level * largest).collect(),
                };
                assert!(levels.iter().any(|level| (level.abs() - largest).abs() <= 1e-6 * largest));
                for i in block {
                    let nearest = levels.iter().map(|level| (level - values[i]).abs()).fold(f32::INFINITY, f32::min);
                    let off = (found[i] - values[i]).abs();
                    assert!(
                        off <= nearest + 1e-6 * largest,
                        "{shape:?}, {quantization:?}, {scale}: {off} for {nearest}"
                    );
                    assert!(largest > 0.0 || found[i] == 0.0);
                }
            }
            // What has been packed stays as it is.
            let again = Packed::new(&found, shape, quantization);
            assert_close("packed twice", again.values(), found);
            let Packed { codes, scales, .. } = packed.clone();
            let parts = |codes: &[u8]| Packed::from_parts(codes.to_vec(), scales.clone(), shape, quantization);
            assert_eq!(parts(&codes), Some(packed));
            assert_eq!(parts(&codes[1..]), None);
        }
    }
}

#[test]
fn codes_lie_as_the_layouts_say() {
    // Two rows of 48: of NF4 the second block begins in the second row.
    let values: Vec<f32> = (0..96).map(|i| NF4[i % 16] * if i < 64 { 3.0 } else { 0.5 }).collect();
    let nf4 = Packed::new(&values, [2, 48], Quantization::Nf4);
    let sixteen: Vec<u8> = (0..8u8).map(|i| (2 * i) << 4 | (2 * i + 1)).collect();
    assert_eq!(nf4.codes, sixteen.repeat(6));
    assert_eq!(nf4.scales, [3.0, 0.5]);
    assert_eq!(nf4.values(), values);
    // Of whole numbers of 4 bits each row has groups of its own, and rows of odd width share a byte.
    let int4 = Packed::new(&[7.0, -7.0, 1.0, 2.0, -14.0, 0.0], [2, 3], Quantization::Int4);
    assert_eq!(int4.codes, [0xf1, 0x99, 0x18]);
    assert_eq!(int4.scales, [1.0, 2.0]);
    let int8 = Packed::new(&[127.0, -127.0, 1.0, 2.0, -254.0, 0.0], [2, 3], Quantization::Int8);
    assert_eq!(int8.codes, [127, 129, 1, 1, 129, 0]);
    assert_eq!(int8.scales, [1.0, 2.0]);
    // Half way between two levels.
    let between = Packed::new(&[1.0, f32::midpoint(NF4[8], NF4[9]), 0.0], [1, 3], Quantization::Nf4);
    assert_eq!(between.codes, [0xf8, 0x70]);
}

#[test]
fn what_is_no_number_is_not_made_one() {
    for quantization in SCALED {
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 130];
            values[1] = wrong;
            let found = Packed::new(&values, [2, 65], quantization).values();
            assert!(found[1].is_nan() && found[2].is_nan(), "{quantization:?}");
            assert_eq!(found[129], 1.0, "{quantization:?}: other scales are as they were");
        }
    }
}

#[test]
fn in_bf16_each_number_is_for_itself() {
    let wrong = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, 3.0, f32::MAX];
    let found = Packed::new(&wrong, [1, 7], Quantization::Bf16);
    assert!(found.values()[0].is_nan());
    assert_eq!(
        found.values()[1..6],
        [f32::INFINITY, f32::NEG_INFINITY, 0.0, half::bf16::from_f32(1e-40).to_f32(), 3.0]
    );
    assert_eq!(found.codes[2..4], [0x80, 0x7f], "the lower byte first");
    for shape in SHAPES {
        let (values, found) = (numbers(shape), packed(shape, Quantization::Bf16));
        let expected: Vec<f32> = values.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        assert_eq!(found.values(), expected);
        assert_eq!(Packed::new(&expected, shape, Quantization::Bf16), found, "what has been packed stays as it is");
        assert_eq!(Packed::from_parts(found.codes.clone(), vec![1.0], shape, Quantization::Bf16), Some(found));
    }
}

/// Of many tokens to the last bit; else numbers are added up in the order of their codes, and of rows of odd width tiles are taken.
#[test]
fn few_tokens_get_the_same_products_from_packed_and_whole_matrices() {
    if !crate::fixtures::is_cpu() {
        return println!("skipped: a GPU unpacks the whole matrix");
    }
    device().seed(25);
    for [d_out, d_in] in [[1, 2], [37, 29], [300, 601], [24, 1408], [33, 64], [9, 192], [700, 512]] {
        for quantization in Quantization::ALL {
            let matrix = QuantizedMatrix::new(&packed([d_out, d_in], quantization), &plain_device());
            for count in (1..20).chain([47, 48]) {
                let wide = random([1, count, d_in + 3], 1.0).inner();
                let (x, residual) = (wide.narrow(2, 1, d_in), random([1, count, d_out], 1.0).inner());
                let what = format!("{quantization:?} {d_out} × {d_in}, {count} tokens");
                let same = |found: Tensor<3>, expected: Tensor<3>| {
                    let (found, expected) = (host(found), host(expected));
                    let unpacked = match quantization {
                        Quantization::Bf16 => false,
                        Quantization::Int8 => count > FEW,
                        Quantization::Int4 | Quantization::Nf4 => count > 40,
                    };
                    match !unpacked || d_in % 2 == 1 {
                        true => assert_close(&what, found, expected),
                        false => assert_eq!(found, expected, "{what}"),
                    }
                };
                same(matrix.linear(x.clone(), None), crate::linear(x.clone(), matrix.unpack(), None));
                let sum = crate::add_linear(residual.clone(), x.clone(), matrix.unpack(), None);
                same(matrix.add_linear(residual, x, None), sum);
            }
        }
    }
}

#[test]
fn a_packed_matrix_takes_the_bytes_that_are_told() {
    for shape in SHAPES {
        for quantization in Quantization::ALL {
            let packed = packed(shape, quantization);
            let bytes = packed.codes.len().next_multiple_of(4) + 4 * packed.scales.len();
            assert_eq!(quantization.bytes(shape), bytes);
        }
    }
    let share = |quantization: Quantization| quantization.bytes([512, 1024]) as f64 / (4 * 512 * 1024) as f64;
    assert!(share(Quantization::Int8) < 0.252 && share(Quantization::Bf16) < 0.500_01);
    assert_eq!([Quantization::Int4, Quantization::Nf4].map(share), [0.140625; 2]);
}

#[test]
fn a_matrix_is_unpacked_alike_everywhere() {
    for shape in SHAPES {
        for quantization in Quantization::ALL {
            let packed = packed(shape, quantization);
            for device in [device(), plain_device()] {
                let matrix = QuantizedMatrix::new(&packed, &device);
                assert_eq!((matrix.dims(), matrix.quantization()), (shape, quantization));
                let plain = reference::unpack(matrix.words.clone(), matrix.scales.clone(), matrix.layout);
                assert_eq!(host(plain), packed.values(), "{shape:?}, {quantization:?}");
                assert_eq!(host(matrix.unpack()), packed.values(), "{shape:?}, {quantization:?}");
            }
        }
    }
}

#[test]
fn products_and_gradients_agree_with_those_of_the_unpacked_matrix() {
    device().seed(23);
    let sizes = [[1, 1], [2, 3], [1, 7], [3, 85], [1, 300]];
    for (i, [d_out, d_in]) in SHAPES.into_iter().enumerate() {
        let [batch, seq] = sizes[i % sizes.len()];
        for quantization in Quantization::ALL {
            let matrix = QuantizedMatrix::new(&packed([d_out, d_in], quantization), &device());
            // A view of a wider tensor, whose numbers lie off zero.
            let wide = (random([batch, seq, d_in + 3], 1.0) + 2.0).detach().require_grad();
            let x = || wide.clone().narrow(2, 2, d_in);
            let (bias, residual) = (random([d_out], 1.0), random([batch, seq, d_out], 1.0));
            let plain = || reference::quantized_linear(x(), &matrix) + bias.clone().unsqueeze::<3>();
            let inputs = [("x", Leaf::Three(wide.clone())), ("bias", Leaf::One(bias.clone()))];
            compare(quantization.name(), &inputs, || matrix.linear(x(), Some(bias.clone())), plain);
            let inputs = [("x", Leaf::Three(wide.clone())), ("residual", Leaf::Three(residual.clone()))];
            compare(
                quantization.name(),
                &inputs,
                || matrix.add_linear(residual.clone(), x(), None),
                || residual.clone() + reference::quantized_linear(x(), &matrix),
            );
        }
    }
}

/// Few rows and many tokens, which threads share, and more than a tile both ways.
#[test]
fn threads_change_no_number() {
    if !crate::fixtures::is_cpu() {
        return println!("skipped: a GPU has one queue");
    }
    device().seed(24);
    for [d_out, d_in, seq] in [[40, 520, 1100], [600, 270, 40]] {
        for quantization in Quantization::ALL {
            let matrix = QuantizedMatrix::new(&packed([d_out, d_in], quantization), &device());
            let x = random([1, seq, d_in], 1.0);
            let of = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let y = matrix.linear(x.clone(), None);
                    let gradient = x.grad(&y.clone().square().sum().backward()).unwrap();
                    (host(y), host(gradient))
                })
            };
            let alone = of(1);
            assert_eq!(of(3), alone, "{quantization:?}");
            assert_close("product", alone.0, host(reference::quantized_linear(x.clone(), &matrix)));
        }
    }
}

#[test]
fn a_sum_does_not_write_over_a_residual_that_is_still_needed() {
    let matrix = QuantizedMatrix::new(&packed([4, 5], Quantization::Nf4), &plain_device());
    let ones = |width| Tensor::<3>::ones([1, 9, width], &plain_device());
    let residual = ones(4);
    let first = host(matrix.add_linear(residual.clone(), ones(5), None));
    assert_eq!(host(residual.clone()), vec![1.0; 36]);
    assert_eq!(host(matrix.add_linear(residual, ones(5), None)), first);
}
