//! Adapted maps on GPUs: composed of plain maps, norms and activations.

use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::{AdaptedGradients, AdaptedOps, AdaptedState, Map};
use super::composed;
use super::mlp::{AdaptedMlpGradients, AdaptedMlpOps, AdaptedMlpState, Between};
use crate::autodiff::Wanted;
use crate::precision::Precision;
use crate::recalled::autodiff::Recall;

impl AdaptedOps for CubeBackend {
    fn adapted(x: CubeTensor, map: Map<Self>, _: Recall<Self>, precision: Precision) -> CubeTensor {
        let [y, _] = Self::adapted_saving(None, x, map, precision);
        y
    }

    fn add_adapted(
        residual: CubeTensor,
        x: CubeTensor,
        map: Map<Self>,
        _: Recall<Self>,
        precision: Precision,
    ) -> CubeTensor {
        let [y, _] = Self::adapted_saving(Some(residual), x, map, precision);
        y
    }
}

impl AdaptedGradients for CubeBackend {
    fn adapted_saving(
        residual: Option<CubeTensor>,
        x: CubeTensor,
        map: Map<Self>,
        precision: Precision,
    ) -> [CubeTensor; 2] {
        composed::saving::<Self>(residual, x, map, precision)
    }

    fn adapted_grad(
        saved: AdaptedState<Self>,
        grad: CubeTensor,
        precision: Precision,
        wanted: Wanted<3>,
    ) -> [Option<CubeTensor>; 3] {
        composed::grad(saved, grad, precision, wanted)
    }
}

impl AdaptedMlpOps for CubeBackend {
    fn adapted_mlp(
        x: CubeTensor,
        norm: CubeTensor,
        gate: Map<Self>,
        up: Map<Self>,
        down: Map<Self>,
        eps: f64,
        precision: Precision,
    ) -> CubeTensor {
        Self::adapted_mlp_saving(x, norm, [gate, up, down], eps, precision).0
    }
}

impl AdaptedMlpGradients for CubeBackend {
    fn adapted_mlp_saving(
        x: CubeTensor,
        norm: CubeTensor,
        maps: [Map<Self>; 3],
        eps: f64,
        precision: Precision,
    ) -> (CubeTensor, Between<Self>) {
        composed::mlp_saving::<Self>(x, norm, maps, eps, precision)
    }

    fn adapted_mlp_grad(
        saved: AdaptedMlpState<Self>,
        grad: CubeTensor,
        eps: f64,
        precision: Precision,
        wanted: Wanted<8>,
    ) -> [Option<CubeTensor>; 8] {
        composed::mlp_grad(saved, grad, eps, precision, wanted)
    }
}
