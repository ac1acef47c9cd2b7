//! Devices by name, and what is known of them.

#[cfg(any(test, feature = "cuda"))]
mod cuda;
pub(crate) mod facts;

use std::collections::BTreeMap;

pub use crate::cpu::awake::awake;
use burn::tensor::{Device, Tensor};
pub use facts::{KernelTime, Properties, is_cpu};

/// Names under which this build could open a device, with the Cargo feature that each needs.
const KINDS: [(&str, &str, bool); 4] = [
    ("wgpu", "wgpu", cfg!(feature = "wgpu")),
    ("vulkan", "vulkan", cfg!(feature = "vulkan")),
    ("metal", "metal", cfg!(feature = "metal")),
    ("cuda", "cuda", cfg!(feature = "cuda")),
];

/// Why a device cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No device has this name.
    #[error("there is no device `{name}`; known are auto, cpu, wgpu[:i], vulkan[:i], metal[:i] and cuda[:i]")]
    Unknown {
        /// The name.
        name: String,
    },
    /// This build has no such devices.
    #[error(
        "this build has no `{kind}` devices; build with `cargo build --release --features {feature}`, or take `cpu`"
    )]
    NotBuilt {
        /// The kind of device.
        kind: String,
        /// The Cargo feature that has them.
        feature: String,
    },
    /// There is such a device, and it cannot be used.
    #[error("device `{name}` cannot be used: {why}")]
    Unusable {
        /// The name.
        name: String,
        /// What is missing, and how to mend it.
        why: String,
    },
    /// This machine has no such device.
    #[error("there is no device `{name}` here: {why}; `lowkey devices` lists what there is")]
    Missing {
        /// The name.
        name: String,
        /// What was found instead.
        why: String,
    },
}

/// A device of this machine.
#[derive(Clone, Debug)]
pub struct Found {
    /// The name that opens it, `cuda:0`.
    pub name: String,
    /// The device.
    pub device: Device,
    /// What is known of it; absent for the CPU.
    pub properties: Option<Properties>,
    /// Why it cannot be used, if so.
    pub unusable: Option<String>,
}

/// Runs `job` and tells what each GPU kernel in it took, longest first. `job` has to wait for the device itself.
///
/// The kernels run one after the other as they otherwise do; marking where each begins and ends costs the host some time.
pub fn profile<R>(job: impl FnOnce() -> R) -> (R, Vec<KernelTime>) {
    #[cfg(feature = "gpu")]
    return crate::gpu::profile::profile(job);
    #[cfg(not(feature = "gpu"))]
    (job(), Vec::new())
}

/// The instructions with which the CPU multiplies bf16 (AMX, AVX512-BF16). `None`: it has none, and rounds operands for products in f32,
/// which takes longer than f32 alone.
pub fn cpu_bf16() -> Option<&'static str> {
    crate::cpu::bf16::Unit::here().name()
}

/// Opens a device: `auto`, `cpu`, or a kind of GPU with or without a number, `cuda`, `wgpu:1`.
///
/// `auto` is the first hardware GPU, CUDA before others; else the CPU.
///
/// # Errors
/// [`DeviceError`].
pub fn open(name: &str) -> Result<Device, DeviceError> {
    open_at(name, 0, 1)
}

/// Opens the device of one of several processes on this machine, of which `place` counts those before it: where a name has no number,
/// each process has a device of its own, the first one `cuda:0` of `cuda`, the second one `cuda:1`. The only device of a kind is that of
/// all of them: a job manager may show each process its own alone.
///
/// # Errors
/// [`DeviceError`]; [`DeviceError::Missing`] for more processes than devices.
pub fn open_at(name: &str, place: usize, processes: usize) -> Result<Device, DeviceError> {
    choose(name, &|found, name| own(found, name, place, processes))
}

/// Opens the device of one of several jobs, which take those of a kind in turn where a name has no number: `turn` 0 has the first one, and
/// those behind the last one share them again.
///
/// # Errors
/// [`DeviceError`].
pub fn open_in_turn(name: &str, turn: usize) -> Result<Device, DeviceError> {
    choose(name, &|found, _| Ok(in_turn(found, turn)))
}

/// The one of the devices of a kind that a job is to have, given the name that it has asked for.
type Choice<'a> = &'a dyn for<'f> Fn(&'f [Found], &str) -> Result<Option<&'f Found>, DeviceError>;

fn choose(name: &str, choice: Choice) -> Result<Device, DeviceError> {
    match name {
        "cpu" => return Ok(Device::flex()),
        "auto" => return automatic(choice),
        _ => {}
    }
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse::<usize>().map(Some).ok()),
        None => (name, Some(None)),
    };
    let known = KINDS.iter().find(|(known, ..)| *known == kind);
    let (Some((_, feature, built)), Some(index)) = (known, index) else {
        return Err(DeviceError::Unknown { name: name.to_owned() });
    };
    if !built {
        return Err(DeviceError::NotBuilt { kind: kind.to_owned(), feature: (*feature).to_owned() });
    }
    let found = of_kind(kind);
    let count = found.len();
    let chosen = match index {
        Some(index) => found.into_iter().nth(index),
        None => choice(&found, name)?.cloned(),
    };
    if let Some(Found { name, unusable: Some(why), .. }) = chosen {
        return Err(DeviceError::Unusable { name, why });
    }
    chosen.map(|found| found.device).ok_or_else(|| DeviceError::Missing {
        name: name.to_owned(),
        why: match count {
            0 if kind == "cuda" => "no NVIDIA driver answers (libcuda was not found, or finds no GPU)".to_owned(),
            0 => "no driver answers (on Linux, Vulkan needs libvulkan1 and the GPU's driver)".to_owned(),
            1 => "there is one of its kind".to_owned(),
            _ => format!("there are {count} of its kind"),
        },
    })
}

/// The one of the devices of a kind that a process has, a GPU before what only acts as one; none where there are none.
fn own<'a>(found: &'a [Found], name: &str, place: usize, processes: usize) -> Result<Option<&'a Found>, DeviceError> {
    let real: Vec<&Found> = found.iter().filter(is_real).collect();
    match &real[..] {
        [] => Ok(found.first()),
        [only] => Ok(Some(only)),
        several => match several.get(place) {
            Some(own) => Ok(Some(own)),
            None => {
                let count = several.len();
                let why = format!(
                    "of its kind there are {count}, and {processes} processes on this machine; start as many as there are devices, or \
                     name one that all of them use, by its number"
                );
                Err(DeviceError::Missing { name: name.to_owned(), why })
            }
        },
    }
}

/// The one that a job has which may share it.
fn in_turn(found: &[Found], turn: usize) -> Option<&Found> {
    let real: Vec<&Found> = found.iter().filter(is_real).collect();
    real.get(turn % real.len().max(1)).copied().or(found.first())
}

/// All devices that this build can reach, the CPU last.
pub fn list() -> Vec<Found> {
    let gpus = ["cuda", "metal", "vulkan", "wgpu"].into_iter().flat_map(of_kind);
    let cpu = Found { name: "cpu".to_owned(), device: Device::flex(), properties: None, unusable: None };
    gpus.chain([cpu]).collect()
}

/// What is known of a device; absent for the CPU.
pub fn properties(device: &Device) -> Option<Properties> {
    #[cfg(feature = "gpu")]
    if !is_cpu(device) {
        return crate::gpu::properties::properties(&device.clone().without_autodiff());
    }
    let _ = device;
    None
}

/// Where the numbers of a tensor lie in the memory of an NVIDIA GPU. They stay there as long as this does.
pub struct CudaMemory {
    ordinal: usize,
    address: u64,
    bytes: usize,
    /// What keeps them there.
    _held: Box<dyn std::any::Any>,
}

impl CudaMemory {
    /// The number of the GPU, as its driver counts.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The place of the first number.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes there are from there on.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Where a tensor's numbers lie, one after the other. What was queued before is not waited for. `None` for a tensor that does not lie on
/// an NVIDIA GPU through `cuda`, or not as one piece.
pub fn cuda_memory(tensor: &Tensor<1>) -> Option<CudaMemory> {
    #[cfg(feature = "cuda")]
    return cuda::memory(tensor);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = tensor;
        None
    }
}

/// Whether devices of this kind can add up tensors among themselves, without the host: NVIDIA's through `cuda`, where NCCL is found.
pub fn has_collectives(device: &Device) -> bool {
    #[cfg(feature = "gpu")]
    if !is_cpu(device) {
        return crate::gpu::properties::has_collectives(&device.clone().without_autodiff());
    }
    let _ = device;
    false
}

/// Kinds of device that this build leaves out, with the Cargo feature that has each.
pub fn left_out() -> Vec<(&'static str, &'static str)> {
    KINDS.iter().filter(|(.., built)| !built).map(|(kind, feature, _)| (*kind, *feature)).collect()
}

/// Kinds of device that this build could use, where no driver answers.
pub fn silent() -> Vec<&'static str> {
    KINDS.iter().filter(|(kind, _, built)| *built && of_kind(kind).is_empty()).map(|(kind, ..)| *kind).collect()
}

/// Kernels chosen by measurement so far in this process, by what they compute. Empty without a real GPU.
///
/// A GPU's products and 16-bit attentions may be computed by several kernels, which round in different orders; the fastest is found
/// at the first use of each shape.
pub fn chosen_kernels() -> BTreeMap<String, String> {
    #[cfg(feature = "gpu")]
    return crate::gpu::tune::chosen();
    #[cfg(not(feature = "gpu"))]
    BTreeMap::new()
}

/// Chooses kernels as an earlier process did, so that the same bits are computed. What has been chosen here already stays.
pub fn choose_kernels(earlier: BTreeMap<String, String>) {
    #[cfg(feature = "gpu")]
    crate::gpu::tune::choose(earlier);
    #[cfg(not(feature = "gpu"))]
    drop(earlier);
}

fn automatic(choice: Choice) -> Result<Device, DeviceError> {
    let found = list();
    let kind = |found: &Found| found.name.split(':').next().unwrap_or_default().to_owned();
    let Some(first) = found.iter().find(is_real).map(kind) else { return Ok(Device::flex()) };
    let of_it: Vec<Found> = found.into_iter().filter(|found| kind(found) == first).collect();
    Ok(choice(&of_it, &first)?.map_or_else(Device::flex, |found| found.device.clone()))
}

/// Whether it is hardware that can be used.
fn is_real(found: &&Found) -> bool {
    found.unusable.is_none() && found.properties.as_ref().is_some_and(|properties| !properties.software)
}

#[cfg(not(feature = "gpu"))]
fn of_kind(_: &str) -> Vec<Found> {
    Vec::new()
}

#[cfg(feature = "gpu")]
fn of_kind(kind: &str) -> Vec<Found> {
    use burn::tensor::DeviceType;
    // What one thread queues must come before what another queues after it: parameters are written in place, and a stream for each
    // thread would read them before they are.
    cubecl_environment::stream::set_policy(cubecl_environment::stream::StreamPolicy::Single);
    #[cfg(feature = "cuda")]
    cuda::keep_compiled_kernels();
    let devices = match kind {
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::enumerate(DeviceType::Wgpu),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::enumerate(DeviceType::Vulkan),
        #[cfg(feature = "metal")]
        "metal" => Device::enumerate(DeviceType::Metal),
        #[cfg(feature = "cuda")]
        "cuda" => Device::enumerate(DeviceType::Cuda),
        _ => return Vec::new(),
    };
    #[cfg(feature = "cuda")]
    let unusable = if kind == "cuda" { cuda::lacks() } else { None };
    #[cfg(not(feature = "cuda"))]
    let unusable = None::<String>;
    let named = devices.into_vec().into_iter().enumerate().map(|(i, device)| Found {
        name: format!("{kind}:{i}"),
        properties: crate::gpu::properties::properties(&device),
        device,
        unusable: unusable.clone(),
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Devices of a kind, each real or a rasteriser.
    fn found(real: &[bool]) -> Vec<Found> {
        let properties = |software| Properties {
            part: "a part".into(),
            target: String::new(),
            software,
            max_tensor: 1 << 30,
            shared_memory: 1 << 15,
            units: 256,
            plane: (32, 32),
            bindings: 8,
            dtypes: Vec::new(),
            matrix_units: Vec::new(),
        };
        let one = |(i, real): (usize, &bool)| Found {
            name: format!("kind:{i}"),
            device: Device::flex(),
            properties: Some(properties(!real)),
            unusable: None,
        };
        real.iter().enumerate().map(one).collect()
    }

    #[test]
    fn each_process_has_a_device_of_its_own_and_the_only_one_is_that_of_all() {
        for (real, processes, expected) in [
            (&[true, true][..], 2, &["kind:0", "kind:1"][..]),
            (&[false, true, true], 2, &["kind:1", "kind:2"]),
            (&[true], 3, &["kind:0", "kind:0", "kind:0"]),
            (&[false, true], 2, &["kind:1", "kind:1"]),
            (&[false, false], 2, &["kind:0", "kind:0"]),
        ] {
            let found = found(real);
            let names: Vec<&str> =
                (0..processes).map(|place| &*own(&found, "kind", place, processes).unwrap().unwrap().name).collect();
            assert_eq!(names, expected);
        }
        assert!(own(&[], "kind", 0, 2).unwrap().is_none());
        let error = own(&found(&[true, true]), "kind", 2, 3).unwrap_err().to_string();
        assert!(error.contains("there are 2, and 3 processes on this machine"), "{error}");
    }

    #[test]
    fn jobs_take_devices_in_turn() {
        for (real, expected) in [
            (&[true, true][..], ["kind:0", "kind:1", "kind:0"]),
            (&[false, true, true], ["kind:1", "kind:2", "kind:1"]),
            (&[true], ["kind:0"; 3]),
            (&[false, false], ["kind:0"; 3]),
        ] {
            let found = found(real);
            assert_eq!([0, 1, 2].map(|turn| &*in_turn(&found, turn).unwrap().name), expected);
        }
        assert!(in_turn(&[], 1).is_none());
        assert_eq!(open_in_turn("cpu", 5).unwrap(), Device::flex());
    }

    #[test]
    fn names_are_told_from_what_is_none() {
        assert_eq!(open("cpu").unwrap(), Device::flex());
        assert_eq!(open_at("cpu", 3, 4).unwrap(), Device::flex());
        assert!(matches!(open("gpu"), Err(DeviceError::Unknown { .. })));
        assert!(matches!(open("cuda:one"), Err(DeviceError::Unknown { .. })));
    }
}
