use burn::tensor::Device;

use super::*;
use crate::fixtures::{TinyRun, bits, passes, replica, uneven_batch, values, weight_bits};
use crate::run_config::OptimizerKind;

const VOCAB: usize = 29;

/// A world of `count` equal replicas.
fn world(count: usize, kind: OptimizerKind) -> World {
    World::new(replica(kind), (1..count).map(|_| replica(kind)).collect())
}

#[test]
fn members_have_whole_pairs() {
    for (rows, members) in [(8, 2), (8, 3), (12, 4), (2, 2)] {
        let shares: Vec<_> = (0..members).map(|i| share(rows, 2, i, members)).collect();
        assert!(shares.iter().all(|range| range.start % 2 == 0 && range.end % 2 == 0), "{shares:?}");
        assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!((shares[0].start, shares[members - 1].end), (0, rows));
    }
}

#[test]
fn buckets_hold_what_was_packed() {
    let tensor = |i: usize| Tensor::<1>::ones([i], &Device::flex()) * i as f64;
    for (lengths, most, buckets) in [
        (vec![3, 4, 5], 100, vec![12]),
        (vec![3, 4, 5], 7, vec![7, 5]),
        (vec![3, 4, 5], 1, vec![3, 4, 5]),
        (vec![9, 1, 1, 1, 9, 1], 3, vec![9, 3, 9, 1]),
        (vec![], 2, vec![]),
    ] {
        let all: Vec<_> = lengths.iter().map(|length| tensor(*length)).collect();
        let packed = packed(all.clone(), most);
        assert_eq!(packed.iter().map(|bucket| bucket.dims()[0]).collect::<Vec<_>>(), buckets, "{lengths:?}");
        let found = unpacked(packed, lengths.iter().copied());
        assert_eq!(found.len(), all.len());
        for (found, expected) in found.iter().zip(&all) {
            assert_eq!(values(found), values(expected));
        }
    }
}

#[test]
fn replicas_have_the_gradients_of_the_whole_batch_each() {
    let batch = uneven_batch(6, 13, VOCAB, 1);
    for count in [2, 3] {
        let world = world(count, OptimizerKind::AdamW);
        let found = world.gradients(&batch, passes(6)).unwrap();
        // The same passes one after the other, which are added up in the same order.
        let main = world.main();
        let expected = main.workers.gradients(&main.model, &batch, passes(6 / count), &main.device);
        let loss = expected.loss().unwrap();
        assert_eq!(found.len(), count);
        for found in found {
            assert_eq!(found.targets, batch.target_tokens());
            assert!((found.loss().unwrap() / loss - 1.0).abs() < 1e-6);
            assert_eq!(bits(&found.gradients), bits(&expected.gradients), "{count} replicas");
        }
    }
}

#[test]
fn figures_of_members_are_added_up_where_they_lie() {
    let batch = uneven_batch(6, 13, VOCAB, 1);
    for count in [1, 2, 3] {
        let world = world(count, OptimizerKind::AdamW);
        let tensor = |x: f32| Tensor::<1>::from_floats([x], &Device::flex());
        // As if a term had told them: each member two passes.
        let of_pass = |x: f64| {
            let host =
                Figures::default().with("host", x).with("half", 0.5 * x).with_difference("above", ["host", "half"]);
            host.with_tensor("tensor", tensor(3.0 * x as f32)).with_tensor("other", tensor(-1.0))
        };
        let own = |(i, replica): (usize, &Replica)| {
            let mut own = replica.workers.gradients(&replica.model, &batch, passes(6), &replica.device);
            own.figures.add(of_pass(1.0 + i as f64));
            own.figures.add(of_pass(10.0));
            own
        };
        let own: Vec<StepGradients> = world.members().iter().enumerate().map(own).collect();
        let alone = bits(&own[0].gradients);
        let all = if count == 1 { own } else { world.reduced(own).unwrap() };
        assert_eq!(all.len(), count);
        let sum = (1..=count).sum::<usize>() as f64 + 10.0 * count as f64;
        for found in all {
            let read: Vec<f32> = found.figures.on_device().iter().flat_map(values).collect();
            assert_eq!(read, [3.0 * sum as f32, -2.0 * count as f32], "{count} members");
            let means = found.figures.means(&read, 4);
            assert_eq!((means["host"], means["above"], means["tensor"]), (sum / 4.0, sum / 8.0, 3.0 * sum / 4.0));
            assert_eq!(found.gradients.len(), world.main().model.trained_parameters().len());
            assert!(count > 1 || bits(&found.gradients) == alone);
        }
    }
}

#[test]
fn replicas_stay_equal_to_the_last_bit() {
    for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
        let mut world = world(3, kind);
        for step in 0..3 {
            let batch = uneven_batch(3, 11, VOCAB, step);
            let results = world.gradients(&batch, passes(3)).unwrap();
            world.update(results, vec![None; 3], |_| Update::new(0.7, 1e-2)).unwrap();
        }
        assert!(world.agree());
        let all: Vec<_> = world.members.iter().map(|replica| weight_bits(&replica.model)).collect();
        assert!(all[1..].iter().all(|other| *other == all[0]));
        let Some(last) = world.members.last_mut() else { unreachable!() };
        last.model.update(|parameters| parameters.into_iter().map(|p| p.value * 1.001).collect());
        assert!(!world.agree(), "a replica has drifted");
    }
}

#[test]
fn a_run_on_two_devices_is_the_run_on_one_with_passes_half_as_long() {
    let losses = |run: &TinyRun| run.metrics().iter().map(|m| (m.train_loss, m.grad_norm)).collect::<Vec<_>>();
    for more in [&[][..], &["optimizer.kind=muon"]] {
        let (one, two) = (TinyRun::new(), TinyRun::new());
        let overrides = |of: &[&'static str]| [of, more, &["training.steps=16"]].concat();
        // Where there is a GPU, it would be taken by itself.
        one.train(&overrides(&["run.device=cpu", "training.threads=1", "training.micro_batch_size=4"])).unwrap();
        let on_two = overrides(&["run.devices=[\"cpu\", \"cpu\"]", "training.threads=2"]);
        two.train(&on_two).unwrap();
        let checkpoint = |run: &TinyRun| std::fs::read(run.checkpoint(16).join("model.safetensors")).unwrap();
        assert!(checkpoint(&one) == checkpoint(&two), "the weights differ");
        for ((a, b), (c, d)) in losses(&one).into_iter().zip(losses(&two)) {
            assert!((a / c - 1.0).abs() < 1e-6 && b == d, "loss {a} and {c}, norm {b} and {d}");
        }
        // As if it had been killed before its last checkpoint.
        let whole = checkpoint(&two);
        std::fs::remove_dir_all(two.checkpoint(16)).unwrap();
        let two = two.resumed();
        two.train(&on_two).unwrap();
        assert!(checkpoint(&two) == whole, "the resumed run differs");
    }
}

#[test]
fn devices_that_cannot_share_a_batch_are_refused() {
    let run = TinyRun::new();
    let refused = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        match crate::RunConfig::load(&run.file(), &overrides) {
            Err(error) => error.to_string(),
            Ok(config) => crate::setup::devices(&config.run, &Ranks::default(), 0).unwrap_err().to_string(),
        }
    };
    let two = "run.devices=[\"cpu\", \"cpu\"]";
    for (overrides, expected) in [
        (&[two, "training.batch_size=7"][..], "training.batch_size = 7: must be a multiple of 2"),
        (&[two, "run.device=cpu"], "run.device = cpu: run.devices is set too"),
        (&["run.devices=[\"cpu\", \"tpu:1\"]"], "run.devices = tpu:1: there is no device"),
    ] {
        let found = refused(overrides);
        assert!(found.contains(expected), "{found}");
    }
}
