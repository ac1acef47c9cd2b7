//! What CUDA needs beside a driver when it runs.

use std::path::{Path, PathBuf};

/// The file of a CUDA toolkit that this build's compiler of kernels reads: LLVM the mathematical functions, NVRTC the headers.
const NEEDED: &str =
    if cfg!(feature = "cuda-nvrtc") { "include/cuda_fp16.h" } else { "nvvm/libdevice/libdevice.10.bc" };

/// Where toolkits lie if nobody says where: the places that the compilers look at.
const ROOTS: [&str; 4] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];

/// Why kernels could not be compiled here.
#[cfg(feature = "cuda")]
pub(super) fn lacks() -> Option<String> {
    missing(std::env::var_os("CUDA_PATH").map(PathBuf::from), &ROOTS.map(PathBuf::from))
}

fn missing(named: Option<PathBuf>, roots: &[PathBuf]) -> Option<String> {
    let there = |root: &Path| root.join(NEEDED).is_file();
    match named {
        Some(root) if there(&root) => None,
        Some(root) => Some(format!(
            "CUDA_PATH is {}, where {NEEDED} is not; its kernels are compiled with that part of the CUDA toolkit",
            root.display()
        )),
        None if roots.iter().any(|root| there(root)) => None,
        None => Some(format!(
            "its kernels are compiled with {NEEDED} of the CUDA toolkit, which is in none of {}; install the toolkit, or set CUDA_PATH \
             to a folder with that file",
            roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// Where a tensor's numbers lie.
#[cfg(feature = "cuda")]
pub(super) fn memory(tensor: &burn::tensor::Tensor<1>) -> Option<super::CudaMemory> {
    use burn_cubecl::{CubeBackend, CubeDevice};
    let tensor = tensor.clone().try_into_primitive::<CubeBackend>().ok()?;
    let CubeDevice::Cuda(device) = &tensor.device else { return None };
    if !tensor.is_contiguous() {
        return None;
    }
    let found = tensor
        .client
        .get_resource::<<cubecl::cuda::CudaRuntime as cubecl_runtime::runtime::Runtime>::Server>(tensor.handle)
        .ok()?;
    let (address, bytes) = (found.resource().ptr, usize::try_from(found.resource().size).ok()?);
    Some(super::CudaMemory { ordinal: device.index, address, bytes, _held: Box::new(found) })
}

/// Has CubeCL keep what it compiles: in `target/environment` of a checkout, else in the user's cache folder. A first run compiles some
/// hundred kernels to find the fastest, which takes minutes. Everything else is as `cubecl.toml` says, if there is one.
#[cfg(feature = "cuda")]
pub(super) fn keep_compiled_kernels() {
    use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.compilation.cache = true;
    // Refused where it has been read, in a second call of this.
    CubeClRuntimeConfig::try_set(config);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_toolkit_without_the_part_that_compiles_is_named_with_the_mend() {
        let dir = std::env::temp_dir().join(format!("lowkey-toolkit-{}", std::process::id()));
        let (whole, bare) = (dir.join("whole"), dir.join("bare"));
        std::fs::create_dir_all(whole.join(NEEDED).parent().unwrap()).unwrap();
        std::fs::create_dir_all(&bare).unwrap();
        std::fs::write(whole.join(NEEDED), "").unwrap();
        let roots = [bare.clone(), whole.clone()];
        assert_eq!(missing(None, &roots), None);
        assert_eq!(missing(Some(whole), &[]), None);
        // A folder that is named is the only one looked at, as the compilers do.
        let wrong = missing(Some(bare.clone()), &roots).unwrap();
        assert!(wrong.contains("CUDA_PATH is") && wrong.contains(NEEDED), "{wrong}");
        let none = missing(None, &roots[..1]).unwrap();
        assert!(none.contains("set CUDA_PATH") && none.contains(&*bare.to_string_lossy()), "{none}");
        assert!(missing(None, &ROOTS.map(|root| dir.join(&root[1..]))).is_some());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
