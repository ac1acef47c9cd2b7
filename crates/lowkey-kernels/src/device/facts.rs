//! What is known of a device and of its work.

use burn::tensor::Device;

/// What a GPU, or what stands in for one, is and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// The part as it names itself.
    pub part: String,
    /// What kernels are compiled for.
    pub target: String,
    /// A rasteriser that runs on the CPU.
    pub software: bool,
    /// Largest number of bytes in one tensor.
    pub max_tensor: u64,
    /// Bytes of shared memory of a cube (block, work group).
    pub shared_memory: usize,
    /// Units (threads) of a cube.
    pub units: u32,
    /// Units that run in step, at least and at most.
    pub plane: (u32, u32),
    /// Tensors of a kernel.
    pub bindings: u32,
    /// Formats that can be calculated with.
    pub dtypes: Vec<&'static str>,
    /// Formats and sizes of products on matrix units, `bf16 16×16×16`; empty: there are none.
    pub matrix_units: Vec<String>,
}

/// What a GPU has spent on one kernel, or on all launches for one purpose.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The product with its shape, or the kernel's own name.
    pub name: String,
    /// How often it ran.
    pub launches: usize,
    /// All launches together, on the device's clock where it has one.
    pub seconds: f64,
    /// Floating-point operations of all launches; 0 where they were not counted.
    pub flops: f64,
}

/// Whether tensors of this device lie in the main memory and are worked on by the CPU's kernels.
pub fn is_cpu(device: &Device) -> bool {
    *device == Device::flex()
}
