use lowkey_model::objective::preference::PairFigures;

use super::launched::Rendezvous;
use super::*;

#[test]
fn who_started_a_process_is_told_by_its_environment() {
    let launched = |variables: &[(&str, &str)]| {
        Launched::find(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    };
    for (variables, expected) in [
        (&[][..], None),
        (&[("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3")], Some(("mpirun (Open MPI)", 3, 4))),
        (&[("PMI_SIZE", "2"), ("PMI_RANK", "0")], Some(("mpiexec", 0, 2))),
        (&[("PMI_SIZE", "two"), ("PMI_RANK", "0")], None),
        // A job's own script, which srun has not started.
        (&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4")], None),
        (&[("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "4")], Some(("srun", 1, 4))),
        (&[("WORLD_SIZE", "8"), ("RANK", "5"), ("LOCAL_RANK", "1")], Some(("torchrun", 5, 8))),
        // A pod that somebody looks into.
        (&[("WORLD_SIZE", "8"), ("RANK", "5")], None),
    ] {
        let expected = expected.map(|(by, rank, size)| Launched { by, rank, size });
        assert_eq!(launched(variables), expected, "{variables:?}");
    }
}

#[test]
fn ranks_meet_beside_the_port_of_their_starter() {
    let place = |address: &str, port: &str| {
        let variables = [("MASTER_ADDR", address), ("MASTER_PORT", port), ("LOCAL_RANK", "3")];
        let found = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Rendezvous::find(|name| found.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()))
    };
    for (address, port, expected) in [
        ("10.0.0.7", "29500", "10.0.0.7:29501"),
        ("node-1.cluster", "65535", "node-1.cluster:65534"),
        ("fe80::1", "1", "[fe80::1]:2"),
    ] {
        let place = place(address, port).unwrap();
        assert_eq!((place.for_nccl().as_str(), place.local_rank), (expected, 3));
    }
    assert_eq!(place("10.0.0.7", "a port"), None);
}

/// Ranks that are threads of one process, and meet on a table.
mod table {
    use std::sync::{Arc, Barrier, Mutex};

    use super::super::comm::Wire;
    use super::super::seat::Seat;
    use super::*;

    #[derive(Debug)]
    pub(super) struct Chair {
        pub(super) seat: Seat,
        pub(super) table: Arc<(Barrier, Mutex<Vec<Vec<u8>>>)>,
    }

    impl Wire for Chair {
        fn seat(&self) -> &Seat {
            &self.seat
        }

        fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>> {
            let (barrier, table) = &*self.table;
            table.lock().unwrap()[self.seat.rank] = own.to_vec();
            barrier.wait();
            let all = table.lock().unwrap().concat();
            barrier.wait();
            Ok(all)
        }

        fn gather(&self, own: &[u8], _: &[usize]) -> Result<Vec<u8>> {
            self.all_gather(own)
        }

        fn gather_numbers(&self, _: &[f32], _: &[usize]) -> Result<Vec<f32>> {
            unreachable!("no numbers travel in these tests")
        }

        fn gather_numbers_to_first(&self, _: &[f32], _: &[usize]) -> Result<Vec<f32>> {
            unreachable!("no numbers travel in these tests")
        }

        fn sum(&self, _: &mut [f32], _: RankSum) -> Result<()> {
            unreachable!("no numbers travel in these tests")
        }

        fn reducer(&self, _: RankSum) -> &'static str {
            "nobody"
        }

        fn leave(&self) {}
    }
}

/// What each of three ranks comes to.
fn three<T: Send>(job: impl Fn(&Ranks) -> T + Sync) -> Vec<T> {
    let table = Arc::new((std::sync::Barrier::new(3), std::sync::Mutex::new(vec![Vec::new(); 3])));
    std::thread::scope(|scope| {
        let one = |rank| {
            let seat = seat::Seat::new(rank, 3, |_| {});
            seat.set_machines(vec!["here".into(); 3]);
            let chair = table::Chair { seat, table: Arc::clone(&table) };
            let ranks = Ranks { world: World::Several(Arc::new(Comm::new(Box::new(chair), None))) };
            let job = &job;
            scope.spawn(move || job(&ranks))
        };
        let ranks: Vec<_> = (0..3).map(one).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn all_leave_a_meeting_with_the_words_of_all() {
    let found = three(|ranks| {
        assert_eq!((ranks.size(), ranks.here(), ranks.place()), (3, 3, ranks.rank()));
        let texts = ranks.gather(Meeting::SetUp, Ok(vec![7; ranks.rank()])).unwrap();
        assert_eq!(texts, [vec![], vec![7], vec![7, 7]]);
        assert_eq!(ranks.other_than_first(Meeting::SetUp, Ok([u8::from(ranks.rank() > 1); 32])).unwrap(), Some(2));
        let doubled = ranks.share(&[1.0f64, 2.0, 3.0, 4.0], |items| Ok(items.iter().map(|x| 2.0 * x).collect()));
        assert_eq!(doubled.unwrap(), [2.0, 4.0, 6.0, 8.0]);
        ranks.any(Meeting::Step, ranks.rank() == 1).unwrap() && !ranks.any(Meeting::Step, false).unwrap()
    });
    assert_eq!(found, [true; 3]);
}

#[test]
fn an_error_of_one_is_that_of_all_and_one_of_all_is_everybodys_own() {
    let broken = || Error::config("run.name", "x", "is not this rank's");
    let of_one = three(|ranks| {
        let own = if ranks.rank() == 1 { Err(broken()) } else { Ok(()) };
        let error = ranks.agree(own).unwrap_err();
        assert!(ranks.is_over());
        (matches!(error, Error::Rank { rank: 1, size: 3, .. }), error.to_string())
    });
    assert!(of_one.iter().all(|(told, text)| *told && text.contains("is not this rank's")), "{of_one:?}");
    let of_all = three(|ranks| matches!(ranks.agree(Err::<(), _>(broken())), Err(Error::Config { .. })));
    assert_eq!(of_all, [true; 3]);
}

#[test]
fn a_rank_that_is_elsewhere_is_named() {
    let found = three(|ranks| {
        let at = if ranks.rank() == 2 { Meeting::Figures } else { Meeting::Step };
        ranks.any(at, false).unwrap_err().to_string()
    });
    assert!(found[0].contains("rank 2 of 3") && found[0].contains("out of step"), "{found:?}");
    assert!(found[2].contains("rank 0 of 3"), "{found:?}");
}

#[test]
fn what_travels_is_the_same_to_the_last_bit() {
    fn there_and_back<T: Packed + std::fmt::Debug>(value: T) {
        let mut bytes = Vec::new();
        value.pack(&mut bytes);
        let mut rest = &bytes[..];
        let found = T::unpack(&mut rest);
        assert_eq!((format!("{found:?}"), rest.len()), (format!("Some({value:?})"), 0));
        for short in 0..bytes.len() {
            assert!(T::unpack(&mut &bytes[..short]).is_none());
        }
    }
    there_and_back(vec![0.1f32, -0.0, f32::NAN, f32::INFINITY]);
    there_and_back((vec![1e-300f64], vec![-1i64, i64::MAX]));
    there_and_back(None::<f64>);
    there_and_back(Some(PairFigures {
        pairs: 3,
        loss: 0.7,
        rewards: [0.1, -0.2],
        preferred: 2,
        log_p: [-11.5, f64::NEG_INFINITY],
    }));
}

#[test]
fn a_process_by_itself_meets_nobody() {
    let alone = Ranks::default();
    assert_eq!((alone.rank(), alone.size(), alone.is_first(), alone.is_over()), (0, 1, true, false));
    assert_eq!(alone.gather(Meeting::SetUp, Ok(vec![7])).unwrap(), [[7]]);
    assert!(alone.any(Meeting::Step, true).unwrap() && !alone.any(Meeting::Step, false).unwrap());
    let refused = alone.agree(Err::<(), _>(Error::config("run.name", "", "is empty"))).unwrap_err();
    assert!(matches!(refused, Error::Config { .. }));
    let doubled = alone.share(&[1.0f64, 2.0], |items| Ok(items.iter().map(|x| 2.0 * x).collect())).unwrap();
    assert_eq!(doubled, [2.0, 4.0]);
    let mut numbers = [1.5];
    alone.sum(&mut numbers, RankSum::Ordered).unwrap();
    assert_eq!(numbers, [1.5]);
}
