use serde_json::json;

use super::*;
use crate::fixtures::{bits, model, names, optimizer_section, weight_bits};
use crate::run_config::OptimizerKind;

const VOCAB: usize = 257;

/// A folder for checkpoints, a model, and an optimiser that has taken some steps.
struct Bench {
    dir: tempfile::TempDir,
    model: CausalLm,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    ema: Option<CausalLm>,
}

impl Bench {
    fn new() -> Self {
        let device = Device::flex();
        let model = model(VOCAB, 8, 3, &device);
        let section = optimizer_section(OptimizerKind::Muon);
        let mut optimizer = Optimizer::new(&section, &model.parameters(), Parameter::is_matrix);
        for _ in 0..3 {
            let gradients = model.parameters().into_iter().map(|p| p.value * 0.1).collect();
            optimizer.step(model.parameters(), gradients, &crate::optimizer::Update::new(1.0, 1e-2));
        }
        Self { dir: tempfile::tempdir().unwrap(), model, optimizer, tokenizer: Tokenizer::bytes(), ema: None }
    }

    fn open(&self, keep: usize) -> Checkpoints {
        Checkpoints::open(self.dir.path(), keep).unwrap()
    }

    fn save(&self, checkpoints: &Checkpoints, step: u64, best: Option<u64>) -> PathBuf {
        self.save_with(checkpoints, step, best, &Companions::default())
    }

    fn save_with(&self, checkpoints: &Checkpoints, step: u64, best: Option<u64>, companions: &Companions) -> PathBuf {
        let generation = Generation::new(Some(&self.tokenizer));
        let state = state(step, best);
        let beside =
            Beside { tokenizer: Some(&self.tokenizer), generation: &generation, companions, ema: self.ema.as_ref() };
        checkpoints.save(&self.model, beside, &self.optimizer, &state).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn state(step: u64, best: Option<u64>) -> TrainerState {
    TrainerState {
        step,
        tokens: 100 * step,
        time_s: 1.5,
        data: "abc".into(),
        best: best.map(|step| (step, 1.25)),
        ..TrainerState::default()
    }
}

fn state_bits(states: &[ParameterState]) -> Vec<u32> {
    states.iter().flat_map(ParameterState::tensors).flat_map(|(_, tensor)| bits([tensor])).collect()
}

fn moments(optimizer: &Optimizer) -> Vec<u32> {
    state_bits(optimizer.state().0)
}

fn flip_a_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_saved_verifies_and_comes_back_bit_for_bit() {
    let bench = Bench::new();
    let checkpoints = bench.open(2);
    let path = bench.save(&checkpoints, 7, Some(7));
    assert_eq!(path, bench.path("step-000007"));
    verify(&path).unwrap();
    assert!(has_checksums(&path));
    assert_eq!(checkpoints.latest().unwrap(), (Some(path.clone()), Vec::new()));
    let device = Device::flex();
    let loaded = CausalLm::load(&path, &device).unwrap();
    assert_eq!(weight_bits(&loaded), weight_bits(&bench.model));
    assert_eq!(Tokenizer::from_model_dir(&path).unwrap().fingerprint(), bench.tokenizer.fingerprint());
    let kinds = bench.optimizer.state().0;
    let (loaded_state, loaded_states) = load_state(&path, &loaded.parameters(), kinds, &device).unwrap();
    assert_eq!(loaded_state, state(7, Some(7)));
    assert_eq!(state_bits(&loaded_states), moments(&bench.optimizer));
    let listed: BTreeMap<String, String> =
        serde_json::from_str(&fs::read_to_string(path.join(CHECKSUMS)).unwrap()).unwrap();
    let files: Vec<String> = names(&path).into_iter().filter(|name| name != CHECKSUMS).collect();
    assert_eq!(listed.into_keys().collect::<Vec<_>>(), files, "every file has a checksum");
}

#[test]
fn any_damage_is_found_and_named() {
    let bench = Bench::new();
    let checkpoints = bench.open(1);
    for file in ["model.safetensors", "config.json", "tokenizer.json", TRAINER, OPTIMIZER, "generation_config.json"] {
        let path = bench.save(&checkpoints, 1, None).join(file);
        flip_a_byte(&path);
        let message = verify(&bench.path("step-000001")).unwrap_err().to_string();
        assert!(message.contains(file) && message.contains("has changed"), "{message}");
        fs::remove_file(&path).unwrap();
        let message = verify(&bench.path("step-000001")).unwrap_err().to_string();
        assert!(message.contains(file), "{message}");
    }
    for text in ["", "{\"config.json\": 3}", "[]"] {
        let path = bench.save(&checkpoints, 1, None).join(CHECKSUMS);
        fs::write(&path, text).unwrap();
        let message = verify(&bench.path("step-000001")).unwrap_err().to_string();
        assert!(message.contains("not a table of checksums"), "{message}");
    }
}

#[test]
fn a_damaged_newest_checkpoint_is_skipped_with_a_note() {
    let bench = Bench::new();
    let checkpoints = bench.open(3);
    for step in [1, 2, 3] {
        bench.save(&checkpoints, step, Some(1));
    }
    flip_a_byte(&bench.path("step-000003/model.safetensors"));
    let (found, notes) = checkpoints.latest().unwrap();
    assert_eq!(found, Some(bench.path("step-000002")));
    assert!(notes.len() == 1 && notes[0].contains("step-000003"), "{notes:?}");
    fs::remove_file(bench.path("step-000002/checksums.json")).unwrap();
    let (found, notes) = checkpoints.latest().unwrap();
    assert_eq!((found, notes.len()), (Some(bench.path("step-000001")), 2));
    fs::remove_dir_all(bench.path("step-000001")).unwrap();
    assert_eq!(checkpoints.latest().unwrap().0, None);
    assert_eq!(newest(bench.dir.path()).unwrap(), Some(bench.path("step-000003")), "it is there, if damaged");
    assert_eq!(newest(&bench.path("nowhere")).unwrap(), None);
}

#[test]
fn a_state_that_does_not_fit_the_model_is_refused() {
    let bench = Bench::new();
    let path = bench.save(&bench.open(1), 1, None);
    let device = Device::flex();
    let mut parameters = bench.model.parameters();
    parameters[1].shape.push(2);
    let fail = |parameters: &[Parameter]| {
        load_state(&path, parameters, bench.optimizer.state().0, &device).unwrap_err().to_string()
    };
    assert!(fail(&parameters).contains(&format!("tensor m.{} is F32", parameters[1].name)));
    parameters[1].name = "other.weight".into();
    assert!(fail(&parameters).contains("tensor m.other.weight is missing"));
    // Matrices between hidden states have one moment, the rest two.
    parameters = bench.model.parameters();
    let hidden = parameters.iter().position(Parameter::is_hidden_matrix).unwrap();
    parameters[hidden].name = "other.weight".into();
    assert!(fail(&parameters).contains("tensor momentum.other.weight is missing"));
    fs::write(path.join(OPTIMIZER), "nonsense").unwrap();
    assert!(fail(&bench.model.parameters()).contains("not a readable safetensors file"));
    fs::write(path.join(TRAINER), "{\"step\": 1}").unwrap();
    assert!(fail(&bench.model.parameters()).contains("not a trainer's state"));
}

#[test]
fn the_last_few_and_the_best_are_kept() {
    let bench = Bench::new();
    let checkpoints = bench.open(2);
    for (step, best, expected) in [
        (1, None, vec!["step-000001"]),
        (2, Some(2), vec!["best", "step-000001", "step-000002"]),
        (3, Some(2), vec!["best", "step-000002", "step-000003"]),
        (4, Some(2), vec!["best", "step-000002", "step-000003", "step-000004"]),
        (5, Some(5), vec!["best", "step-000004", "step-000005"]),
    ] {
        bench.save(&checkpoints, step, best);
        assert_eq!(names(bench.dir.path()), expected, "after step {step}");
    }
}

#[test]
fn a_damaged_later_checkpoint_does_not_count_among_those_kept() {
    let bench = Bench::new();
    let checkpoints = bench.open(1);
    bench.save(&checkpoints, 9, None);
    flip_a_byte(&bench.path("step-000009/model.safetensors"));
    for step in [5, 7] {
        bench.save(&checkpoints, step, None);
        assert_eq!(checkpoints.latest().unwrap().0, Some(bench.path(&step_name(step))));
    }
    bench.save(&checkpoints, 9, None);
    assert_eq!(names(bench.dir.path()), ["step-000009"]);
    verify(&bench.path("step-000009")).unwrap();
}

#[test]
fn a_step_saved_again_replaces_the_old_one() {
    let bench = Bench::new();
    let checkpoints = bench.open(2);
    let path = bench.save(&checkpoints, 4, Some(4));
    fs::write(path.join("model-00001-of-00002.safetensors"), "stale").unwrap();
    bench.save(&checkpoints, 4, Some(4));
    assert_eq!(names(bench.dir.path()), ["best", "step-000004"]);
    assert!(!path.join("model-00001-of-00002.safetensors").exists());
    verify(&path).unwrap();
    // What its user put there comes along.
    fs::write(path.join("notes.json"), "mine").unwrap();
    bench.save(&checkpoints, 4, Some(4));
    assert_eq!(fs::read_to_string(path.join("notes.json")).unwrap(), "mine");
    verify(&path).unwrap();
}

#[test]
fn what_came_with_the_model_is_in_every_checkpoint_and_goes_with_it() {
    let bench = Bench::new();
    let source = tempfile::tempdir().unwrap();
    let template = "additional_chat_templates/tools.jinja";
    fs::create_dir(source.path().join("additional_chat_templates")).unwrap();
    for name in ["vocab.txt", "tokenizer.model", "tokenizer.json", template] {
        fs::write(source.path().join(name), name).unwrap();
    }
    let companions = Companions::read(source.path()).unwrap();
    let checkpoints = bench.open(1);
    let path = bench.save_with(&checkpoints, 4, None, &companions);
    verify(&path).unwrap();
    for name in ["vocab.txt", "tokenizer.model", template] {
        assert_eq!(fs::read_to_string(path.join(name)).unwrap(), name);
    }
    assert_eq!(Tokenizer::from_model_dir(&path).unwrap().fingerprint(), bench.tokenizer.fingerprint());
    assert_eq!(Companions::read(&path).unwrap().names().collect::<Vec<_>>().len(), 6, "with two that the run writes");

    // One of them that nobody vouches for is not loaded, a text of the user's is not looked at.
    fs::write(path.join("merges.txt"), "other").unwrap();
    assert!(verify(&path).unwrap_err().to_string().contains("does not list merges.txt"));
    fs::remove_file(path.join("merges.txt")).unwrap();
    fs::write(path.join("notes.txt"), "mine").unwrap();
    verify(&path).unwrap();
    fs::remove_file(path.join("notes.txt")).unwrap();

    // What the user put beside a template, or under the name of a companion, keeps the checkpoint; nothing else does.
    for mine in ["additional_chat_templates/mine.txt", "merges.txt"] {
        let mine = path.join(mine);
        fs::write(&mine, "mine").unwrap();
        bench.save_with(&checkpoints, 5, None, &companions);
        assert_eq!(names(bench.dir.path()), ["step-000004", "step-000005"]);
        fs::remove_file(mine).unwrap();
    }
    bench.save_with(&checkpoints, 6, None, &companions);
    assert_eq!(names(bench.dir.path()), ["step-000006"]);
}

#[test]
fn what_others_put_among_checkpoints_stays() {
    let bench = Bench::new();
    let foreign = ["step-1", "step-000002", ".tmp-mine", "best"];
    for name in foreign {
        fs::create_dir(bench.path(name)).unwrap();
        fs::write(bench.path(name).join("thesis.txt"), "mine").unwrap();
    }
    assert!(Checkpoints::open(bench.dir.path(), 1).unwrap_err().to_string().contains("best"));
    fs::remove_dir_all(bench.path("best")).unwrap();
    let checkpoints = bench.open(1);
    bench.save(&checkpoints, 3, Some(3));
    bench.save(&checkpoints, 4, Some(4));
    checkpoints.clear().unwrap();
    for name in &foreign[..3] {
        assert_eq!(fs::read_to_string(bench.path(name).join("thesis.txt")).unwrap(), "mine");
    }
    assert_eq!(names(bench.dir.path()).len(), 3);
}

#[test]
fn a_checkpoint_is_whole_only_when_every_file_is_listed() {
    let bench = Bench::new();
    let checkpoints = bench.open(1);
    let path = bench.save(&checkpoints, 1, None);
    let text = fs::read_to_string(path.join(CHECKSUMS)).unwrap();
    let whole: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    for name in whole.keys() {
        let mut table = whole.clone();
        table.remove(name);
        fs::write(path.join(CHECKSUMS), json!(table).to_string()).unwrap();
        let why = verify(&path).unwrap_err().to_string();
        assert!(why.contains(&format!("does not list {name}")), "{why}");
    }
    fs::write(path.join(CHECKSUMS), "{}").unwrap();
    assert!(checkpoints.latest().unwrap().0.is_none());
    for name in ["../x", "/dev/zero", "/etc/hostname", "a\\b", "\u{1b}[2K"] {
        fs::write(path.join(CHECKSUMS), json!({ name: "00" }).to_string()).unwrap();
        let why = verify(&path).unwrap_err().to_string();
        assert!(why.contains("is no file of this folder") && !why.contains('\u{1b}'), "{why}");
    }
}

#[test]
fn what_a_killed_process_left_is_cleared_away_or_put_back() {
    let bench = Bench::new();
    let path = bench.save(&bench.open(2), 4, None);
    fs::create_dir(bench.path(".tmp-step-000008")).unwrap();
    fs::write(bench.path(".tmp-step-000008/model.safetensors"), "half").unwrap();
    fs::create_dir(bench.path(".tmp-gone-step-000002")).unwrap();
    fs::create_dir(bench.path(".old-step-000004")).unwrap();
    bench.open(2);
    assert_eq!(names(bench.dir.path()), ["step-000004"]);
    // Killed between the two renames of a replacement.
    fs::rename(&path, bench.path(".old-step-000004")).unwrap();
    assert_eq!(bench.open(2).latest().unwrap().0, Some(path.clone()));
    assert_eq!(names(bench.dir.path()), ["step-000004"]);
}

#[test]
#[cfg(unix)]
fn best_is_a_relative_link_and_is_mended_when_the_run_goes_on() {
    let bench = Bench::new();
    let checkpoints = bench.open(1);
    bench.save(&checkpoints, 1, Some(1));
    bench.save(&checkpoints, 2, Some(1));
    let target = || fs::read_link(bench.path("best")).unwrap();
    assert_eq!(target(), Path::new("step-000001"));
    verify(&bench.path("best")).unwrap();
    // Killed after a checkpoint, before the link and the removal of older ones.
    bench.save(&bench.open(9), 3, Some(1));
    fs::create_dir(bench.path(".tmp-best")).unwrap();
    checkpoints.settle(&state(3, Some(3))).unwrap();
    assert_eq!(target(), Path::new("step-000003"));
    assert_eq!(names(bench.dir.path()), ["best", "step-000003"]);
    // A best one that is gone leaves the link as it is.
    checkpoints.settle(&state(3, Some(2))).unwrap();
    assert_eq!(target(), Path::new("step-000003"));
}

#[test]
fn clearing_leaves_only_what_is_not_a_checkpoint() {
    let bench = Bench::new();
    let checkpoints = bench.open(5);
    bench.save(&checkpoints, 1, Some(1));
    bench.save(&checkpoints, 2, Some(1));
    fs::write(bench.path("notes.txt"), "mine").unwrap();
    checkpoints.clear().unwrap();
    assert_eq!(names(bench.dir.path()), ["notes.txt"]);
}

#[test]
fn an_averaged_model_belongs_to_its_checkpoint_and_is_a_model_directory_itself() {
    let mut bench = Bench::new();
    bench.ema = Some(model(VOCAB, 8, 9, &Device::flex()));
    let templates = bench.path("templates");
    fs::create_dir_all(templates.join("additional_chat_templates")).unwrap();
    fs::write(templates.join("additional_chat_templates/tool.jinja"), "{{ messages }}").unwrap();
    let companions = Companions::read(&templates).unwrap();
    fs::remove_dir_all(&templates).unwrap();
    let checkpoints = bench.open(1);
    let first = bench.save_with(&checkpoints, 1, None, &companions);
    verify(&first).unwrap();
    let averaged = lowkey_model::ModelDir::open(&first.join(EMA)).unwrap();
    assert_eq!(weight_bits(&averaged.load(&Device::flex()).unwrap()), weight_bits(bench.ema.as_ref().unwrap()));
    let beside = averaged.companions().unwrap();
    assert!(
        ["additional_chat_templates/tool.jinja", "tokenizer.json"].iter().all(|name| beside.contains(&(*name).into()))
    );
    // Written anew, and then removed with the whole.
    bench.save_with(&checkpoints, 1, None, &companions);
    bench.save_with(&checkpoints, 2, None, &companions);
    assert_eq!(names(bench.dir.path()), ["step-000002"]);
    let file = bench.path("step-000002/ema/model.safetensors");
    let kept = fs::read(&file).unwrap();
    flip_a_byte(&file);
    assert!(verify(&bench.path("step-000002")).is_err());
    fs::write(&file, kept).unwrap();
    verify(&bench.path("step-000002")).unwrap();
    // What a user put there keeps it.
    fs::write(bench.path("step-000002/ema/notes.txt"), "mine").unwrap();
    bench.save_with(&checkpoints, 3, None, &companions);
    assert_eq!(names(bench.dir.path()), ["step-000002", "step-000003"]);
}
