//! What a GPU says of itself.

use burn::tensor::{Device, Tensor};
use burn_cubecl::CubeBackend;
use cubecl::features::TypeUsage;
use cubecl::ir::{ElemType, FloatKind};

use crate::device::facts::Properties;

/// Whether devices of this kind add up tensors among themselves here.
pub(crate) fn has_collectives(device: &Device) -> bool {
    let tensor = Tensor::<1>::zeros([1], device).try_into_primitive::<CubeBackend>();
    tensor.is_ok_and(|tensor| tensor.client.has_device_transport())
}

/// Opens the device; `None` where it is none of this backend's.
pub(crate) fn properties(device: &Device) -> Option<Properties> {
    let tensor = Tensor::<1>::zeros([1], device).try_into_primitive::<CubeBackend>().ok()?;
    let all = tensor.client.properties();
    let formats =
        [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16), ("f64", FloatKind::F64)];
    let usable = |kind| all.features.type_usage(ElemType::Float(kind)).contains(TypeUsage::Arithmetic);
    let name = |elem| match elem {
        ElemType::Float(FloatKind::F32) => "f32",
        ElemType::Float(FloatKind::F16) => "f16",
        ElemType::Float(FloatKind::BF16) => "bf16",
        ElemType::Float(FloatKind::TF32) => "tf32",
        _ => "",
    };
    let of_floats = all.features.matmul.cmma.iter().filter(|config| !name(config.a_type).is_empty());
    let mut matrix_units: Vec<String> =
        of_floats.map(|config| format!("{} {}×{}×{}", name(config.a_type), config.m, config.n, config.k)).collect();
    matrix_units.sort();
    matrix_units.dedup();
    Some(Properties {
        part: all.identity.name.clone(),
        target: all.identity.fingerprint.clone(),
        software: all.identity.physical.is_none(),
        max_tensor: all.memory.max_page_size,
        shared_memory: all.hardware.max_shared_memory_size,
        units: all.hardware.max_units_per_cube,
        plane: (all.hardware.plane_size_min, all.hardware.plane_size_max),
        bindings: all.hardware.max_bindings,
        dtypes: formats.into_iter().filter(|(_, kind)| usable(*kind)).map(|(name, _)| name).collect(),
        matrix_units,
    })
}
