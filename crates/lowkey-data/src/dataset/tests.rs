use super::*;

fn load(text: &str) -> Result<DatasetConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.toml");
    std::fs::write(&path, text).unwrap();
    DatasetConfig::load(&path)
}

#[test]
fn every_source_and_tokenizer_parses() {
    for (source, tokenizer) in [
        ("kind = \"storybook\"\nseed = 1\ndocuments = 10\nvalidation_documents = 2", "kind = \"bytes\""),
        ("kind = \"text\"\npaths = [\"*.txt\"]\nseparator = \"--\"\nurl = \"https://e.org\"", "kind = \"chars\""),
        ("kind = \"jsonl\"\npaths = [\"a.jsonl.zst\"]", "kind = \"bpe\"\nvocab_size = 512"),
        ("kind = \"parquet\"\npaths = [\"a\"]\ncolumn = \"body\"", "kind = \"file\"\npath = \"t.json\""),
        ("kind = \"hub\"\nrepo = \"a/b\"\nfiles = [\"x/y.parquet\"]\nformat = \"parquet\"", "kind = \"bytes\""),
    ] {
        let text = format!("name = \"d\"\n[source]\n{source}\n[tokenizer]\n{tokenizer}\n");
        let config = load(&text).unwrap();
        assert!(toml::to_string(&config).unwrap().contains("kind"), "{text}");
    }
    let config = load("name = \"d\"\n[source]\nkind = \"jsonl\"\npaths = [\"a\"]\n").unwrap();
    assert_eq!(config.split, Split { validation_fraction: 0.1, by: SplitBy::Tail });
    assert_eq!(config.tokenizer, TokenizerConfig::Bytes);
    assert_eq!(config.format(), Some(Format::Jsonl { field: "text".into() }));
}

#[test]
fn mistakes_are_named() {
    let text = "kind = \"text\"\npaths = [\"a\"]";
    let hub = "kind = \"hub\"\nformat = \"text\"\n";
    for (source, rest, expected) in [
        ("kind = \"text\"\npath = \"a\"", "", "path"),
        ("kind = \"txt\"", "", "txt"),
        ("kind = \"text\"\npaths = []", "", "source.paths is empty"),
        ("kind = \"text\"\npaths = [\"a\"]\nseparator = \"\"", "", "source.separator is empty"),
        (text, "[split]\nvalidation_fraction = 0.6", "split.validation_fraction = 0.6"),
        (text, "[split]\nvalidation_fraction = nan", "split.validation_fraction"),
        (text, "[split]\nfraction = 0.1", "fraction"),
        (text, "[tokenizer]\nkind = \"bytes\"\nvocab_size = 300", "vocab_size"),
        (text, "[tokenizer]\nkind = \"bpe\"\nvocab_size = 256", "tokenizer.vocab_size = 256"),
        (text, "[sha256]\n\"a\" = \"12\"", "not 64 hex digits"),
        (text, "[other]\n", "other"),
        ("kind = \"storybook\"\nseed = 1\ndocuments = 0\nvalidation_documents = 0", "", "source.documents = 0"),
        (
            "kind = \"storybook\"\nseed = 1\ndocuments = 1\nvalidation_documents = 0",
            "[split]\nby = \"documents\"",
            "neither [split]",
        ),
        (&format!("{hub}repo = \"../b\"\nfiles = [\"x\"]"), "", "source.repo"),
        (&format!("{hub}repo = \"a/b\"\nfiles = [\"../x\"]"), "", "source.files"),
        (&format!("{hub}repo = \"a/b\"\nfiles = [\"x\\\\y\"]"), "", "source.files"),
        (&format!("{hub}repo = \"a/b\"\nfiles = [\"x\"]\nrevision = \"../../x\""), "", "source.revision"),
        (&format!("{hub}repo = \"a/b\"\nfiles = [\"x\"]\nrevision = \"/x\""), "", "source.revision"),
        (&format!("{hub}repo = \"a/b\"\nfiles = []"), "", "source.files is empty"),
        (&format!("{hub}repo = \"a/b\"\nfiles = [\"x\"]\nfield = \"f\""), "", "source.field"),
    ] {
        let message = load(&format!("name = \"d\"\n[source]\n{source}\n{rest}\n")).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("d.toml"), "{expected}: {message}");
    }
}

#[test]
fn a_name_is_one_that_a_folder_can_have_on_every_system() {
    let named = |name: &str| load(&format!("name = \"{name}\"\n[source]\nkind = \"text\"\npaths = [\"a\"]\n"));
    let longest = "a".repeat(200);
    for name in ["d", "fineweb-edu", "v1.2_b", "console", "com", "nullable", "com10", &longest] {
        assert_eq!(named(name).unwrap().name, name);
    }
    let longer = "a".repeat(201);
    for name in ["", ".d", "d.", "a/b", "ä", "日本", "a b", "NUL", "con", "aux.txt", "com1", "LPT9.x", &longer] {
        let why = named(name).unwrap_err().to_string();
        assert!(why.contains("must be a folder name"), "{name}: {why}");
    }
}

#[test]
fn files_are_found_relative_to_the_dataset_file_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("odd [name]");
    std::fs::create_dir_all(base.join("texts")).unwrap();
    for name in ["b.txt", "a.txt", "a[1].txt"] {
        std::fs::write(base.join("texts").join(name), "x").unwrap();
    }
    let toml = base.join("d.toml");
    let write = |paths: &str| {
        let url = "url = \"https://e.org/a\"";
        std::fs::write(&toml, format!("name = \"d\"\n[source]\nkind = \"text\"\npaths = {paths}\n{url}\n")).unwrap();
        DatasetConfig::load(&toml).unwrap().local_files()
    };
    let names = |files: Vec<PathBuf>| -> Vec<String> {
        files.iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned()).collect()
    };
    assert_eq!(names(write("[\"texts/*.txt\"]").unwrap()), ["a.txt", "a[1].txt", "b.txt"]);
    assert_eq!(names(write("[\"texts/b.txt\", \"texts/*.txt\"]").unwrap()), ["b.txt", "a.txt", "a[1].txt"]);
    assert_eq!(names(write("[\"texts/a[1].txt\"]").unwrap()), ["a[1].txt"]);
    let message = write("[\"texts/*.md\"]").unwrap_err().to_string();
    assert!(message.contains("nothing matches") && message.contains("https://e.org/a"), "{message}");
    assert!(DatasetConfig::from_text_file(&base.join("none.txt")).is_err());
}

#[test]
fn a_hundred_thousand_files_are_listed_in_seconds() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..20_000 {
        std::fs::write(dir.path().join(format!("{i}.txt")), "x").unwrap();
    }
    let toml = dir.path().join("d.toml");
    std::fs::write(&toml, "name = \"d\"\n[source]\nkind = \"text\"\npaths = [\"*.txt\", \"1*.txt\"]\n").unwrap();
    let started = std::time::Instant::now();
    assert_eq!(DatasetConfig::load(&toml).unwrap().local_files().unwrap().len(), 20_000);
    // Comparing each with each takes some thirteen seconds.
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

#[test]
fn what_is_no_plain_text_says_which_dataset_file_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        DatasetConfig::from_text_file(&path).map(|_| ()).map_err(|e| e.to_string())
    };
    for (name, bytes, kind) in [
        ("a.jsonl", &b"{\"text\": \"a\"}\n"[..], "jsonl"),
        ("b.JSONL", b"{\"text\": \"a\"}\n", "jsonl"),
        ("c.jsonl.gz", b"\x1f\x8b\x08", "jsonl"),
        ("d.ndjson.zst", b"\x28\xb5\x2f\xfd", "jsonl"),
        ("e.parquet", b"PAR1\x15", "parquet"),
        ("f.data", b"PAR1\x15", "parquet"),
    ] {
        let message = refusal(name, bytes).unwrap_err();
        assert!(message.contains("write a dataset file"), "{message}");
        // The lines that it gives are a dataset file.
        let lines = message.split_once("\n\n").unwrap().1;
        let toml = dir.path().join("given.toml");
        std::fs::write(&toml, lines).unwrap();
        let config = DatasetConfig::load(&toml).unwrap();
        assert!(toml::to_string(&config).unwrap().contains(&format!("kind = \"{kind}\"")), "{lines}");
        assert_eq!(config.local_files().unwrap(), [dir.path().join(name)]);
    }
    assert!(refusal("a.bz2", b"BZh91AY&SY").unwrap_err().contains("bzip2"));
    assert!(refusal("a.xz", b"\xfd7zXZ\0").unwrap_err().contains("xz"));
    assert!(refusal("a.txt", b"\x1f\x8b\x08").unwrap_err().contains("name it a.txt.gz"));
    for name in ["a.txt", "a.md", "a.txt.gz", "noending", "a.csv"] {
        refusal(name, b"words").unwrap();
    }
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_datasets_and_texts() {
    for refused in [DatasetConfig::from_text_file(Path::new("/dev/zero")), DatasetConfig::load(Path::new("/dev/zero"))]
    {
        assert!(refused.unwrap_err().to_string().contains("not a regular file"));
    }
}
