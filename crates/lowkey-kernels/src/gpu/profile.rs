//! Where a GPU's time goes, kernel by kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cubecl::config::{TypeNameFormatLevel, type_name_format};
use cubecl::logging::{LaunchObservation, LaunchObserver, ProfileDuration, TimingMethod, TimingRequest};

use crate::device::facts::KernelTime;

/// Whether anybody looks.
static LOOKING: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// What the kernels that this thread launches are for, and what they calculate.
    static PURPOSE: RefCell<Option<(String, f64)>> = const { RefCell::new(None) };
}

/// Runs `launch`, whose kernels go by the name of what they do, with their floating-point operations.
pub(crate) fn named<R>(purpose: impl FnOnce() -> (String, f64), launch: impl FnOnce() -> R) -> R {
    if !LOOKING.load(Ordering::Relaxed) {
        return launch();
    }
    PURPOSE.set(Some(purpose()));
    let result = launch();
    PURPOSE.set(None);
    result
}

enum Time {
    /// Two marks on the device that nobody has waited for.
    Marked(ProfileDuration),
    Known(Duration),
}

#[derive(Default)]
struct Watch(Mutex<Vec<(String, f64, Time)>>);

impl Watch {
    fn add(&self, kernel: &'static str, time: Time) {
        let named = PURPOSE.with_borrow(Clone::clone);
        let (name, flops) = named.unwrap_or_else(|| (type_name_format(kernel, TypeNameFormatLevel::Short), 0.0));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((name, flops, time));
    }
}

impl LaunchObserver for Watch {
    fn launched(&self, _: &'static str) {}

    fn timing(&self) -> TimingRequest {
        TimingRequest::Deferred
    }

    fn profiled(&self, kernel: &'static str, profile: ProfileDuration) {
        self.add(kernel, Time::Marked(profile));
    }

    fn timed(&self, kernel: &'static str, duration: Duration, _: TimingMethod) {
        self.add(kernel, Time::Known(duration));
    }
}

/// See [`crate::device::profile`].
pub(crate) fn profile<R>(job: impl FnOnce() -> R) -> (R, Vec<KernelTime>) {
    let watch = Arc::new(Watch::default());
    let observation = LaunchObservation::new(watch.clone());
    LOOKING.store(true, Ordering::Relaxed);
    let result = job();
    LOOKING.store(false, Ordering::Relaxed);
    drop(observation);
    let seen = std::mem::take(&mut *watch.0.lock().unwrap_or_else(PoisonError::into_inner));
    let mut kernels: BTreeMap<String, KernelTime> = BTreeMap::new();
    for (name, flops, time) in seen {
        let time = match time {
            Time::Known(duration) => Some(duration),
            Time::Marked(profile) => cubecl::future::block_on(profile.resolve()).map(|ticks| ticks.duration()),
        };
        let entry = kernels.entry(name.clone()).or_insert(KernelTime { name, launches: 0, seconds: 0.0, flops: 0.0 });
        entry.launches += 1;
        entry.seconds += time.unwrap_or_default().as_secs_f64();
        entry.flops += flops;
    }
    let mut kernels: Vec<KernelTime> = kernels.into_values().collect();
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    (result, kernels)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::fixtures::{is_cpu, plain_device};
    use crate::linear;

    #[test]
    fn kernels_are_counted_by_what_they_are_for() {
        if is_cpu() {
            return println!("skipped: there is no GPU");
        }
        let device = plain_device();
        let (x, w) = (Tensor::<3>::ones([1, 40, 24], &device), Tensor::<2>::ones([56, 24], &device));
        let ((), kernels) = profile(|| {
            for _ in 0..3 {
                drop(linear(x.clone(), w.clone(), None) * 2.0);
            }
            device.sync().unwrap();
        });
        // Tests beside this one launch kernels too.
        let product = kernels.iter().find(|kernel| kernel.name.contains("product 40×24×56")).unwrap();
        assert!(product.launches >= 3 && product.seconds > 0.0, "{product:?}");
        assert_eq!(product.flops, product.launches as f64 * 2.0 * (40 * 24 * 56) as f64);
        assert!(kernels.iter().any(|kernel| kernel.flops == 0.0), "{kernels:?}");
        assert!(kernels.windows(2).all(|pair| pair[0].seconds >= pair[1].seconds));
    }
}
