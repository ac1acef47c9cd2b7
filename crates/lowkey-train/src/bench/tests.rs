use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::train::random_batch;
use super::*;

/// The figures of the shapes as any other implementation of them counts.
#[test]
fn parameters_and_operations_of_the_shapes_are_those_agreed_on() {
    for (name, seq, parameters, operations) in
        [("d256", 2048, 6_647_424, 57_163_776.0), ("d512", 2048, 28_386_816, 220_594_176.0)]
    {
        let config = Shape::named(name).unwrap().config(seq).unwrap();
        assert_eq!(config.parameter_count().total, parameters, "{name}");
        assert_eq!(config.causal_pass_flops_per_token(seq), operations, "{name}");
    }
}

#[test]
fn an_unknown_shape_is_refused_with_those_that_there_are() {
    let message = Shape::named("d255").unwrap_err().to_string();
    assert!(message.contains("\"d255\"") && message.contains("d256, d512, d768, d1536"), "{message}");
}

#[test]
fn half_of_the_targets_repeat_their_input() {
    for seq in [7, 8] {
        let batch = random_batch(&mut ChaCha8Rng::seed_from_u64(2), 3, seq, 1 << 20);
        assert_eq!((batch.input_ids.len(), batch.targets.len()), (3 * seq, 3 * seq));
        for (row, targets) in batch.input_ids.chunks(seq).zip(batch.targets.chunks(seq)) {
            assert_eq!(row[1..].iter().map(|id| i64::from(*id)).collect::<Vec<_>>(), targets[..seq - 1]);
            for (at, (id, target)) in row.iter().zip(targets).enumerate() {
                assert_eq!(i64::from(*id) == *target, at % 2 == 0, "position {at}");
            }
        }
    }
}
