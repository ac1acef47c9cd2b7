use super::*;
use crate::fixtures::TinyRun;

fn planned(steps: u64) -> RunConfig {
    TinyRun::new().config(&[&format!("training.steps={steps}"), "lr_scheduler.warmup_steps=0"])
}

fn gone_on(earlier: &RunConfig, steps: u64, taken: u64) -> RunConfig {
    let mut config = planned(steps);
    config.continue_after(earlier, taken);
    config
}

fn plans(config: &RunConfig) -> Vec<(u64, u64)> {
    config.history.iter().map(|plan| (plan.until, plan.steps)).collect()
}

#[test]
fn each_step_keeps_the_rate_that_it_was_taken_with() {
    let (short, long) = (planned(100), planned(400));
    let extended = gone_on(&gone_on(&short, 100, 60), 400, 100);
    assert_eq!(plans(&extended), [(100, 100)]);
    for step in 0..400 {
        let plan = if step < 100 { &short } else { &long };
        assert_eq!(extended.rate(step), plan.rate(step), "step {step}");
    }
    // Going on again as it is changes nothing, wherever the newest checkpoint is.
    for taken in [80, 100, 250] {
        assert_eq!(plans(&gone_on(&extended, 400, taken)), [(100, 100)]);
    }
    let again = gone_on(&extended, 500, 250);
    assert_eq!(plans(&again), [(100, 100), (250, 400)]);
    assert_eq!((again.planned_steps(99), again.planned_steps(249), again.planned_steps(250)), (100, 400, 500));
}

#[test]
fn a_plan_under_which_no_step_was_kept_leaves_no_trace() {
    let extended = gone_on(&planned(100), 400, 100);
    // Killed before a checkpoint, and gone on with under another plan.
    assert_eq!(plans(&gone_on(&extended, 300, 100)), [(100, 100)]);
    // The checkpoint at 100 is gone, and the one before serves.
    assert_eq!(plans(&gone_on(&extended, 300, 80)), [(80, 100)]);
    assert!(plans(&gone_on(&extended, 300, 0)).is_empty());
    assert!(plans(&gone_on(&extended, 100, 0)).is_empty());
}

#[test]
fn narrower_ranks_that_have_joined_stay() {
    let joins = RunConfig::narrower_ranks_join;
    assert_eq!((joins(&planned(100)), joins(&planned(400))), (30, 120));
    assert_eq!(joins(&gone_on(&planned(100), 400, 40)), 30);
    // Made longer before they joined.
    assert_eq!(joins(&gone_on(&planned(100), 400, 30)), 120);
    // Made shorter.
    assert_eq!(joins(&gone_on(&planned(400), 100, 50)), 50);
    assert_eq!(joins(&gone_on(&planned(400), 100, 10)), 30);
}
