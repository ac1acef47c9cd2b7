use super::draw::Side;
use super::*;
use crate::dataset::DatasetConfig;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Keys of `[source.task]` of every kind, at sizes that are not round.
const TASKS: [&str; 12] = [
    "kind = \"linear-recall\"\nwidth = 5\nitems = 3",
    "kind = \"records\"\nrecords = 5\nattributes = 3\nsymbols = 7",
    "kind = \"records\"\nrecords = 1\nattributes = 1\nsymbols = 36",
    "kind = \"mqar\"\npairs = 6\nlength = 41\nkeys = 9\nvalues = 6",
    "kind = \"mqar\"\npairs = 3\nlength = 12\nkeys = 3\nvalues = 4\npower = 1.0",
    "kind = \"multi-key-match\"\nattributes = 3\nkey_width = 4\nvalue_width = 2\nitems = 5\nqueries = 7",
    "kind = \"copy\"\nsymbols = 3\nlength = 6",
    "kind = \"copy\"\nsymbols = 11\nlength = 5\nnoise = 8",
    "kind = \"induction\"\nsymbols = 13\nlength = 9\nrepeat = 4",
    "kind = \"position\"\nsymbols = 12\nlength = 11\nlag = 3",
    "kind = \"dyck\"\nkinds = 3\nlength = 26\ndepth = 4",
    "kind = \"modular-addition\"\nmodulus = 13\nterms = 4",
];

fn load(task: &str) -> Result<DatasetConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.toml");
    let source = "kind = \"task\"\nseed = 5\nvalidation_examples = 10";
    std::fs::write(&path, format!("name = \"t\"\n[source]\n{source}\n[source.task]\n{task}\n")).unwrap();
    DatasetConfig::load(&path)
}

fn made(task: &str) -> TaskCorpus {
    TaskCorpus::new(&load(task).unwrap()).unwrap().unwrap()
}

fn each_of_tokens() -> impl Iterator<Item = (&'static str, TaskCorpus)> {
    TASKS.iter().map(|task| (*task, made(task))).filter(|(_, corpus)| corpus.tokenizer().is_some())
}

fn tokens(corpus: &TaskCorpus, index: u64) -> TokenExample {
    let Kind::Tokens(task) = corpus.task().kind() else { panic!("a task of vectors") };
    task.example(&mut Draw::new(5, Side::Train(2), index))
}

fn vectors(corpus: &TaskCorpus, index: u64) -> VectorExample {
    let Kind::Vectors(task) = corpus.task().kind() else { panic!("a task of tokens") };
    task.example(&mut Draw::new(5, Side::Train(2), index))
}

/// Solves an example from its words alone: the answer due at each position.
fn solve(task: &Task, words: &[String]) -> Vec<Option<String>> {
    let word = |i: usize| words[i].as_str();
    let number = |word: &str| word[1..].parse::<usize>().unwrap();
    let mut answers = vec![None; words.len()];
    match task {
        Task::Records(_) => {
            let (records, queries) = words.split_at(words.len() / 2);
            for (i, (record, query)) in records.iter().zip(queries).enumerate() {
                let symbol = record.as_bytes()[1 + number(query)];
                answers[records.len() + i] = Some(format!("s{}", char::from(symbol)));
            }
        }
        Task::Mqar(sizes) => {
            let pairs: Vec<(&str, &str)> = (0..sizes.pairs).map(|i| (word(2 * i), word(2 * i + 1))).collect();
            for (i, answer) in answers.iter_mut().enumerate().skip(2 * sizes.pairs) {
                let pair = pairs.iter().find(|(key, _)| *key == word(i));
                assert_eq!(pair.is_none(), word(i) == "_");
                *answer = pair.map(|(_, value)| (*value).to_owned());
            }
        }
        Task::Copy(_) => {
            let separator = words.iter().position(|word| word == "|").unwrap();
            let symbols = words[..separator].iter().filter(|word| *word != "_");
            for (i, symbol) in symbols.enumerate() {
                answers[separator + i] = Some(symbol.clone());
            }
        }
        Task::Induction(_) => {
            for (i, answer) in answers.iter_mut().enumerate() {
                let before = words[..i].iter().position(|word| *word == words[i]);
                *answer = before.map(|before| words[before + 1].clone());
            }
        }
        Task::Position(sizes) => {
            for (i, answer) in answers.iter_mut().enumerate() {
                *answer = i.checked_sub(sizes.lag).map(|back| words[back].clone());
            }
        }
        Task::Dyck(sizes) => {
            let mut open: Vec<usize> = Vec::new();
            for (i, word) in words.iter().enumerate() {
                match (word.starts_with('('), number(word)) {
                    (true, kind) => open.push(kind),
                    (false, kind) => assert_eq!(open.pop(), Some(kind)),
                }
                assert!(open.len() <= sizes.depth);
                // Whether the next one closes is drawn; where it does, this is its kind.
                answers[i] = open.last().map(|kind| format!("){kind}"));
            }
        }
        Task::ModularAddition(sizes) => {
            let (equals, numbers) = words.split_last().unwrap();
            assert_eq!(equals, "=");
            let sum: usize = numbers.iter().map(|number| number.parse::<usize>().unwrap()).sum();
            answers[numbers.len()] = Some((sum % sizes.modulus).to_string());
        }
        Task::LinearRecall(_) | Task::MultiKeyMatch(_) => panic!("a task of vectors"),
    }
    answers
}

#[test]
fn every_answer_is_the_one_that_a_reader_of_the_words_finds() {
    for (name, corpus) in each_of_tokens() {
        let tokenizer = corpus.tokenizer().unwrap();
        let word = |id: u32| tokenizer.decode(&[id]).unwrap();
        for index in 0..60 {
            let example = tokens(&corpus, index);
            assert_eq!(example.input_ids.len(), corpus.positions(), "{name}");
            assert_eq!((example.targets.len(), example.classes.len()), (corpus.positions(), corpus.positions()));
            let words: Vec<String> = example.input_ids.iter().map(|id| word(*id)).collect();
            let told: Vec<Option<String>> =
                example.targets.iter().map(|target| u32::try_from(*target).ok().map(word)).collect();
            let mut expected = solve(corpus.task(), &words);
            if let Task::Dyck(_) = corpus.task() {
                // Asked where the next bracket closes, and at the last position, whose next one is only an answer.
                for (i, answer) in expected.iter_mut().enumerate() {
                    let closes = words.get(i + 1).is_none_or(|next| next.starts_with(')'));
                    *answer = answer.take().filter(|_| closes);
                }
            }
            assert_eq!(told, expected, "{name}: {words:?}");
            assert!(told.iter().any(Option::is_some), "{name} asks nothing");
            assert!(example.targets.iter().all(|target| *target >= 0 || *target == IGNORE), "{name}");
        }
    }
}

#[test]
fn vectors_are_asked_back_as_they_were_read() {
    let corpus_of = |i: usize| made(TASKS[i]);
    let recall = corpus_of(0);
    let example = vectors(&recall, 4);
    let items: Vec<&[f32]> = example.inputs.chunks(7).collect();
    assert_eq!((items.len(), example.asked.clone()), (6, vec![false, false, false, true, true, true]));
    for i in 0..3 {
        assert_eq!(&items[i][..5], &example.values[(3 + i) * 5..(4 + i) * 5]);
        assert_eq!((&items[i][5..], items[3 + i]), (&[1.0, 0.0][..], &[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0][..]));
        assert_eq!(example.values[i * 5..(i + 1) * 5], [0.0; 5]);
    }

    let matching = corpus_of(5);
    let Task::MultiKeyMatch(_) = matching.task() else { panic!() };
    for index in 0..40 {
        let example = vectors(&matching, index);
        let rows: Vec<&[f32]> = example.inputs.chunks(12 + 2 + 1 + 3).collect();
        let (items, queries) = rows.split_at(5);
        assert_eq!((queries.len(), items[0][14..].to_vec()), (7, vec![1.0, 0.0, 0.0, 0.0]));
        for item in items {
            for key in item[..12].chunks(4) {
                let square: f32 = key.iter().map(|x| x * x).sum();
                assert!((square - 4.0).abs() < 1e-5, "{square}");
            }
        }
        for (i, query) in queries.iter().enumerate() {
            let shown = query[15..].iter().position(|flag| *flag == 1.0).unwrap();
            let block = 4 * shown..4 * shown + 4;
            assert!(query[..15].iter().enumerate().all(|(c, x)| block.contains(&c) || *x == 0.0 || c == 14));
            let item = items.iter().find(|item| item[block.clone()] == query[block.clone()]).unwrap();
            assert_eq!(item[12..14], example.values[(5 + i) * 2..(6 + i) * 2]);
        }
    }
}

#[test]
fn gaussian_items_have_the_variance_that_the_error_is_measured_in() {
    let corpus = made(TASKS[0]);
    let numbers: Vec<f64> = (0..2000).flat_map(|index| vectors(&corpus, index).values).map(f64::from).collect();
    let count = 2000.0 * 15.0;
    let (mean, square) = (numbers.iter().sum::<f64>() / count, numbers.iter().map(|x| x * x).sum::<f64>() / count);
    assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03, "{mean} {square}");
}

#[test]
fn an_example_depends_on_seeds_and_number_alone_and_no_two_streams_meet() {
    for task in TASKS {
        let corpus = made(task);
        let layout = RowLayout { seq_len: corpus.positions() * 4, mask_documents: true };
        let batch = |seed: u64, step: u64| corpus.batch(layout, 8, seed, step);
        assert_eq!(batch(1, 7), made(task).batch(layout, 8, 1, 7), "{task}");
        let held = match corpus.held(layout, 8) {
            HeldExamples::Tokens(mut batches, _) => batches.remove(0).batch,
            HeldExamples::Vectors(mut batches) => batches.remove(0),
        };
        // One record of one symbol and one query: 36 examples in all, which repeat by chance.
        let all = [batch(1, 7), batch(1, 8), batch(2, 7), batch(2, 8), held];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "{task}");
        }
        let other = load(task).map(|mut config| {
            if let crate::dataset::Source::Task { seed, .. } = &mut config.source {
                *seed += 1;
            }
            TaskCorpus::new(&config).unwrap().unwrap()
        });
        let other = other.unwrap();
        assert_ne!(other.batch(layout, 8, 1, 7), batch(1, 7), "{task}");
        assert_ne!(other.fingerprint(), corpus.fingerprint(), "{task}");
        assert_eq!(made(task).fingerprint(), corpus.fingerprint(), "{task}");
    }
    // The numbers of a step's examples follow on those of the step before.
    let corpus = made(TASKS[9]);
    let layout = RowLayout { seq_len: 25, mask_documents: true };
    let (first, second) = (corpus.batch(layout, 3, 2, 0), corpus.batch(layout, 3, 2, 1));
    assert_eq!(first.input_ids[..11], tokens(&corpus, 0).input_ids);
    assert_eq!(second.input_ids[11..22], tokens(&corpus, 7).input_ids);
}

#[test]
fn rows_hold_whole_examples_and_are_padded() {
    for (mask, expected) in [(true, [0, 11, 22]), (false, [0, 0, 0])] {
        let corpus = made(TASKS[9]);
        let layout = RowLayout { seq_len: 25, mask_documents: mask };
        let batch = corpus.batch(layout, 3, 2, 0);
        assert_eq!((batch.rows, batch.seq_len, batch.input_ids.len()), (3, 25, 75));
        assert_eq!(batch.target_tokens(), 6 * 8);
        for row in 0..3 {
            let starts = &batch.document_starts[row * 25..(row + 1) * 25];
            let wanted: Vec<u32> = (0..25).map(|t| expected[t / 11]).collect();
            assert_eq!(starts, wanted);
            assert!(batch.targets[row * 25 + 22..(row + 1) * 25].iter().all(|target| *target == IGNORE));
            let second = tokens(&corpus, 2 * row as u64 + 1);
            assert_eq!(batch.targets[row * 25 + 11..row * 25 + 22], second.targets);
        }
        // Ten held-out examples: two rows of two, twice, and one row of two.
        let HeldExamples::Tokens(held, names) = corpus.held(layout, 2) else { panic!() };
        assert_eq!(held.iter().map(|answers| answers.batch.rows).collect::<Vec<_>>(), [2, 2, 1]);
        assert!(held.iter().all(|answers| answers.classes.len() == answers.batch.targets.len()));
        assert_eq!(held.iter().map(|answers| answers.batch.target_tokens()).sum::<usize>(), 10 * 8);
        assert_eq!(names, ["recall"]);
    }
    for (mask, expected) in [(true, [0, 6, 12]), (false, [0, 0, 0])] {
        let corpus = made(TASKS[0]);
        let layout = RowLayout { seq_len: 14, mask_documents: mask };
        let batch = corpus.batch(layout, 3, 2, 0);
        let of = batch.vectors.as_ref().unwrap();
        assert_eq!((batch.rows, batch.seq_len, of.input_width, of.output_width), (3, 14, 7, 5));
        assert_eq!(batch.target_tokens(), 6 * 3);
        for row in 0..3 {
            let wanted: Vec<u32> = (0..14).map(|t| expected[t / 6]).collect();
            assert_eq!(batch.document_starts[row * 14..(row + 1) * 14], wanted);
            let second = vectors(&corpus, 2 * row as u64 + 1);
            assert_eq!(of.inputs[(row * 14 + 6) * 7..(row * 14 + 12) * 7], second.inputs);
            assert_eq!(of.values[(row * 14 + 6) * 5..(row * 14 + 12) * 5], second.values);
            let asked: Vec<bool> = batch.targets[row * 14 + 6..row * 14 + 12].iter().map(|t| *t != IGNORE).collect();
            assert_eq!(asked, second.asked);
            assert!(of.inputs[(row * 14 + 12) * 7..(row + 1) * 14 * 7].iter().all(|x| *x == 0.0));
        }
        let HeldExamples::Vectors(held) = corpus.held(layout, 4) else { panic!() };
        assert_eq!(held.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [4, 1]);
        assert_eq!(held.iter().map(lowkey_batch::Batch::target_tokens).sum::<usize>(), 10 * 3);
    }
}

#[test]
fn a_vocabulary_is_a_tokenizer_like_any_other() {
    for (name, corpus) in each_of_tokens() {
        let Kind::Tokens(task) = corpus.task().kind() else { panic!() };
        let (words, tokenizer) = (task.words(), corpus.tokenizer().unwrap());
        assert_eq!((tokenizer.vocab_size(), corpus.width()), (words.len(), words.len()), "{name}");
        let ids: Vec<u32> = (0..words.len() as u32).collect();
        assert_eq!(tokenizer.encode(&words.join(" ")).unwrap(), ids, "{name}: words are not told apart");
        assert_eq!(tokenizer.decode(&ids).unwrap(), words.join(" "), "{name}");
        assert!(tokenizer.encode("never").is_err() && tokenizer.eos_id().is_none(), "{name}");
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let again = Tokenizer::from_model_dir(dir.path()).unwrap();
        assert_eq!((again.fingerprint(), again.name()), (tokenizer.fingerprint(), "wordlevel"), "{name}");
    }
}

/// The share of answers that `guess` gets right, by random number and example.
fn share(corpus: &TaskCorpus, guess: impl Fn(&mut Draw, &TokenExample, usize) -> u32) -> f64 {
    let mut draw = Draw::new(77, Side::Validation, 3);
    let (mut right, mut all) = (0u32, 0u32);
    for index in 0..4000 {
        let example = tokens(corpus, index);
        for at in (0..example.targets.len()).filter(|at| example.targets[*at] != IGNORE) {
            right += u32::from(i64::from(guess(&mut draw, &example, at)) == example.targets[at]);
            all += 1;
        }
    }
    f64::from(right) / f64::from(all)
}

#[test]
fn chance_is_what_a_guess_among_the_possible_answers_is_right_by() {
    for (name, corpus) in each_of_tokens() {
        let Kind::Tokens(task) = corpus.task().kind() else { panic!() };
        let words = task.words();
        let beginning =
            |with: &str| (0..words.len() as u32).filter(|id| words[*id as usize].starts_with(with)).collect();
        let possible: Vec<u32> = match corpus.task() {
            Task::Records(_) | Task::Copy(_) => beginning("s"),
            Task::Dyck(_) => beginning(")"),
            Task::ModularAddition(_) => (0..13).collect(),
            _ => Vec::new(),
        };
        let guessed = share(&corpus, |draw, example, at| match corpus.task() {
            Task::Position(_) => example.input_ids[draw.below(at)],
            Task::Mqar(sizes) => example.input_ids[2 * draw.below(sizes.pairs) + 1],
            Task::Induction(sizes) => {
                let others = example.input_ids[..sizes.length].iter().filter(|id| **id != example.input_ids[at]);
                *others.clone().nth(draw.below(others.count())).unwrap()
            }
            _ => possible[draw.below(possible.len())],
        });
        assert!((guessed - corpus.chance()).abs() < 0.02, "{name}: {guessed} for {}", corpus.chance());
    }
}

#[test]
fn distances_of_queries_follow_the_power_law() {
    let slots = |power: &str| {
        let corpus = made(&format!("kind = \"mqar\"\npairs = 4\nlength = 72\nkeys = 8\nvalues = 8\npower = {power}"));
        let mut counts = [0u32; 32];
        for index in 0..3000 {
            let example = tokens(&corpus, index);
            (0..32).filter(|slot| example.targets[8 + 2 * slot] != IGNORE).for_each(|slot| counts[slot] += 1);
        }
        counts
    };
    let (near, even) = (slots("0.01"), slots("1.0"));
    assert_eq!((near.iter().sum::<u32>(), even.iter().sum::<u32>()), (12_000, 12_000));
    assert!(even.iter().all(|count| (300..450).contains(count)), "{even:?}");
    assert!(near[0] > 2000 && near[31] < 200 && near[31] > 40, "{near:?}");
}

#[test]
fn classes_tell_first_from_later_and_depths_apart() {
    let induction = made(TASKS[8]);
    let example = tokens(&induction, 3);
    assert_eq!((example.targets[9] >= 0, example.classes[9..].to_vec()), (true, vec![0, 1, 1]));
    let dyck = made(TASKS[10]);
    let mut seen = [false; 4];
    for index in 0..50 {
        let example = tokens(&dyck, index);
        let mut depth = 0usize;
        for (at, id) in example.input_ids.iter().enumerate() {
            depth = if *id < 3 { depth + 1 } else { depth - 1 };
            if example.targets[at] != IGNORE {
                assert_eq!(usize::from(example.classes[at]), depth - 1);
                seen[depth - 1] = true;
            }
        }
    }
    assert_eq!(seen, [true; 4]);
}

#[test]
fn sizes_that_no_example_can_have_are_named() {
    for (task, expected) in [
        ("kind = \"records\"\nrecords = 0\nattributes = 3\nsymbols = 7", "source.task.records = 0"),
        ("kind = \"records\"\nrecords = 1\nattributes = 30\nsymbols = 7", "symbols to the power of attributes"),
        (
            "kind = \"records\"\nrecords = 1\nattributes = 99999999999\nsymbols = 2",
            "symbols to the power of attributes",
        ),
        ("kind = \"records\"\nrecords = 1\nattributes = 1\nsymbols = 37", "symbols = 37"),
        ("kind = \"mqar\"\npairs = 6\nlength = 23\nkeys = 9\nvalues = 6", "length = 23 must be at least 24"),
        ("kind = \"mqar\"\npairs = 6\nlength = 24\nkeys = 5\nvalues = 6", "keys = 5 must be at least 6"),
        ("kind = \"mqar\"\npairs = 1\nlength = 24\nkeys = 5\nvalues = 6\npower = nan", "power"),
        ("kind = \"copy\"\nsymbols = 1\nlength = 6", "symbols = 1"),
        ("kind = \"copy\"\nsymbols = 3\nlength = 6\nnoice = 8", "noice"),
        ("kind = \"induction\"\nsymbols = 13\nlength = 9\nrepeat = 10", "length = 9 must be at least 10"),
        ("kind = \"position\"\nsymbols = 10\nlength = 11\nlag = 3", "symbols = 10 must be at least 11"),
        ("kind = \"position\"\nsymbols = 12\nlength = 11\nlag = 11", "length = 11 must be at least 12"),
        ("kind = \"dyck\"\nkinds = 3\nlength = 25\ndepth = 4", "length = 25 must be even"),
        ("kind = \"dyck\"\nkinds = 3\nlength = 26\ndepth = 17", "depth = 17"),
        ("kind = \"modular-addition\"\nmodulus = 1", "modulus = 1"),
        ("kind = \"linear-recall\"\nwidth = 0\nitems = 3", "width = 0"),
        (
            "kind = \"multi-key-match\"\nattributes = 0\nkey_width = 4\nvalue_width = 2\nitems = 5\nqueries = 7",
            "attributes = 0",
        ),
        ("kind = \"sorting\"\nlength = 3", "sorting"),
        ("kind = \"position\"\nlength = 11\nlag = 3", "symbols"),
        ("kind = \"dyck\"\nkinds = 3\nlength = 26\ndepth = 4\n[tokenizer]\nkind = \"chars\"", "remove [tokenizer]"),
        (
            "kind = \"dyck\"\nkinds = 3\nlength = 26\ndepth = 4\n[split]\nvalidation_fraction = 0.2",
            "remove [tokenizer]",
        ),
    ] {
        let message = load(task).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("t.toml"), "{expected}: {message}");
    }
}

#[test]
fn a_dataset_file_survives_being_written_and_a_task_has_nothing_to_prepare() {
    for task in TASKS {
        let config = load(task).unwrap();
        let again: DatasetConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.source, config.source, "{task}");
        let dir = tempfile::tempdir().unwrap();
        let message = crate::prepare(&config, dir.path(), None, &mut |_| std::ops::ControlFlow::Continue(()))
            .unwrap_err()
            .to_string();
        assert!(message.contains("nothing to prepare") && message.contains("lowkey data info"), "{message}");
        let summary = made(task).summary();
        assert_eq!(summary.output_width.is_some(), config_is_of_vectors(&config), "{task}");
        assert!(summary.answers > 0 && summary.width > 1 && summary.validation_examples == 10, "{task}");
    }
}

fn config_is_of_vectors(config: &DatasetConfig) -> bool {
    matches!(&config.source, crate::dataset::Source::Task { task, .. } if task.is_of_vectors())
}
