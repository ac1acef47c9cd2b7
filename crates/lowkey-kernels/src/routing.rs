//! Routing of a mixture of experts: which experts each token goes to, and the order in which experts see them. No sort, no read by the
//! host, no atomic addition: the order is counted, and the gradients of a gather are gathers too. No model here has experts yet.

mod autodiff;
mod choices;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor, TensorData};

use self::autodiff::RoutingOps;
pub use self::choices::Routing;

/// Sends each token to the `k` experts with the highest scores (Shazeer et al., arXiv 1701.06538); of equal scores to the first. A
/// score that is no number counts as the lowest. No gradient flows through the choice: it flows through the weights that
/// [`Routing::from_experts`] takes.
///
/// On a GPU all of it is queued, none waited for.
///
/// # Shapes
/// `scores [tokens, experts]`, f32.
pub fn route(scores: Tensor<2>, k: usize) -> Routing {
    let [tokens, experts] = scores.dims();
    assert!(k >= 1 && k <= experts && tokens > 0, "route: {k} of {experts} experts for {tokens} tokens");
    let scores = scores.without_autodiff();
    #[cfg(feature = "gpu")]
    if let Some(routing) = gpu::route(&scores, k) {
        return routing;
    }
    let device = scores.device();
    let on_host = on_host(&scores.into_data().iter::<f32>().collect::<Vec<f32>>(), experts, k);
    let integers = |values: Vec<i32>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let [chosen, places, order, begins] = on_host.map(integers);
    Routing { experts: chosen.reshape([tokens, k]), places: places.reshape([tokens, k]), order, begins }
}

/// Experts, places, order and begins.
fn on_host(scores: &[f32], experts: usize, k: usize) -> [Vec<i32>; 4] {
    let mut chosen = Vec::with_capacity(scores.len() / experts * k);
    let mut by_score: Vec<usize> = Vec::with_capacity(experts);
    for row in scores.chunks_exact(experts) {
        let score = |expert: usize| if row[expert].is_nan() { f32::NEG_INFINITY } else { row[expert] };
        by_score.clear();
        by_score.extend(0..experts);
        // Of equal ones the first: the index decides. Zeros of either sign are equal.
        let before = |a: &usize, b: &usize| {
            score(*b).partial_cmp(&score(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
        };
        if k < experts {
            by_score.select_nth_unstable_by(k - 1, before);
        }
        by_score[..k].sort_unstable_by(before);
        chosen.extend(by_score[..k].iter().map(|expert| *expert as i32));
    }
    let mut begins = vec![0i32; experts + 1];
    for expert in &chosen {
        begins[*expert as usize + 1] += 1;
    }
    for expert in 0..experts {
        begins[expert + 1] += begins[expert];
    }
    let mut next = begins.clone();
    let (mut places, mut order) = (vec![0i32; chosen.len()], vec![0i32; chosen.len()]);
    for (choice, expert) in chosen.iter().enumerate() {
        let place = &mut next[*expert as usize];
        places[choice] = *place;
        order[*place as usize] = choice as i32;
        *place += 1;
    }
    [chosen, places, order, begins]
}

impl Routing {
    /// The tokens at their places: expert `e` reads rows `begins[e] .. begins[e + 1]`.
    ///
    /// # Shapes
    /// `x [tokens, d]` → `[tokens · k, d]`, f32.
    pub fn to_experts(&self, x: Tensor<2>) -> Tensor<2> {
        let (order, places) = self.dispatched();
        Tensor::from_dispatch(Dispatch::spread(x.into_dispatch(), order, places))
    }

    /// Each token's sum of what its experts make of it, weighted.
    ///
    /// # Shapes
    /// `y [tokens · k, d]`, `weights [tokens, k]` → `[tokens, d]`, f32.
    pub fn from_experts(&self, y: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        assert_eq!(weights.dims(), self.experts.dims(), "there is a weight for each choice");
        let (order, places) = self.dispatched();
        Tensor::from_dispatch(Dispatch::collect(y.into_dispatch(), weights.into_dispatch(), order, places))
    }

    fn dispatched(&self) -> (burn::tensor::DispatchTensor, burn::tensor::DispatchTensor) {
        (self.order.clone().into_dispatch(), self.places.clone().into_dispatch())
    }
}
