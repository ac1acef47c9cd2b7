//! Runs that keep an average of their weights.

use lowkey_model::ModelDir;

use super::*;
use crate::evaluate::EmaEvaluation;

const EMA: &str = "training.ema_decay=0.9";

#[test]
fn an_average_goes_on_to_the_same_bits_and_leaves_the_weights_alone() {
    let (plain, unbroken) = (TinyRun::new(), TinyRun::new());
    plain.train(&[]).unwrap();
    let evaluation = unbroken.train(&[EMA, "metrics.tensorboard=true"]).unwrap().evaluation.unwrap();
    unbroken.assert_ends_as(&plain, &END);
    let run = TinyRun::new().interrupted(&[EMA], &[5, 16, 20]);
    run.assert_ends_as(&unbroken, &END);
    run.assert_ends_as(&unbroken, &["ema/model.safetensors"]);

    // The average is that of the steps' weights: two elevenths, then a quarter and so on, of it stay.
    let each = TinyRun::new();
    each.train(&[EMA, "training.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "eval.every=0"]).unwrap();
    let numbers =
        |dir: &Path| -> Vec<f64> { weights(dir).into_iter().map(|bits| f64::from(f32::from_bits(bits))).collect() };
    let first =
        CausalLm::init(&ModelConfig::read(&each.checkpoint(1).join("config.json")).unwrap(), 3, &Device::flex());
    let mut mean: Vec<f64> = weight_bits(&first).into_iter().map(|bits| f64::from(f32::from_bits(bits))).collect();
    for step in 1..=3u32 {
        let stays = f64::from(1 + step) / f64::from(10 + step);
        let new = numbers(&each.checkpoint(u64::from(step)));
        mean.iter_mut().zip(new).for_each(|(mean, new)| *mean = stays * *mean + (1.0 - stays) * new);
        let found = numbers(&each.checkpoint(u64::from(step)).join("ema"));
        assert!(found.iter().zip(&mean).all(|(found, mean)| (found - mean).abs() < 1e-6), "step {step}");
    }

    // It is told beside the weights' own loss, and what is told is that of the model in the folder.
    let EmaEvaluation { loss, bits_per_byte, .. } = evaluation.ema.unwrap();
    assert!(loss < 2.0 * evaluation.loss && loss != evaluation.loss && bits_per_byte.is_some());
    let config = unbroken.config(&[EMA]);
    let Setup { data, .. } = setup(&config, &unbroken.options(), &mut |_| {}).unwrap();
    let dir = ModelDir::open(&unbroken.checkpoint(STEPS).join("ema")).unwrap();
    let model = dir.load(&Device::flex()).unwrap();
    let lengths = data.tokenizer.unwrap().byte_lengths();
    let again = evaluate(&model, &data.held, &lengths, &Workers::new(2, 8).unwrap(), &Device::flex()).unwrap();
    assert!((again.loss / loss - 1.0).abs() < 1e-6, "{} {loss}", again.loss);
    assert!(dir.companions().unwrap().iter().any(|name| name == "tokenizer.json"));
    let told: Vec<bool> = unbroken.metrics().iter().map(|m| m.ema_val_loss.is_some()).collect();
    assert!(told.iter().zip(1u64..).all(|(told, step)| *told == step.is_multiple_of(10)));
    assert!(plain.metrics().iter().all(|m| m.ema_val_loss.is_none()));
    assert!(!plain.checkpoint(STEPS).join("ema").exists());

    // It belongs to its checkpoint: old ones go whole, and one that is damaged is not gone on with.
    assert_eq!(names(&run.out().join("checkpoints")), ["best", "step-000032", "step-000040"]);
    let file = run.checkpoint(STEPS).join("ema/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(file, bytes).unwrap();
    assert!(checkpoint::verify(&run.checkpoint(STEPS)).is_err());
    for bad in ["0", "1", "-0.5", "nan"] {
        let refused = RunConfig::load(&run.file(), &[format!("training.ema_decay={bad}")]).unwrap_err().to_string();
        assert!(refused.contains("training.ema_decay"), "{refused}");
    }
}
