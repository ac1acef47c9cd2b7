//! Measurements that make no sense.

use super::{Case, case};

pub(super) fn cases() -> Vec<Case> {
    let wrong = |arguments: &[&str], says: &[&str]| {
        let arguments = [&["bench"], arguments].concat();
        case(arguments.join(" "), &arguments).code(2).says(says)
    };
    let too_large = |arguments: &[&str], says: &[&str]| wrong(arguments, says).code(1);
    vec![
        wrong(&["train", "--shape", "d255"], &["shape = \"d255\"", "known are d256, d512, d768, d1536"]),
        wrong(&["train", "--seq", "0"], &["seq = 0: must lie between 1 and"]),
        wrong(&["train", "--batch", "0"], &["batch = 0: must lie between 1 and"]),
        wrong(&["train", "--threads", "0"], &["threads = 0: must lie between 1 and"]),
        wrong(&["train", "--steps", "0"], &["steps = 0: must lie between 1 and"]),
        wrong(&["train", "--optimizer", "sgd"], &["optimizer = sgd", "adamw"]),
        wrong(&["train", "--batch", "1000000", "--seq", "1000000"], &["batch = 1000000", "1000000 are more than"]),
        wrong(&["decode", "--context", "0"], &["context = 0: must lie between 1 and"]),
        wrong(&["decode", "--context", "-1"], &["'-1'"]),
        wrong(&["decode", "--new", "0"], &["new = 0: must lie between 1 and"]),
        wrong(&["decode", "--way", "latent"], &["--way latent", "expanded, absorbed or fused"]),
        wrong(&["decode", "--way", "auto"], &["--way auto", "MLA attention decodes in: expanded, absorbed, fused"]),
        wrong(&["decode", "--cache-dtype", "fp8"], &["--cache-dtype fp8", "f32, bf16, f16 or int8"]),
        wrong(&["decode", "--weights", "fp8"], &["--weights fp8", "f32, bf16, int8, int4 or nf4"]),
        wrong(&["train", "--weights", "nf4"], &["--lora-rank"]),
        wrong(&["ops", "--shape", "D256"], &["shape = \"D256\"", "known are d256"]),
        wrong(&["ops", "--threads", "100000"], &["threads = 100000: must lie between 1 and 1024"]),
        too_large(
            &["train", "--shape", "d1536", "--batch", "8192", "--seq", "8192"],
            &["training needs about", "GiB", "this machine has", "lower the shape, the batch or the length"],
        ),
        too_large(
            &["decode", "--shape", "d1536", "--batch", "1000", "--context", "60000"],
            &["decoding needs about", "lower the shape, the batch or the context"],
        ),
    ]
}
