//! The kernel of the rotation.

use cubecl::prelude::*;

/// Rotates, or rotates back, `2 · half` components from `from` on of `x [rows, heads, width]`; tables are `[table_rows, half]`, read
/// again from their beginning where there are more rows.
#[cube(launch)]
pub(super) fn rotate(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    count: usize,
    heads: usize,
    width: usize,
    table_rows: usize,
    #[comptime] from: usize,
    #[comptime] half: usize,
    #[comptime] interleaved: bool,
    #[comptime] back: bool,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let component = at % width;
        let head = at - component;
        if component < from || component >= from + 2 * half {
            out[at] = x[at];
        } else {
            // The side whose pairs may lie interleaved is the unrotated one: the result of turning, the source of turning back.
            let place = component - from;
            let mut pair = place % half;
            let mut second = place / half;
            if comptime!(interleaved && back) {
                pair = place / 2;
                second = place % 2;
            }
            let mut a = head + from + pair;
            let mut b = head + from + half + pair;
            if comptime!(interleaved && !back) {
                a = head + from + 2 * pair;
                b = a + 1;
            }
            let turn = (at / (width * heads)) % table_rows * half + pair;
            let (c, s) = (cos[turn], sin[turn]);
            if comptime!(back) {
                if second == 0 {
                    out[at] = x[a] * c + x[b] * s;
                } else {
                    out[at] = x[b] * c - x[a] * s;
                }
            } else if second == 0 {
                out[at] = x[a] * c - x[b] * s;
            } else {
                out[at] = x[a] * s + x[b] * c;
            }
        }
    }
}
