//! `lowkey devices`.

use std::process::ExitCode;

use lowkey_kernels::device::{self, Found, Properties};
use lowkey_train::ranks::Ranks;
use serde_json::json;

use super::ranks;
use crate::cli::DevicesArguments;
use crate::output::{say, say_json};

pub(crate) fn devices(arguments: &DevicesArguments) -> anyhow::Result<ExitCode> {
    let ranks = ranks::join()?;
    // Those of the machine of the first rank.
    let shown = if ranks.is_first() { show(arguments, &ranks) } else { Ok(()) };
    ranks::part(&ranks, shown.map(|()| ExitCode::SUCCESS))
}

fn show(arguments: &DevicesArguments, ranks: &Ranks) -> anyhow::Result<()> {
    let (found, left_out) = (device::list(), device::left_out());
    let chosen = device::open("auto")?;
    if arguments.json {
        let left_out = left_out.iter().map(|(kind, feature)| json!({ "kind": kind, "feature": feature }));
        return say_json(&json!({
            "devices": found.iter().map(|found| as_json(found, found.device == chosen)).collect::<Vec<_>>(),
            "not_built": left_out.collect::<Vec<_>>(),
            "cpu_bf16": device::cpu_bf16(),
            "mpi": Ranks::library(),
            "ranks": ranks.size(),
        }));
    }
    for one in &found {
        let mark = if one.device == chosen { "  (what `auto` takes)" } else { "" };
        match &one.properties {
            None => say(&format!(
                "{}{mark}\n  {} threads; training, every command, f32 (f64 in tests); bf16: {}",
                one.name,
                lowkey_train::workers::available_threads(),
                device::cpu_bf16().map_or("no instructions for it".to_owned(), |unit| format!("with {unit}")),
            )),
            Some(properties) => say(&format!("{}{mark}\n{}", one.name, described(properties))),
        }
        if let Some(why) = &one.unusable {
            say(&format!("  cannot be used: {why}"));
        }
    }
    for (kind, feature) in left_out {
        say(&format!("{kind}: not in this build; cargo build --release --features {feature}"));
    }
    for kind in device::silent() {
        say(&format!("{kind}: no driver answers"));
    }
    match (Ranks::library(), ranks.size()) {
        (None, _) => say("MPI: not in this build; cargo build --release --features mpi"),
        (Some(library), 1) => say(&format!("MPI: {library}")),
        (Some(library), size) => say(&format!("MPI: {library}; {size} ranks")),
    }
    Ok(())
}

fn described(properties: &Properties) -> String {
    let Properties { part, target, software, max_tensor, shared_memory, units, plane, bindings, dtypes, matrix_units } =
        properties;
    let kind = if *software { "in software, on the CPU: for tests" } else { "GPU" };
    let matrix_units = if matrix_units.is_empty() { "none".to_owned() } else { matrix_units.join(", ") };
    format!(
        "  {part} ({kind}; {target})\n  largest tensor {:.2} GiB, shared memory {} KiB, {units} units a cube, planes of {}, {bindings} \
         tensors a kernel\n  calculates in {}; matrix units: {matrix_units}",
        *max_tensor as f64 / f64::from(1 << 30),
        shared_memory / 1024,
        if plane.0 == plane.1 { plane.0.to_string() } else { format!("{} to {}", plane.0, plane.1) },
        dtypes.join(", "),
    )
}

fn as_json(found: &Found, chosen: bool) -> serde_json::Value {
    let properties = found.properties.as_ref().map(|properties| {
        json!({
            "part": properties.part,
            "target": properties.target,
            "software": properties.software,
            "max_tensor_bytes": properties.max_tensor,
            "shared_memory_bytes": properties.shared_memory,
            "units_per_cube": properties.units,
            "plane_min": properties.plane.0,
            "plane_max": properties.plane.1,
            "bindings": properties.bindings,
            "dtypes": properties.dtypes,
            "matrix_units": properties.matrix_units,
        })
    });
    json!({ "name": found.name, "auto": chosen, "unusable": found.unusable, "properties": properties })
}
