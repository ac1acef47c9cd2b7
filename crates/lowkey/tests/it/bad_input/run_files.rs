//! Run files, `--set` and shapes that no model can have.

use super::fixture::RUN;
use super::{Case, case};

const TRAIN: [&str; 4] = ["train", "run.toml", "--out", "new"];

/// `run.toml` as it is, with one key replaced on the command line. Wrong use.
fn set(expression: &str, fragments: &[&str]) -> Case {
    let arguments = [&TRAIN[..], &["--set", expression]].concat();
    case(format!("--set {expression}"), &arguments).code(2).says(fragments)
}

/// Another `run.toml`. Wrong use.
fn written(name: &str, text: impl Into<Vec<u8>>, fragments: &[&str]) -> Case {
    case(name, &TRAIN).file("run.toml", text).code(2).says(&["run.toml"]).says(fragments)
}

pub(super) fn cases() -> Vec<Case> {
    let in_file = |key: &str, rule: &str| set(key, &["run.toml", rule]);
    let mut cases = vec![
        // Text that is no run file.
        written("unknown key", RUN.replace("lr = ", "lrr = "), &["line 21", "`lrr`", "expected one of", "`lr`"]),
        written(
            "unknown section",
            format!("{RUN}[nonsense]\nx = 1\n"),
            &["`nonsense`", "expected one of", "`checkpoint`"],
        ),
        written("wrong type", RUN.replace("steps = 4", "steps = \"four\""), &["line 24", "\"four\"", "expected u64"]),
        written("missing section", RUN.replace("[optimizer]\nlr = 1e-2\n", ""), &["missing field `optimizer`"]),
        written("missing key", RUN.replace("batch_size = 2\n", ""), &["missing field `batch_size`"]),
        written("TOML syntax", RUN.replace("lr = 1e-2", "lr = = 1"), &["line 21", "lr = = 1"]),
        written("nested without end", format!("x = {}", "[".repeat(200_000)), &["recursion"]),
        written("not UTF-8", [RUN.as_bytes(), b"# caf\xe9\n"].concat(), &["invalid UTF-8 at byte", "UTF-8"]),
        written("empty file", "", &["missing field `run`"]),
        written(
            "no model",
            RUN.replace("[model]", "[metrics]\n[model]").split("[model]").next().unwrap(),
            &["missing field"],
        ),
        case("run file missing", &["train", "absent.toml"]).says(&["absent.toml", "No such file"]),
        case("run file a folder", &["train", "."]).says(&[".: is not a regular file: it is a folder"]),
        case("run file without end", &["train", "/dev/zero"]).says(&["/dev/zero: is not a regular file"]),
        case("no run file", &["train"]).code(2).says(&["<RUN>", "--help"]),
        case("unknown flag", &["train", "run.toml", "--steps", "3"]).code(2).says(&["--steps", "--help"]),
        case("unknown command", &["tarin", "run.toml"]).code(2).says(&["tarin", "train"]),
        case("two ways at once", &["train", "run.toml", "--resume", "--overwrite"])
            .code(2)
            .says(&["--resume", "--overwrite"]),
        // --set itself.
        set("optimizer.lr", &["--set optimizer.lr", "section.key=value"]),
        set("=5", &["--set =5", "no key"]),
        set("run.name.first=x", &["--set run.name.first=x", "name is not a section"]),
        set("optimizer.lrr=1", &["run.toml", "`lrr`", "expected one of"]),
        set("optimizer.lr=fast", &["run.toml", "\"fast\"", "optimizer.lr"]),
        // Values.
        in_file("training.steps=0", "training.steps = 0: must lie between 1"),
        in_file("training.steps=-1", "`-1`"),
        in_file("training.steps=1e30", "expected u64"),
        set(
            "training.steps=18446744073709551615",
            &["--set training.steps=18446744073709551615", "must lie between", "9223372036854775807"],
        ),
        in_file(
            "training.steps=2",
            "lr_scheduler.warmup_steps = 3: must not exceed training.steps = 2; lower it, as with --set",
        )
        .set("lr_scheduler.warmup_steps=3"),
        in_file("training.batch_size=0", "training.batch_size = 0: must lie between 1 and"),
        in_file("training.micro_batch_size=0", "training.micro_batch_size = 0: must lie between 1 and"),
        in_file("training.threads=0", "training.threads = 0: must lie between 1 and"),
        in_file("training.threads=9999999", "training.threads = 9999999: must lie between 1 and"),
        in_file("training.dtype=f16", "training.dtype = f16: the CPU trains in f32 and bf16; write one of them"),
        in_file("training.recompute=layer", "unknown variant `layer`, expected `none` or `block`"),
        in_file("training.z_loss=-1e-4", "training.z_loss = -0.0001: must lie between 0 and 1"),
        in_file("training.z_loss=nan", "training.z_loss = NaN: must lie between 0 and 1"),
        in_file("training.dtype=f64", "unknown variant `f64`"),
        in_file("optimizer.lr=0", "optimizer.lr = 0: must be a finite number > 0"),
        in_file("optimizer.lr=-0.1", "optimizer.lr = -0.1: must be a finite number > 0"),
        in_file("optimizer.lr=nan", "optimizer.lr = NaN: must be a finite number > 0"),
        in_file("optimizer.lr=inf", "optimizer.lr = inf: must be a finite number > 0"),
        in_file("optimizer.betas=[1.0, 0.9]", "optimizer.betas = 1: each must lie in 0 ≤ β < 1"),
        in_file("optimizer.betas=[0.9]", "optimizer.betas"),
        in_file("optimizer.eps=0", "optimizer.eps = 0: must be"),
        in_file("optimizer.weight_decay=-1", "optimizer.weight_decay = -1: must be"),
        in_file("optimizer.grad_clip=0", "optimizer.grad_clip = 0: must be a finite number > 0; leave it out"),
        in_file("optimizer.kind=sgd", "unknown variant `sgd`, expected `adamw` or `muon`"),
        in_file("optimizer.momentum=0.9", "optimizer.momentum = 0.9: kind = \"adamw\" has none"),
        in_file("optimizer.momentum=1", "optimizer.momentum = 1: must lie in 0 ≤ μ < 1").set("optimizer.kind=muon"),
        in_file("optimizer.momentum=nan", "optimizer.momentum = NaN: must lie in 0 ≤ μ < 1").set("optimizer.kind=muon"),
        in_file("optimizer.momentum=high", "\"high\"").set("optimizer.kind=muon"),
        in_file("lr_scheduler.kind=step", "unknown variant `step`, expected one of `constant`"),
        in_file("lr_scheduler.warmup_steps=99", "lr_scheduler.warmup_steps = 99: must not exceed training.steps = 4"),
        in_file("lr_scheduler.decay_fraction=1.5", "lr_scheduler.decay_fraction = 1.5: must lie between 0 and 1"),
        in_file("lr_scheduler.min_lr_ratio=nan", "lr_scheduler.min_lr_ratio = NaN: must lie"),
        in_file(
            "run.device=cuda",
            "run.device = cuda: this build has no `cuda` devices; build with `cargo build --release --features cuda`, or take `cpu`",
        ),
        in_file("run.device=toaster", "run.device = toaster: there is no device `toaster`; known are auto, cpu"),
        in_file("run.name=a/b", "run.name = a/b: must be a folder name"),
        in_file("run.name=..", "run.name = ..: must be a folder name"),
        in_file("data.dataset=chars.toml", "data.path = text.txt: data.dataset is set too; keep one"),
        in_file("data.seq_len=0", "data.seq_len = 0: must lie between 1 and"),
        in_file("data.packing=tight", "unknown variant `tight`, expected `stream` or `documents`"),
        in_file("eval.batches=0", "eval.batches = 0: must be at least 1"),
        in_file("eval.temperature=-1", "eval.temperature = -1: must be"),
        in_file("eval.prompts=[\"\"]", "eval.prompts = \"\": has no token"),
        in_file("eval.prompts=[\"more bytes than sixteen\"]", "fills the model's 16 positions; shorten it"),
        in_file("checkpoint.keep=0", "checkpoint.keep = 0: must be at least 1"),
        in_file("metrics.every=0", "metrics.every = 0: must be at least 1"),
        in_file("init.from=nowhere", "[init] from brings its own configuration; remove the [model] section"),
        written(
            "sizes for a model that brings its own",
            RUN.split_once("[model]")
                .map(|(head, tail)| {
                    format!("{head}[init]\nfrom = \"m\"\n[data]{}", tail.split_once("[data]").unwrap().1)
                })
                .unwrap(),
            &["[init] from brings its own configuration; leave out --set model.…", "max_position_embeddings"],
        )
        .set("model.max_position_embeddings=512"),
        written(
            "no source of text",
            RUN.replace("path = \"text.txt\"\n", ""),
            &["data.dataset = (absent)", "data.path"],
        ),
        set("data.path=absent.txt", &["absent.txt", "does not exist", "current folder"]).code(1),
        set("data.seq_len=100000", &["train.tokens", "too few for seq_len = 100000", "lower it"]).code(1),
        // Shapes.
        in_file("model.attention=linear", "unknown variant `linear`, expected one of `mla`"),
        in_file("model.hidden_size=0", "model.hidden_size = 0: must lie between 1 and"),
        in_file("model.num_hidden_layers=0", "model.num_hidden_layers = 0: must lie between 1 and"),
        in_file("model.num_attention_heads=0", "model.num_attention_heads = 0: must lie between 1 and"),
        in_file("model.intermediate_size=0", "model.intermediate_size = 0: must lie between 1 and"),
        in_file("model.v_head_dim=0", "model.v_head_dim = 0: must lie between 1 and"),
        in_file("model.kv_lora_rank=0", "model.kv_lora_rank = 0: must lie between 1 and"),
        in_file("model.qk_rope_head_dim=3", "model.qk_rope_head_dim = 3: the rotated width must be even"),
        in_file("model.rms_norm_eps=nan", "model.rms_norm_eps = NaN: must be a finite number"),
        in_file("model.initializer_range=-1", "model.initializer_range = -1: must be"),
        in_file("model.hidden_size=1000000000", "model.hidden_size = 1000000000: must lie between 1 and"),
        in_file("model.num_attention_heads=1000000", "model.num_attention_heads = 1000000: "),
        in_file("model.max_position_embeddings=8", "data.seq_len = 16: the model was made for 8 positions"),
        in_file("model.vocab_size=100", "model.vocab_size = 100: the tokenizer has 257 tokens; leave the key out"),
        in_file(
            "model.rope_parameters.rope_type=yarn",
            "rope_parameters.factor is missing: rope_type = \"yarn\" needs it",
        ),
        in_file("model.rope_parameters.rope_theta=0", "rope_theta = 0: must be a finite number > 0"),
        in_file("model.rope_parameters.rope_type=spiral", "unknown variant `spiral`"),
        written(
            "MLA without a rank",
            RUN.replace("kv_lora_rank = 8\n", ""),
            &["model.kv_lora_rank is missing", "\"mla\" needs it"],
        ),
        in_file(
            "training.batch_size=1000000",
            "training.batch_size · data.seq_len = 1000000000000: must lie between 1 and",
        )
        .set("data.seq_len=1000000"),
    ];
    cases.extend([
        in_file("model.attention=mha", "hidden_size = 16: not a multiple of num_attention_heads = 3")
            .set("model.num_attention_heads=3"),
        in_file("model.attention=gqa", "num_key_value_heads = 2: must divide num_attention_heads = 3")
            .set("model.num_attention_heads=3")
            .set("model.head_dim=4")
            .set("model.num_key_value_heads=2"),
        in_file("model.attention=mha", "model.head_dim = 3: the rotated width must be even").set("model.head_dim=3"),
        // Within the bounds of each key, and yet more than any machine has.
        set(
            "model.hidden_size=1000000",
            &["training needs about", "GiB", "this machine has", "lower the model's sizes"],
        )
        .set("model.intermediate_size=1000000")
        .set("model.num_hidden_layers=4000")
        .code(1),
        case("plan of a wrong shape", &["plan", "run.toml", "--set", "model.qk_rope_head_dim=3"])
            .code(2)
            .says(&["run.toml", "model.qk_rope_head_dim = 3"]),
    ]);
    cases
}

impl Case {
    /// One more `--set`.
    fn set(mut self, expression: &str) -> Self {
        self.name = format!("{} {expression}", self.name);
        self.arguments.extend(["--set".to_string(), expression.to_string()]);
        self
    }
}
