//! How an attention is cut for a device's matrix units.

use burn::tensor::DType;
use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};

/// Sizes of the products that matrix units compute, and of what a cube works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    /// Rows of one product.
    pub(crate) m: usize,
    /// Columns of one product.
    pub(crate) n: usize,
    /// Terms of each number of one product.
    pub(crate) k: usize,
    /// Units of a plane.
    pub(crate) lanes: usize,
    /// Planes of a cube.
    pub(crate) planes: usize,
    /// Rows on the other side that are seen at a time; a multiple of `n` and `k`.
    pub(crate) block: usize,
    /// Units that share a row of scores.
    pub(crate) spread: usize,
    /// Numbers of 16 bits that a unit reads at once; divides the widths.
    pub(crate) vector: usize,
}

/// Widths of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Widths {
    pub(crate) heads: usize,
    pub(crate) groups: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
}

/// An operand in shared memory: how far its rows are apart, and how many numbers one of its elements holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    pub(super) pitch: usize,
    pub(super) vector: usize,
}

impl Widths {
    /// Width of queries and keys.
    pub(crate) fn key(self) -> usize {
        self.nope + self.rope
    }

    /// Width of a group's row of keys and values.
    pub(crate) fn kv(self) -> usize {
        self.nope + self.value
    }
}

impl Geometry {
    /// Rows of a cube.
    pub(crate) fn rows(self) -> usize {
        self.m * self.planes
    }

    /// A width filled up to whole products, whichever side it stands on.
    pub(crate) fn whole(self, width: usize) -> usize {
        width.next_multiple_of(self.n.max(self.k))
    }

    /// Distance of rows of 16-bit numbers in shared memory: 16 bytes more than the width, against bank conflicts, and whole vectors.
    pub(crate) fn pitch(self, width: usize) -> usize {
        self.whole(width) + 8
    }

    /// How rows of that width lie there.
    pub(super) fn layout(self, width: usize) -> Layout {
        Layout { pitch: self.pitch(width), vector: self.vector }
    }

    /// The same where they are written number by number.
    pub(super) fn scalars(self, width: usize) -> Layout {
        Layout { pitch: self.pitch(width), vector: 1 }
    }

    /// The same for scores, of 32 bits.
    pub(crate) fn score_pitch(self) -> usize {
        self.block + 4
    }

    /// Bytes of shared memory of the hungriest kernel, that of the gradients of keys and values.
    pub(crate) fn shared_bytes(self, widths: Widths) -> usize {
        let halves = (self.rows() + self.block) * (self.pitch(widths.key()) + self.pitch(widths.value))
            + 2 * self.rows() * self.pitch(self.block);
        let singles = 2 * self.rows() * self.score_pitch() + 3 * self.block;
        let forward = self.rows() * (4 + 2 * self.spread);
        2 * halves + 4 * (singles + forward) + 64
    }

    fn fits(self, widths: Widths, client: &Client) -> bool {
        let hardware = &client.properties().hardware;
        let (across, down, _) = hardware.max_cube_dim;
        self.shared_bytes(widths) <= hardware.max_shared_memory_size
            && (self.lanes * self.planes) as u32 <= hardware.max_units_per_cube
            && self.lanes as u32 <= across
            && self.planes as u32 <= down
    }
}

impl std::fmt::Display for Geometry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { m, n, k, planes, block, .. } = self;
        write!(f, "matrix units {m}×{n}×{k}, {planes} planes, blocks of {block}")
    }
}

/// Most numbers of 16 bits that a device reads at once and rows of these widths can be read by.
fn vector(client: &Client, widths: Widths) -> usize {
    let hardware = &client.properties().hardware;
    let most = (hardware.load_width as usize / 16).min(hardware.max_vector_size);
    let divides = |vector: &usize| {
        *vector <= most && [widths.nope, widths.rope, widths.value].iter().all(|width| width.is_multiple_of(*vector))
    };
    [8, 4, 2].into_iter().find(divides).unwrap_or(1)
}

/// The geometries that a device can run with operands of `dtype`; empty where it has no fitting matrix units, or planes of varying
/// size.
pub(crate) fn geometries(client: &Client, dtype: DType, widths: Widths) -> Vec<Geometry> {
    let operand = match dtype {
        DType::BF16 => ElemType::Float(FloatKind::BF16),
        DType::F16 => ElemType::Float(FloatKind::F16),
        _ => return Vec::new(),
    };
    let properties = client.properties();
    let lanes = properties.hardware.plane_size_max as usize;
    if properties.hardware.plane_size_min as usize != lanes {
        return Vec::new();
    }
    let fitting = properties.features.matmul.cmma.iter().filter(|config| {
        config.a_type == operand && config.b_type == operand && config.cd_type == ElemType::Float(FloatKind::F32)
    });
    let mut sizes: Vec<_> = fitting.map(|config| (config.m as usize, config.n as usize, config.k as usize)).collect();
    // Square ones first: they read the fewest numbers for each product.
    sizes.sort_by_key(|(m, n, _)| m.abs_diff(*n));
    sizes.truncate(1);
    let vector = vector(client, widths);
    let mut found = Vec::new();
    for (m, n, k) in sizes {
        for (planes, block) in [(4, 64), (4, 32), (8, 64), (8, 32), (4, 16), (2, 16)] {
            let geometry = Geometry { m, n, k, lanes, planes, block, spread: (lanes / m).max(1), vector };
            if block % n.max(k) == 0 && geometry.fits(widths, client) {
                found.push(geometry);
            }
        }
    }
    // The smallest are for devices with little shared memory.
    found.truncate(4);
    found
}
