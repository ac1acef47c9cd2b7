//! Kernels in which each unit has one number of the result: how they are launched.

use cubecl::prelude::CubeCount;

use super::rows;

/// Units of a cube.
pub(crate) const UNITS: u32 = 256;

/// Cubes of pointwise kernels for so many numbers, spread over two directions where one is too short.
pub(crate) fn cubes(count: usize) -> CubeCount {
    let cubes = count.div_ceil(UNITS as usize);
    let rows = cubes.div_ceil(rows::CUBES);
    CubeCount::Static(cubes.div_ceil(rows.max(1)) as u32, rows as u32, 1)
}
