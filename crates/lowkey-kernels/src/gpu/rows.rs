//! Kernels that give each row of a matrix to one cube: their sizes, and what one number from each unit adds up to.

use cubecl::prelude::*;

/// Units of a cube that works on a row.
pub(crate) const UNITS: u32 = 128;

/// Most cubes in one direction: what every graphics API takes. In tests so few that all kernels go round their loops.
pub(crate) const CUBES: usize = if cfg!(test) { 7 } else { 65_535 };

/// The sum of one number from each unit, for all of them.
#[cube]
pub(crate) fn add_up(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    let mut step = CUBE_DIM / 2;
    while step > 0 {
        if UNIT_POS < step {
            let other = scratch[unit + step as usize];
            scratch[unit] += other;
        }
        sync_cube();
        step /= 2;
    }
    let total = scratch[0];
    sync_cube();
    total
}

/// The largest of one number from each unit, for all of them; a number that is none does not count.
#[cube]
pub(crate) fn largest(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    let mut step = CUBE_DIM / 2;
    while step > 0 {
        if UNIT_POS < step {
            let other = scratch[unit + step as usize];
            if other > scratch[unit] {
                scratch[unit] = other;
            }
        }
        sync_cube();
        step /= 2;
    }
    let highest = scratch[0];
    sync_cube();
    highest
}
