use super::*;

const CHAT: &str = "name = \"talk\"\n[source]\nkind = \"jsonl\"\npaths = [\"talk.jsonl\"]\nrecords = \"messages\"\n[chat]\n\
                    template = \"talk.jinja\"\n[split]\nvalidation_fraction = 0.2\n";
const PLAIN: &str = "name = \"lines\"\n[source]\nkind = \"text\"\npaths = [\"text.txt\"]\nseparator = \"\\n\"\n[split]\n\
                     validation_fraction = 0.2\n";
const MIXTURE: &str =
    "mixture = [{ dataset = \"talk.toml\", weight = 0.75 }, { dataset = \"lines.toml\", weight = 0.25 }]";

/// A run whose file says this of its data, with datasets of records, of pairs and of plain lines beside it.
fn run_on(data: &str) -> TinyRun {
    let run = TinyRun::new();
    let write = |name: &str, text: &str| std::fs::write(run.dir.path().join(name), text).unwrap();
    let line = |i: usize| {
        let (question, answer) = [("up", "down"), ("left", "right"), ("in", "out")][i % 3];
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{question} {i}\"}}, {{\"role\": \"assistant\", \"content\": \"{answer}\"}}]}}\n"
        )
    };
    let mut lines: String = (0..60).map(line).collect();
    lines += &line(1).replace("left", &"long ".repeat(30));
    lines += "{}\n";
    lines += &(0..20).map(line).collect::<String>();
    write("talk.jsonl", &lines);
    write("talk.toml", &CHAT.replace("[split]", "skip_bad = true\n[split]"));
    write("talk.jinja", "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else ';' }}{% endfor %}");
    write("lines.toml", PLAIN);
    let pair =
        |i: usize| format!("{{\"prompt\": \"{i} is\", \"chosen\": \" a number\", \"rejected\": \" a letter\"}}\n");
    write("pairs.jsonl", &(0..40).map(pair).collect::<String>());
    write(
        "pairs.toml",
        "name = \"pairs\"\n[source]\nkind = \"jsonl\"\npaths = [\"pairs.jsonl\"]\nrecords = \"preference\"\n",
    );
    let file = std::fs::read_to_string(run.file()).unwrap();
    let file = file.replace("path = \"text.txt\"", data).replace("seq_len = 24", "seq_len = 40");
    std::fs::write(run.file(), file).unwrap();
    run
}

#[test]
fn a_mixture_learns_measures_each_dataset_and_goes_on_to_the_same_bits() {
    let unbroken = run_on(MIXTURE);
    let (mut notes, mut example) = (String::new(), String::new());
    let outcome = unbroken.watch(&[], &AtomicBool::new(false), &mut |event| match event {
        Event::Note(note) => notes += &note,
        Event::Example(parts) => {
            example = parts.iter().map(|p| if p.learnt { format!("[[{}]]", p.text) } else { p.text.clone() }).collect();
        }
        _ => {}
    });
    let evaluation = outcome.unwrap().evaluation.unwrap();
    assert_eq!(example, "up 0:[[down;]]");
    assert!(notes.contains("talk: 1 records cannot be used") && notes.contains("talk.jsonl: line 62"), "{notes}");
    assert!(notes.contains("talk: 1 records are longer than data.seq_len = 40 and are left out"), "{notes}");
    let [talk, lines] = &evaluation.datasets[..] else { panic!("{:?}", evaluation.datasets) };
    assert_eq!((talk.dataset.as_str(), lines.dataset.as_str()), ("talk", "lines"));
    assert!((evaluation.loss - 0.75 * talk.loss - 0.25 * lines.loss).abs() < 1e-12);
    assert_eq!(evaluation.tokens, talk.tokens + lines.tokens);
    let metrics = unbroken.metrics();
    let told = metrics.last().unwrap().dataset_loss.clone().unwrap();
    assert!(told.len() == 2 && told["talk"].as_f64().is_some() && told["lines"].as_f64().is_some());
    assert!(talk.loss < metrics[0].train_loss / 2.0, "{} {}", talk.loss, metrics[0].train_loss);
    // The checkpoint asks in the form that was learnt.
    let template = std::fs::read_to_string(unbroken.checkpoint(STEPS).join("chat_template.jinja")).unwrap();
    assert!(template.contains("m.content"));

    let run = run_on(MIXTURE).interrupted(&[], &[5, 16]);
    run.assert_ends_as(&unbroken, &END);
    let file = std::fs::read_to_string(run.file()).unwrap();
    std::fs::write(run.file(), file.replace("0.75", "0.5")).unwrap();
    let refused = message(run.train(&[]));
    assert!(refused.contains("[data] is not what the run began with"), "{refused}");
}

#[test]
fn what_cannot_be_mixed_or_learnt_is_refused() {
    for (data, overrides, expected) in [
        ("mixture = []", &[][..], "data.dataset = (absent)"),
        (&format!("path = \"text.txt\"\n{MIXTURE}"), &[], "keep one of them"),
        (&MIXTURE.replace("0.25", "-1"), &[], "data.mixture.weight = -1"),
        (&MIXTURE.replace("lines.toml", "talk.toml"), &[], "two datasets have this name"),
        (&MIXTURE.replace("talk.toml", "pairs.toml"), &[], "cannot be mixed"),
        ("dataset = \"pairs.toml\"", &["training.batch_size=3"], "training.batch_size = 3"),
        ("dataset = \"pairs.toml\"", &["training.micro_batch_size=3"], "training.micro_batch_size = 3"),
        ("dataset = \"lines.toml\"", &["data.train_on=all"], "data.train_on = all: the dataset has no records"),
        ("dataset = \"lines.toml\"", &["data.too_long=cut"], "data.too_long = cut"),
        ("dataset = \"talk.toml\"", &["data.packing=stream"], "data.packing = stream"),
        ("dataset = \"talk.toml\"", &["data.chat_template=nothing"], "nothing"),
        ("dataset = \"talk.toml\"", &["data.train_on=completion"], "needs records that say what their prompt is"),
        ("dataset = \"talk.toml\"", &["data.seq_len=2"], "longer than seq_len = 2"),
    ] {
        let run = run_on(data);
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
        let refused = RunConfig::load(&run.file(), &overrides)
            .and_then(|config| train(&config, &run.options(), &AtomicBool::new(false), &mut |_| {}));
        let refused = message(refused);
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
}

#[test]
fn another_way_to_learn_records_is_another_folder_of_tokens() {
    let run = run_on("dataset = \"talk.toml\"");
    let tokens = |overrides: &[&str]| {
        let setup = setup(&run.config(overrides), &run.options(), &mut |_| {}).unwrap();
        setup.data.checksum()
    };
    let (usual, all, last) = (tokens(&[]), tokens(&["data.train_on=all"]), tokens(&["data.train_on=last"]));
    assert!(usual != all && usual == last, "the last answer is the only one");
    let folders = names(&run.dir.path().join("prepared"));
    assert_eq!(folders.iter().filter(|name| name.starts_with("talk-")).count(), 3, "{folders:?}");
}

#[test]
fn messages_are_answered_at_evaluations_up_to_the_end_of_a_turn() {
    let run = run_on("dataset = \"talk.toml\"");
    let overrides = [
        "eval.chat=[\"up 3\", \"in 5\"]",
        "eval.prompts=[]",
        "eval.every=60",
        "eval.temperature=0",
        "eval.sample_tokens=20",
        "training.steps=120",
    ];
    let mut answers = Vec::new();
    run.watch(&overrides, &AtomicBool::new(false), &mut |event| {
        if let Event::Sample { prompt, text, chat } = event {
            assert!(chat);
            answers.push((prompt.to_owned(), text.to_owned()));
        }
    })
    .unwrap();
    // Learnt by then: the answer's words without the `;` that ends it, and nothing behind.
    let expected = [("up 3", "down"), ("in 5", "out")].map(|(message, answer)| (message.to_owned(), answer.to_owned()));
    assert_eq!((answers.len(), &answers[2..]), (4, &expected[..]));
    let samples = run_dir::Samples::read(&run.out().join("samples.jsonl")).unwrap();
    assert_eq!(samples.messages.iter().collect::<Vec<_>>(), ["in 5", "up 3"]);
    assert_eq!(samples.prompts["up 3"].values().next_back().unwrap(), "down");

    let long = format!("eval.chat=[\"{}\"]", "x".repeat(50));
    let refused = message(run_on("dataset = \"talk.toml\"").train(&[&long]));
    assert!(refused.starts_with("eval.chat = ") && refused.contains("40 positions"), "{refused}");
    let refused = message(run_on("dataset = \"lines.toml\"").train(&["eval.chat=[\"up\"]"]));
    assert!(refused.starts_with("eval.chat = ") && refused.contains("no chat template"), "{refused}");
}

#[test]
fn what_ends_a_turn_ends_a_text_of_the_trained_model_where_it_is_a_token_of_its_own() {
    let ends = |run: &TinyRun, step: u64, file: &str| -> Vec<u64> {
        let text = std::fs::read_to_string(run.checkpoint(step).join(file)).unwrap();
        let keys: serde_json::Value = serde_json::from_str(&text).unwrap();
        let ends = &keys["eos_token_id"];
        ends.as_array().map_or_else(
            || ends.as_u64().into_iter().collect(),
            |ends| ends.iter().flat_map(|id| id.as_u64()).collect(),
        )
    };
    // Of bytes `;` ends a turn, and stands in texts as well.
    let plain = run_on("dataset = \"talk.toml\"");
    plain.train(&["training.steps=2"]).unwrap();
    assert_eq!(ends(&plain, 2, "generation_config.json"), [256]);

    for (dataset, expected) in [("talk.toml", &[256, 257][..]), ("lines.toml", &[256])] {
        let (run, _base) = adapters::beside("", "new_tokens = [\"<|end|>\"]\n");
        for name in ["talk.jsonl", "talk.toml", "lines.toml"] {
            std::fs::copy(plain.dir.path().join(name), run.dir.path().join(name)).unwrap();
        }
        std::fs::write(
            run.dir.path().join("talk.jinja"),
            "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else '<|end|>' }}{% endfor %}",
        )
        .unwrap();
        let file = std::fs::read_to_string(run.file()).unwrap();
        std::fs::write(run.file(), file.replace("path = \"text.txt\"", &format!("dataset = \"{dataset}\""))).unwrap();
        run.train(&["training.steps=2"]).unwrap();
        for file in ["generation_config.json", "config.json"] {
            assert_eq!(ends(&run, 2, file), expected, "{dataset}: {file}");
        }
    }
}
