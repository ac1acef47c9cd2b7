use lowkey_model::objective::preference::PairFigures;

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
    ] {
        let expected = expected.map(|(by, rank, size)| Launched { by, rank, size });
        assert_eq!(launched(variables), expected, "{variables:?}");
    }
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
