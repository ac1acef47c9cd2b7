//! Which of several kernels for the same thing is fastest here, found by running them.
//!
//! The first of the candidates is the plain one, which works everywhere. Every other has to give the same numbers before its time
//! counts: a driver that computes something else, or refuses, loses its turn and nothing more. Choices are kept for the life of the
//! process, by name, and can be put back, so that a resumed run computes the same bits. Software devices are not measured: their plain
//! kernels are what tests look at, and one of Mesa's does not survive every candidate.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::backend::ops::FloatTensorOps;
use burn::tensor::FloatDType;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::client::Client;

/// Chosen candidates by what they compute.
static CHOICES: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// How often choices were put back: what is [`Known`] from before does not count.
static CHOSEN_ANEW: AtomicUsize = AtomicUsize::new(0);

/// Held while something is measured.
static MEASURING: Mutex<()> = Mutex::new(());

/// Rounds of which the best counts, and launches that one of them waits for.
const ROUNDS: usize = 3;
const LAUNCHES: u32 = 3;

/// What takes longer is timed once.
const LONG: Duration = Duration::from_millis(20);

/// Ways by keys that are cheaper to make and to compare than their names: what every step asks for again.
pub(crate) struct Known<K, T>(LazyLock<Mutex<Ways<K, T>>>);

/// By whether the device is measured, how often choices had been put back, and the key.
type Ways<K, T> = HashMap<(bool, usize, K), T>;

impl<K: Eq + Hash, T: Clone> Known<K, T> {
    pub(crate) const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    /// The way of a key; chosen where nobody has asked on a device of this kind before.
    pub(crate) fn get(&self, client: &Client, key: K, choose: impl FnOnce() -> T) -> T {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (is_real(client), CHOSEN_ANEW.load(Ordering::Relaxed), key);
        if let Some(way) = lock().get(&key) {
            return way.clone();
        }
        // Not under the lock: choosing runs kernels.
        let way = choose();
        lock().entry(key).or_insert(way).clone()
    }
}

fn choices() -> MutexGuard<'static, BTreeMap<String, String>> {
    CHOICES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been chosen so far.
pub(crate) fn chosen() -> BTreeMap<String, String> {
    choices().clone()
}

/// Puts choices back; those already made stay.
pub(crate) fn choose(earlier: BTreeMap<String, String>) {
    let mut choices = choices();
    for (what, name) in earlier {
        choices.entry(what).or_insert(name);
    }
    CHOSEN_ANEW.fetch_add(1, Ordering::Relaxed);
}

/// Whether a device is a real one, where time means something.
fn is_real(client: &Client) -> bool {
    static MEASURED: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("LOWKEY_TUNE").is_none_or(|value| value != "off"));
    client.properties().identity.physical.is_some() && *MEASURED
}

/// The one of `candidates` that computes `what` fastest within `tolerance` (relative, root mean square) of the first.
pub(crate) fn fastest<T: Clone>(
    client: &Client,
    what: impl FnOnce() -> String,
    tolerance: f64,
    candidates: impl FnOnce() -> Vec<(String, T)>,
    run: impl Fn(&T) -> Result<CubeTensor, String>,
) -> Option<T> {
    let what = what();
    let known = choices().get(&what).cloned();
    if known.is_none() && !is_real(client) {
        return None;
    }
    let candidates = candidates();
    if let Some(known) = known
        && let Some((_, way)) = candidates.iter().find(|(name, _)| *name == known)
    {
        return Some(way.clone());
    }
    // One at a time: devices in step have to choose alike, and two that measure at once disturb each other.
    let _turn = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let meanwhile = choices().get(&what).cloned();
    if let Some((_, way)) = candidates.iter().find(|(name, _)| Some(name) == meanwhile.as_ref()) {
        return Some(way.clone());
    }
    let (name, way) = measured(client, &what, tolerance, candidates, run)?;
    choices().insert(what, name);
    Some(way)
}

fn measured<T>(
    client: &Client,
    what: &str,
    tolerance: f64,
    candidates: Vec<(String, T)>,
    run: impl Fn(&T) -> Result<CubeTensor, String>,
) -> Option<(String, T)> {
    let mut plain = None;
    let mut best: Option<(Duration, String, T)> = None;
    for (name, way) in candidates {
        log::debug!("{what}: trying {name}");
        match trial(client, &way, &run, plain.as_ref(), tolerance) {
            Ok((took, out)) => {
                log::info!("{what}: {name} takes {:.3} ms", took.as_secs_f64() * 1e3);
                plain.get_or_insert(out);
                if best.as_ref().is_none_or(|(least, ..)| took < *least) {
                    best = Some((took, name, way));
                }
            }
            Err(why) => log::info!("{what}: {name} is out: {why}"),
        }
    }
    best.map(|(_, name, way)| (name, way))
}

fn trial<T>(
    client: &Client,
    way: &T,
    run: impl Fn(&T) -> Result<CubeTensor, String>,
    plain: Option<&CubeTensor>,
    tolerance: f64,
) -> Result<(Duration, CubeTensor), String> {
    // The first run compiles.
    let out = run(way)?;
    finish(client, &out)?;
    if let Some(plain) = plain {
        let off = distance(&out, plain)?;
        // What is no number must not pass.
        if off.is_nan() || off > tolerance {
            return Err(format!("it is {off:.1e} off the plain kernel"));
        }
    }
    let started = Instant::now();
    finish(client, &run(way)?)?;
    let mut least = started.elapsed();
    if least > LONG {
        return Ok((least, out));
    }
    for _ in 0..ROUNDS {
        let started = Instant::now();
        for _ in 1..LAUNCHES {
            run(way)?;
        }
        finish(client, &run(way)?)?;
        least = least.min(started.elapsed() / LAUNCHES);
    }
    Ok((least, out))
}

/// Waits, and asks whether `out` was written: a kernel that could not be compiled or launched is told by what it leaves unwritten alone.
fn finish(client: &Client, out: &CubeTensor) -> Result<(), String> {
    // The reason may hold a whole source.
    const READABLE: usize = 400;
    let waited = cubecl::future::block_on(client.sync_buffers([&out.handle]));
    waited.map_err(|e| e.to_string().chars().take(READABLE).collect())
}

/// `‖a − b‖ / ‖b‖`
fn distance(a: &CubeTensor, b: &CubeTensor) -> Result<f64, String> {
    let [a, b] = [a, b].map(|x| CubeBackend::float_cast(x.clone(), FloatDType::F32));
    let squares = |x: CubeTensor| {
        let sum = CubeBackend::float_sum(CubeBackend::float_mul(x.clone(), x));
        let bytes = sum.client.read_one(sum.handle).map_err(|e| e.to_string())?;
        let number = bytes.first_chunk::<4>().map(|bytes| f32::from_le_bytes(*bytes));
        number.map(f64::from).ok_or_else(|| "the device returns nothing".to_owned())
    };
    let off = squares(CubeBackend::float_sub(a, b.clone()))?;
    Ok((off / squares(b)?.max(f64::MIN_POSITIVE)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{is_cpu, plain_device};
    use burn::tensor::Tensor;

    #[test]
    fn what_computes_something_else_or_nothing_is_out() {
        if is_cpu() {
            return println!("skipped: there is no GPU");
        }
        let x = Tensor::<1>::ones([40_000], &plain_device()).try_into_primitive::<CubeBackend>().unwrap();
        let run = |factor: &f32| match factor {
            f if *f < 0.0 => Err("it refuses".to_owned()),
            f => Ok(CubeBackend::float_mul_scalar(x.clone(), (*f).into())),
        };
        let candidates =
            |factors: &[f32]| factors.iter().map(|factor| (format!("times {factor}"), *factor)).collect::<Vec<_>>();
        for wrong in [2.0, f32::NAN, -1.0, 1.1] {
            let found = measured(&x.client, "a test", 1e-2, candidates(&[1.0, wrong]), run);
            assert_eq!(found.unwrap().1, 1.0, "{wrong}");
        }
        assert!(measured(&x.client, "a test", 1e-2, candidates(&[-1.0]), run).is_none());
    }

    #[test]
    fn choices_come_back() {
        if is_cpu() {
            return println!("skipped: there is no GPU");
        }
        let x = Tensor::<1>::ones([4], &plain_device()).try_into_primitive::<CubeBackend>().unwrap();
        choose(BTreeMap::from([("a test of choices".to_owned(), "second".to_owned())]));
        choose(BTreeMap::from([("a test of choices".to_owned(), "first".to_owned())]));
        let candidates = || vec![("first".to_owned(), 1), ("second".to_owned(), 2)];
        let never = |_: &i32| -> Result<CubeTensor, String> { unreachable!("nothing is measured again") };
        assert_eq!(fastest(&x.client, || "a test of choices".to_owned(), 1e-2, candidates, never), Some(2));
        assert_eq!(chosen()["a test of choices"], "second");
    }
}
