//! Threads that stay awake while a step is computed whose operations are short.
//!
//! A step of decoding is some fifty operations of ten microseconds, each shared between the threads. A thread that finds nothing to do
//! between two of them goes to sleep, and to wake it takes as long as the operation does, several times as long in a virtual machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::precision::{current, scope};

/// Runs `job` on a thread of the pool, while the others look for work without sleeping. Threads of other programs come first: whoever
/// finds nothing gives way to them.
pub fn awake<R: Send>(job: impl FnOnce() -> R + Send) -> R {
    /// Looks in a row before giving way.
    const LOOKS: usize = 32;
    /// Threads, with more of which those who look would be in the way of those who work.
    const MOST: usize = 16;
    if !(2..=MOST).contains(&rayon::current_num_threads()) {
        return job();
    }
    let precision = current();
    // On a thread of the pool, whoever calls.
    rayon::scope(|_| {
        let (own, over) = (rayon::current_thread_index(), Over(Arc::default()));
        let seen = Arc::clone(&over.0);
        // Nobody waits for those who look: one that is busy elsewhere comes when it comes, and finds that it is over.
        rayon::spawn_broadcast(move |thread| {
            // The job's own thread may come by here while it waits for others, who would then wait for it.
            if Some(thread.index()) == own {
                return;
            }
            let mut looks = 0;
            while !seen.load(Ordering::Relaxed) {
                if rayon::yield_now() == Some(rayon::Yield::Executed) {
                    looks = 0;
                } else if looks < LOOKS {
                    looks += 1;
                    std::hint::spin_loop();
                } else {
                    looks = 0;
                    std::thread::yield_now();
                }
            }
        });
        // That of the caller, whose thread may be another one.
        let _precision = scope(precision);
        job()
    })
}

/// Says that the job is over, however it ends.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;
    use crate::precision::Precision;

    #[test]
    fn jobs_end_and_give_what_they_have() {
        for threads in [1, 2, 5, 17] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let sum = |n: u64| (0..n).into_par_iter().map(|i| i * i).sum::<u64>();
            // From outside and from inside, one in another, and several at once.
            assert_eq!(pool.install(|| awake(|| awake(|| sum(1000)))), 332_833_500);
            let all: Vec<u64> = pool
                .install(|| (0..50u64).into_par_iter().map(|n| awake(|| (0..20).map(|i| sum(n + i)).sum())).collect());
            let expected = |n: u64| (0..20).map(|i| (0..n + i).map(|i| i * i).sum::<u64>()).sum::<u64>();
            assert_eq!(all, (0..50).map(expected).collect::<Vec<_>>());
        }
        let _precision = scope(Precision::Bf16);
        assert_eq!(awake(current), Precision::Bf16);
    }

    #[test]
    fn a_job_that_panics_lets_the_others_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(|| awake(|| panic!("it")))));
        assert!(failed.is_err());
        assert_eq!(pool.install(|| awake(|| 7)), 7);
    }
}
