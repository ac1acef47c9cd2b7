//! The kernel of the embedding's gradient.

use cubecl::prelude::*;

use crate::gpu::rows::UNITS;

/// Sums the gradients of a token's places, `grad [tokens, width]`, into its row of `out`, which is 0 before.
///
/// A cube goes to each place, and works if it is the first of its token: it looks through all ids for the others. That is a number of
/// comparisons that grows with the square of the tokens, but they are integers from a cache, and neither a sort nor an atomic
/// addition is needed: a repetition gives the same bits.
#[cube(launch)]
pub(super) fn embed_grad(ids: &[i32], grad: &[f32], out: &mut [f32], tokens: usize, width: usize) {
    let unit = UNIT_POS as usize;
    let mut same = Shared::<[u32]>::new_slice(comptime!(UNITS as usize));
    let mut earlier = Shared::<[u32]>::new_slice(1usize);
    let mut place = CUBE_POS_X as usize;
    while place < tokens {
        let id = ids[place];
        if unit == 0 {
            earlier[0] = 0;
        }
        sync_cube();
        let mut i = unit;
        while i < place {
            if ids[i] == id {
                // Whoever writes writes the same.
                earlier[0] = 1;
            }
            i += CUBE_DIM as usize;
        }
        sync_cube();
        if earlier[0] == 0 {
            let row = id as usize * width;
            let mut first = place;
            while first < tokens {
                same[unit] = 0;
                if first + unit < tokens && ids[first + unit] == id {
                    same[unit] = 1;
                }
                sync_cube();
                for other in 0..CUBE_DIM as usize {
                    if same[other] == 1 {
                        let from = (first + other) * width;
                        let mut column = unit;
                        while column < width {
                            out[row + column] += grad[from + column];
                            column += CUBE_DIM as usize;
                        }
                    }
                }
                sync_cube();
                first += CUBE_DIM as usize;
            }
        }
        sync_cube();
        place += CUBE_COUNT_X as usize;
    }
}
