//! The operations of a training step. A new one is a new entry here.

use burn::tensor::{Tensor, module::embedding};
use lowkey_kernels::{causal_attention, cross_entropy_sum, linear, rms_norm, rotate, swiglu};
use lowkey_model::ids_tensor;

use super::super::train::Session;
use super::timer::{Lane, Row, Run, Times, Work, leaf};
use crate::error::Result;
use crate::optimizer::{clip, global_norm};

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

/// The linear maps of the blocks.
fn products(session: &Session) -> Vec<Row> {
    let (seq, tokens, s) = (session.seq, session.batch * session.seq, session.shape);
    let map = |name, calls, d_in: usize, d_out: usize| {
        let work = Work::products(2.0 * (tokens * d_in * d_out) as f64);
        row(name, format!("{tokens} × {d_in} → {d_out}"), calls, work, move |lane| {
            let (x, w) = (lane.random([lane.rows, seq, d_in]), lane.random([d_out, d_in]));
            lane.time(|| linear(leaf(&x), leaf(&w), None))
        })
    };
    vec![
        map("q_proj", s.layers, s.hidden, s.heads * (s.nope + s.rope)),
        map("kv_a_proj", s.layers, s.hidden, s.rank + s.rope),
        map("kv_b_proj", s.layers, s.rank, s.heads * (s.nope + s.value)),
        map("o_proj", s.layers, s.heads * s.value, s.hidden),
        map("gate_proj, up_proj", 2 * s.layers, s.hidden, s.feed_forward),
        map("down_proj", s.layers, s.feed_forward, s.hidden),
    ]
}

/// Attention, norms, rotations and the gate of the blocks.
fn pointwise(session: &Session) -> Vec<Row> {
    let (batch, seq, tokens, s) = (session.batch, session.seq, session.batch * session.seq, session.shape);
    // Read x, write y; read x and dy, write dx.
    let norm = |name, calls, width: usize| {
        row(name, format!("{tokens} × {width}"), calls, Work::numbers(5 * tokens * width), move |lane| {
            let (x, w) = (lane.random([lane.rows, seq, width]), lane.random([width]));
            lane.time(|| rms_norm(leaf(&x), leaf(&w), 1e-6))
        })
    };
    // Read x, write y; read dy, write dx.
    let turn = |name, heads: usize, from: usize| {
        let width = from + s.rope;
        let work = Work::numbers(4 * tokens * heads * width);
        row(name, format!("{tokens} × {heads} × {width}"), s.layers, work, move |lane| {
            let x = lane.random([lane.rows, seq, heads, width]);
            let (cos, sin) = (lane.random([1, seq, 1, s.rope / 2]), lane.random([1, seq, 1, s.rope / 2]));
            lane.time(|| rotate(leaf(&x), cos.clone().autodiff(), sin.clone().autodiff(), from, false))
        })
    };
    // Two products per pair of a query and a key, and half of the pairs.
    let pairs = (batch * s.heads * seq * seq) as f64 / 2.0;
    let attention = Work::products(2.0 * pairs * (s.nope + s.rope + s.value) as f64);
    let size = format!("{batch} × {} × {seq} × {seq}", s.heads);
    let attention = row("causal_attention", size, s.layers, attention, move |lane| {
        let q = lane.random([lane.rows, seq, s.heads, s.nope + s.rope]);
        let kv = lane.random([lane.rows, seq, s.heads, s.nope + s.value]);
        let k_pe = lane.random([lane.rows, seq, s.rope]);
        let (starts, scale) = (vec![0; lane.rows * seq], ((s.nope + s.rope) as f64).powf(-0.5));
        lane.time(|| causal_attention(leaf(&q), leaf(&kv), Some(leaf(&k_pe)), &starts, s.nope, scale))
    });
    // Read gate and up, write y; read gate, up and dy, write d gate and d up.
    let gate = Work::numbers(8 * tokens * s.feed_forward);
    let gate = row("swiglu", format!("{tokens} × {}", s.feed_forward), s.layers, gate, move |lane| {
        let shape = [lane.rows, seq, s.feed_forward];
        let (gate, up) = (lane.random(shape), lane.random(shape));
        lane.time(|| swiglu(leaf(&gate), leaf(&up)))
    });
    vec![
        attention,
        norm("rms_norm, hidden", 2 * s.layers + 1, s.hidden),
        norm("rms_norm, latent", s.layers, s.rank),
        turn("rotate, queries", s.heads, s.nope),
        turn("rotate, shared key", 1, 0),
        gate,
    ]
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
    let head = row("head, cross_entropy", format!("{tokens} × {} → {}", s.hidden, s.vocab), 1, head, move |lane| {
        let n = lane.rows * seq;
        // Small weights, so that no loss leaves the range of f32.
        let (h, w) = (lane.random([n, s.hidden]), lane.random([s.vocab, s.hidden]) * 0.02);
        let targets: Vec<i64> = (0..n).map(|i| id(i) as i64).collect();
        lane.time(|| cross_entropy_sum(leaf(&h), leaf(&w), &targets).nats)
    });
    vec![looked_up, head]
}

/// What happens to the gradients once they are there.
fn updates(session: &Session) -> Vec<Row> {
    let parameters = session.model.parameters();
    let gradients: Vec<Tensor<1>> = parameters.iter().map(|p| p.value.clone() * 1e-3).collect();
    let numbers: usize = parameters.iter().map(|p| p.value.dims()[0]).sum();
    let size = || format!("{numbers}");
    let once = |name, calls, work, run: Box<dyn FnMut() -> Result<()> + Send>| Row {
        name,
        size: size(),
        calls,
        work: Work::numbers(work),
        run: Run::Once(run),
        times: Vec::new(),
    };
    let mut rows = Vec::new();
    let sums = session.workers.shares(session.batch).len() - 1;
    if sums > 0 {
        let terms = gradients.clone();
        // As in `Workers::gradients`: the sum so far belongs to nobody else, and is added to in place.
        let mut total: Vec<Tensor<1>> = gradients.iter().map(|g| g.clone() * 1.0).collect();
        let add = move || {
            let sum = std::mem::take(&mut total);
            total = sum.into_iter().zip(&terms).map(|(a, b)| a + b.clone()).collect();
            Ok(())
        };
        rows.push(once("sum over threads", sums, 3 * numbers, Box::new(add)));
    }
    let norm = gradients.clone();
    rows.push(once("gradient norm", 1, numbers, Box::new(move || global_norm(&norm).map(drop))));
    let clipped = gradients.clone();
    rows.push(once(
        "clip",
        1,
        2 * numbers,
        Box::new(move || {
            drop(clip(clipped.clone(), 2.0, 1.0));
            Ok(())
        }),
    ));
    // Read weight, gradient and two moments; write weight and moments.
    let (mut optimizer, lr) = (session.optimizer.clone(), session.optimizer_section.lr);
    let mut model = session.model.clone();
    let step = move || {
        let values = optimizer.step(model.parameters(), gradients.clone(), lr);
        model = model.clone().with_values(values);
        Ok(())
    };
    rows.push(once("optimiser", 1, 7 * numbers, Box::new(step)));
    rows
}
