//! The operations that a decoder block spends its time in, as functions over Burn tensors.
//!
//! **Purpose.** One place for the arithmetic that decides speed: linear maps, RMSNorm, rotary embedding, the feed-forward layer,
//! attention and cross entropy, and what an optimiser does with the gradients. Everything above this crate composes these
//! functions and never touches a backend primitive.
//!
//! **Main functions.** [`linear`], [`add_linear`], [`rms_norm`], [`rotate`], [`latent_attention`], [`causal_attention`],
//! [`mlp::gated_mlp`], the [`loss`]es for training; [`adapted`] for maps with an adapter beside them, [`recalled`] where that
//! adapter is more than two factors;
//! [`cache::absorbed_attention`], [`cache::expanded_attention`] and [`cache::chunk_attention`] for queries against a cache, which may be
//! [`cache::Stored`] in fewer bits; [`quantized_linear`] for frozen matrices in 4 or 8 bits; [`optim`] for updates; [`routing`] for
//! mixtures of experts.
//!
//! **Flow.** `lowkey-model` calls the functions from its blocks. Each fused one is an operation of its own in Burn's autodiff,
//! with a backward pass that recomputes rather than stores: neither a T×T score matrix nor a matrix of tokens × vocabulary
//! exists in training, and of a latent attention's keys and values nothing is kept. On the CPU they run on plain slices,
//! vectorised for whatever the processor has, in parallel on the current rayon pool; products of weights are those of the
//! `gemm` crate, those inside an attention are tiles of registers; in bf16 both are blocks of packed operands. On GPUs (feature `wgpu`, `vulkan`, `metal` or `cuda`) they are
//! CubeCL kernels, and what reads a cache is a composition; products of weights are kernels of CubeK and attentions of 16 bits run on
//! matrix units, the fastest of several being chosen at a shape's first use. Tensors that are not f32 take the [`mod@reference`].
//!
//! **Where to find things.** Each operation is one file with its entry and one folder with all else of it: `reference.rs` says it in plain
//! tensor operations, `autodiff.rs` what a backend has to give and what the backward pass keeps, `cpu.rs` and `gpu.rs` compute it (with
//! `gpu/kernels.rs` for what runs on the device), `tests.rs` holds them to the reference. What several operations share lies in `cpu`
//! (products, tiles, rows), `gpu` (products, the choice between kernels, launches) and `autodiff` (whose gradients are wanted); an
//! operation may use another one's parts, as latent attention uses those of the causal one; no two use each other.
//!
//! **To add an operation.** Write `NAME/reference.rs` and list it in [`mod@reference`]. Declare in `NAME/autodiff.rs` a trait of its own
//! with `#[backend_extension]` for the forward pass, a second one for what the backward pass needs, and the place in autodiff. Implement
//! both traits in `NAME/cpu.rs` and `NAME/gpu.rs`, give `NAME.rs` the entry with its shapes and source, and export that here. Add
//! `NAME/tests.rs`, and to `differences` the slopes of its definition.
//!
//! **Devices.** [`device::open`] gives a device for a name, [`device::list`] all of them. A GPU has one queue for all threads.
//!
//! **What this crate does not know.** Models, parameters, names, files, text. It is the only crate that knows a backend.
//!
//! # Example
//!
//! A latent attention is its reference, to rounding:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use burn::tensor::{Distribution, Tensor};
//! use lowkey_kernels::{LatentWeights, MlaDims, latent_attention, reference};
//!
//! let device = lowkey_kernels::device::open("cpu")?;
//! let dims = MlaDims {
//!     heads: 2,
//!     nope: 4,
//!     rope: 2,
//!     value: 3,
//!     rank: 5,
//!     scale: 6f64.powf(-0.5),
//!     latent_scale: 1.0,
//!     latent_eps: 1e-6,
//!     interleave: true,
//! };
//! let wide = Distribution::Normal(0.0, 1.0);
//! let q = Tensor::<4>::random([1, 7, 2, 4 + 2], wide, &device);
//! let kv_a = Tensor::<3>::random([1, 7, 5 + 2], wide, &device);
//! let angles = Tensor::<4>::random([1, 7, 1, 1], wide, &device);
//! let weights = LatentWeights {
//!     norm: Tensor::ones([5], &device),
//!     kv_b: Tensor::random([2 * (4 + 3), 5], wide, &device),
//!     cos: angles.clone().cos(),
//!     sin: angles.sin(),
//! };
//! // Two documents in the row: of four positions and of three.
//! let starts = [0, 0, 0, 0, 4, 4, 4];
//!
//! let plain = reference::latent_attention(q.clone(), kv_a.clone(), weights.clone(), &starts, dims);
//! let fused = latent_attention(q, kv_a, weights, &starts, dims);
//! assert_eq!(fused.dims(), [1, 7, 2 * 3]);
//! assert!((fused - plain).abs().max().into_scalar::<f32>() < 1e-5);
//! # Ok(())
//! # }
//! ```

pub mod adapted;
mod autodiff;
pub mod cache;
mod causal_attention;
mod cpu;
pub mod device;
#[cfg(test)]
mod differences;
mod embedding;
#[cfg(test)]
mod fixtures;
#[cfg(feature = "gpu")]
mod gpu;
mod latent_attention;
mod linear;
pub mod loss;
mod masked_attention;
pub mod mlp;
mod norm;
pub mod optim;
pub mod precision;
pub mod quantized_linear;
pub mod recalled;
pub mod reference;
mod rotary;
pub mod routing;
mod swiglu;

pub use causal_attention::causal_attention;
pub use embedding::embed;
pub use latent_attention::{LatentWeights, MadeQueries, MlaDims, latent_attention, latent_attention_of};
pub use linear::{add_linear, linear};
pub use norm::rms_norm;
pub use precision::Precision;
pub use rotary::rotate;
