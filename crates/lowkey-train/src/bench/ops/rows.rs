//! The operations of a training step. A new one is a new entry here.

use burn::tensor::{Tensor, module::embedding};
use lowkey_kernels::mlp::{MlpWeights, gated_mlp};
use lowkey_kernels::{
    LatentWeights, MlaDims, add_linear, latent_attention, linear,
    loss::{Labels, cross_entropy_sum},
    optim, rms_norm, rotate,
};
use lowkey_model::ids_tensor;
use rayon::prelude::*;

use super::super::train::Session;
use super::timer::{Lane, Row, Run, Times, Work, leaf};
use crate::optimizer::{Update, global_norm};

/// Every operation that a step at this session's sizes consists of.
pub(super) fn rows(session: &Session) -> Vec<Row> {
    let mut rows = products(session);
    rows.extend(pointwise(session));
    rows.extend(ends(session));
    rows.extend(updates(session));
    rows
}

fn row(
    name: &'static str,
    size: String,
    calls: usize,
    work: Work,
    run: impl Fn(&Lane) -> Times + Send + Sync + 'static,
) -> Row {
    Row { name, size, calls, work, run: Run::Shared(Box::new(run)), times: Vec::new() }
}

/// The linear maps of the blocks that are operations of their own.
fn products(session: &Session) -> Vec<Row> {
    let (seq, tokens, s) = (session.seq, session.batch * session.seq, session.shape);
    let describe = |d_in: usize, d_out: usize| {
        (format!("{tokens} × {d_in} → {d_out}"), Work::products(2.0 * (tokens * d_in * d_out) as f64))
    };
    let map = |name, d_in: usize, d_out: usize| {
        let (size, work) = describe(d_in, d_out);
        row(name, size, s.layers, work, move |lane| {
            let (x, w) = (lane.random([lane.rows, seq, d_in]), lane.random([d_out, d_in]));
            lane.time(|| linear(leaf(&x), leaf(&w), None))
        })
    };
    let (size, work) = describe(s.heads * s.value, s.hidden);
    let output = row("o_proj, residual", size, s.layers, work, move |lane| {
        let d_in = s.heads * s.value;
        let (x, w) = (lane.random([lane.rows, seq, d_in]), lane.random([s.hidden, d_in]));
        let residual = lane.random([lane.rows, seq, s.hidden]);
        lane.time(|| add_linear(leaf(&residual), leaf(&x), leaf(&w), None))
    });
    vec![
        map("q_proj", s.hidden, s.heads * (s.nope + s.rope)),
        map("kv_a_proj", s.hidden, s.rank + s.rope),
        output,
        feed_forward(session),
        attention(session),
    ]
}

/// Norm, three products, gate and residual of the feed-forward layer.
fn feed_forward(session: &Session) -> Row {
    let (seq, tokens, s) = (session.seq, session.batch * session.seq, session.shape);
    let work = Work::products(2.0 * (3 * tokens * s.hidden * s.feed_forward) as f64);
    let size = format!("{tokens} × {} ↔ {}", s.hidden, s.feed_forward);
    row("gated_mlp", size, s.layers, work, move |lane| {
        let x = lane.random([lane.rows, seq, s.hidden]);
        let norm = lane.random([s.hidden]);
        let (gate, up) = (lane.random([s.feed_forward, s.hidden]), lane.random([s.feed_forward, s.hidden]));
        let down = lane.random([s.hidden, s.feed_forward]);
        lane.time(|| {
            let weights = MlpWeights { norm: leaf(&norm), gate: leaf(&gate), up: leaf(&up), down: leaf(&down) };
            gated_mlp(leaf(&x), weights, 1e-6)
        })
    })
}

/// Latent norm, shared key, keys and values, attention.
fn attention(session: &Session) -> Row {
    let (batch, seq, tokens, s) = (session.batch, session.seq, session.batch * session.seq, session.shape);
    // Two products per pair of a query and a key, and half of the pairs; keys and values from the latents.
    let pairs = (batch * s.heads * seq * seq) as f64 / 2.0;
    let expand = (tokens * s.rank * s.heads * (s.nope + s.value)) as f64;
    let work = Work::products(2.0 * (pairs * (s.nope + s.rope + s.value) as f64 + expand));
    row("latent_attention", format!("{batch} × {} × {seq} × {seq}", s.heads), s.layers, work, move |lane| {
        let q = lane.random([lane.rows, seq, s.heads, s.nope + s.rope]);
        let kv_a = lane.random([lane.rows, seq, s.rank + s.rope]);
        let (norm, kv_b) = (lane.random([s.rank]), lane.random([s.heads * (s.nope + s.value), s.rank]));
        let (cos, sin) = (lane.random([1, seq, 1, s.rope / 2]), lane.random([1, seq, 1, s.rope / 2]));
        let dims = MlaDims {
            heads: s.heads,
            nope: s.nope,
            rope: s.rope,
            value: s.value,
            rank: s.rank,
            scale: ((s.nope + s.rope) as f64).powf(-0.5),
            latent_scale: 1.0,
            latent_eps: 1e-6,
            interleave: false,
        };
        let starts = vec![0; lane.rows * seq];
        lane.time(|| {
            let (cos, sin) = (cos.clone().autodiff(), sin.clone().autodiff());
            let weights = LatentWeights { norm: leaf(&norm), kv_b: leaf(&kv_b), cos, sin };
            latent_attention(leaf(&q), leaf(&kv_a), weights, &starts, dims)
        })
    })
}

/// Norms and rotations outside the operations above.
fn pointwise(session: &Session) -> Vec<Row> {
    let (seq, tokens, s) = (session.seq, session.batch * session.seq, session.shape);
    // Read x, write y; read x and dy, write dx.
    let work = Work::numbers(5 * tokens * s.hidden);
    let norm = row("rms_norm", format!("{tokens} × {}", s.hidden), s.layers + 1, work, move |lane| {
        let (x, w) = (lane.random([lane.rows, seq, s.hidden]), lane.random([s.hidden]));
        lane.time(|| rms_norm(leaf(&x), leaf(&w), 1e-6))
    });
    // Read x, write y; read dy, write dx.
    let width = s.nope + s.rope;
    let work = Work::numbers(4 * tokens * s.heads * width);
    let turn = row("rotate, queries", format!("{tokens} × {} × {width}", s.heads), s.layers, work, move |lane| {
        let x = lane.random([lane.rows, seq, s.heads, width]);
        let (cos, sin) = (lane.random([1, seq, 1, s.rope / 2]), lane.random([1, seq, 1, s.rope / 2]));
        lane.time(|| rotate(leaf(&x), cos.clone().autodiff(), sin.clone().autodiff(), s.nope, false))
    });
    vec![norm, turn]
}

/// Embedding, and output head with loss.
fn ends(session: &Session) -> Vec<Row> {
    let (seq, tokens, s) = (session.seq, session.batch * session.seq, session.shape);
    // Ids that differ, as those of the batches do.
    let id = move |i: usize| i.wrapping_mul(2_654_435_761) % s.vocab;
    // Read and write the rows; read the gradients, write a gradient for every row of the table.
    let looked_up = Work::numbers(3 * tokens * s.hidden + s.vocab * s.hidden);
    let looked_up = row("embedding", format!("{tokens} of {} × {}", s.vocab, s.hidden), 1, looked_up, move |lane| {
        let table = lane.random([s.vocab, s.hidden]);
        let ids: Vec<u32> = (0..lane.rows * seq).map(|i| id(i) as u32).collect();
        lane.time(|| {
            let table = leaf(&table);
            let ids = ids_tensor(&ids, lane.rows, seq, &table.device());
            embedding(table, ids)
        })
    });
    let head = Work::products(2.0 * (tokens * s.hidden * s.vocab) as f64);
    let head = row("head, loss", format!("{tokens} × {} → {}", s.hidden, s.vocab), 1, head, move |lane| {
        let n = lane.rows * seq;
        // Small weights, so that no loss leaves the range of f32.
        let (h, w) = (lane.random([n, s.hidden]), lane.random([s.vocab, s.hidden]) * 0.02);
        let targets: Vec<i64> = (0..n).map(|i| id(i) as i64).collect();
        lane.time(|| {
            let labels = Labels { targets: &targets, weights: None, z_loss: 0.0 };
            cross_entropy_sum(leaf(&h), leaf(&w), labels).nats
        })
    });
    vec![looked_up, head]
}

/// What happens to the gradients once they are there.
fn updates(session: &Session) -> Vec<Row> {
    let parameters = session.replica().model.parameters();
    let gradients: Vec<Tensor<1>> = parameters.iter().map(|p| p.value.clone() * 1e-3).collect();
    let numbers: usize = parameters.iter().map(|p| p.value.dims()[0]).sum();
    let size = || format!("{numbers}");
    let once = |name, calls, work, run: Box<dyn FnMut() + Send>| Row {
        name,
        size: size(),
        calls,
        work: Work::numbers(work),
        run: Run::Once(run),
        times: Vec::new(),
    };
    let mut rows = Vec::new();
    let sums = session.replica().workers.shares(session.batch, 1).len() - 1;
    if sums > 0 {
        let terms = gradients.clone();
        // As in `Workers::gradients`: the sum so far belongs to nobody else, and is added to in place.
        let mut total: Vec<Tensor<1>> = gradients.iter().map(|g| g.clone() * 1.0).collect();
        let add = move || {
            let sum = std::mem::take(&mut total);
            total = sum.into_par_iter().zip(&terms).map(|(a, b)| optim::accumulate(a, vec![b.clone()])).collect();
        };
        rows.push(once("sum over threads", sums, 3 * numbers, Box::new(add)));
    }
    let norm = gradients.clone();
    let measure = move || {
        // Its value does not matter here, nor whether it is finite.
        let _ = global_norm(&norm);
    };
    rows.push(once("gradient norm", 1, numbers, Box::new(measure)));
    // Read weight, gradient and two moments; write weight and moments.
    let (mut optimizer, lr) = (session.replica().optimizer.clone(), session.optimizer_section.lr);
    // Values of its own: those of the session's model are shared with it, and would be copied.
    let own = parameters.iter().map(|p| p.value.clone() * 1.0).collect();
    let mut model = session.replica().model.clone().with_values(own);
    let step = move || {
        model.update(|parameters| optimizer.step(parameters, gradients.clone(), &Update::new(0.5, lr)));
    };
    rows.push(once("optimiser", 1, 7 * numbers, Box::new(step)));
    rows
}
