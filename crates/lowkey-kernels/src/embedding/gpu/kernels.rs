//! The kernels of the embedding's gradient.

use cubecl::prelude::*;

/// Chains the places of each token: `chain[place]` is the token's next place, or `tokens` at its last; where it is not its first,
/// `tokens + 1` more.
///
/// A unit goes to each place and looks to both sides until it finds its token again: a number of comparisons that grows with the square
/// of the tokens at worst, but neighbours compare neighbours, so that planes read whole lines of a cache.
#[cube(launch)]
pub(super) fn chain(ids: &[i32], chain: &mut [i32], tokens: usize) {
    let mut place = ABSOLUTE_POS;
    while place < tokens {
        let id = ids[place];
        let mut next = place + 1;
        let mut looking = true;
        while looking {
            // What is read beyond the end does not count.
            let ended = next >= tokens;
            if ended || ids[next] == id {
                looking = false;
            } else {
                next += 1;
            }
        }
        // One more than the place before, 0 where there is none.
        let mut before = place;
        looking = before > 0;
        while looking {
            if ids[before - 1] == id {
                looking = false;
            } else {
                before -= 1;
                looking = before > 0;
            }
        }
        if before > 0 {
            next += tokens + 1;
        }
        chain[place] = next as i32;
        place += CUBE_DIM as usize * CUBE_COUNT;
    }
}

/// Sums the gradients of a token's places, `grad [tokens, width]`, into its row of `out`, which is 0 before.
///
/// A cube goes to each place, and works if it is the first of its token. Neither a sort nor an atomic addition is needed, and no unit
/// waits for another: a repetition gives the same bits.
#[cube(launch)]
pub(super) fn embed_grad(ids: &[i32], chain: &[i32], grad: &[f32], out: &mut [f32], tokens: usize, width: usize) {
    let mut first = CUBE_POS_X as usize;
    while first < tokens {
        if chain[first] as usize <= tokens {
            let row = ids[first] as usize * width;
            let mut column = UNIT_POS as usize;
            while column < width {
                let mut sum = 0.0f32;
                let mut place = first;
                while place < tokens {
                    sum += grad[place * width + column];
                    let mut next = chain[place] as usize;
                    if next > tokens {
                        next -= tokens + 1;
                    }
                    place = next;
                }
                out[row + column] = sum;
                column += CUBE_DIM as usize;
            }
        }
        first += CUBE_COUNT_X as usize;
    }
}
