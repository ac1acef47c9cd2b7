use serde_json::json;

use super::*;

/// What is found in a folder with these files, under the byte tokenizer, whose end is 256.
fn found(files: &[(&str, Value)]) -> Result<Generation> {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::bytes().save(dir.path()).unwrap();
    for (name, value) in files {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    let tokenizer = Tokenizer::from_model_dir(dir.path())?;
    Generation::from_model_dir(dir.path(), Some(&tokenizer))
}

#[test]
fn a_text_ends_at_whatever_any_file_calls_an_end() {
    let config = |value: Value| ("config.json", value);
    let generation = |value: Value| ("generation_config.json", value);
    let tokenizer = |value: Value| ("tokenizer_config.json", value);
    assert_eq!(found(&[]).unwrap().ends, [256]);
    for (files, ends) in [
        (vec![config(json!({ "eos_token_id": 8 }))], vec![256, 8]),
        (vec![config(json!({ "eos_token_id": [8, 256, 9] }))], vec![256, 8, 9]),
        (vec![config(json!({ "eos_token_id": null, "text_config": { "eos_token_id": [7] } }))], vec![256, 7]),
        (vec![generation(json!({ "eos_token_id": [5, 6] }))], vec![256, 5, 6]),
        (vec![generation(json!({ "eos_token_id": 5 })), config(json!({ "eos_token_id": -1 }))], vec![256, 5]),
        // The token that training writes after a document comes first.
        (
            vec![
                tokenizer(json!({ "eos_token": "<|endoftext|>" })),
                config(json!({ "eos_token_id": 8 })),
                generation(json!({ "eos_token_id": [9, 8] })),
            ],
            vec![256, 8, 9],
        ),
    ] {
        assert_eq!(found(&files).unwrap().ends, ends, "{files:?}");
    }
    let absent = tempfile::tempdir().unwrap();
    assert_eq!(Generation::from_model_dir(absent.path(), None).unwrap(), Generation::default());
}

#[test]
fn what_a_file_declares_is_in_force() {
    let declared = |value: Value| found(&[("generation_config.json", value)]).unwrap();
    let all = declared(json!({ "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1,
                               "repetition_penalty": 1.05, "bos_token_id": 3 }));
    assert_eq!((all.temperature, all.top_p, all.top_k), (Some(0.6), Some(0.9), Some(20)));
    assert_eq!((all.min_p, all.repetition_penalty, all.begin), (Some(0.1), Some(1.05), Some(3)));
    assert_eq!(declared(json!({ "do_sample": false, "temperature": 0.6 })).temperature, Some(0.0));
    assert_eq!(declared(json!({ "do_sample": true })).temperature, Some(1.0));
    assert_eq!(declared(json!({ "temperature": 0.7, "top_p": null })).temperature, Some(0.7));
    let none = declared(json!({ "top_k": -1 }));
    assert_eq!((none.temperature, none.top_k, none.top_p), (None, None, None));
    assert_eq!(declared(json!({ "top_k": 0 })).top_k, None);
}

#[test]
fn what_a_file_declares_survives() {
    let file = json!({ "eos_token_id": [65, 256], "pad_token_id": 3, "temperature": 0.6, "top_p": 0.9, "do_sample": true,
                       "transformers_version": "4.51.0" });
    let kept = found(&[("generation_config.json", file.clone())]).unwrap();
    let written = kept.clone().or_sampling(0.8).to_json();
    for (key, value) in file.as_object().unwrap() {
        assert_eq!(written[key], *value, "{key}");
    }
    assert_eq!(found(&[("generation_config.json", written)]).unwrap().ends, kept.ends);
    // An end that only another file names is added for those that read this one alone.
    let files =
        [("generation_config.json", json!({ "eos_token_id": 65 })), ("config.json", json!({ "bos_token_id": 1 }))];
    let written = found(&files).unwrap().to_json();
    assert_eq!((&written["eos_token_id"], &written["bos_token_id"]), (&json!([256, 65]), &json!(1)));
    // Without a file the training's own.
    let fresh = Generation::new(Some(&Tokenizer::bytes())).or_sampling(0.8).to_json();
    let expected = json!({ "bos_token_id": null, "eos_token_id": [256], "do_sample": true, "temperature": 0.8 });
    assert_eq!(fresh.to_string(), expected.to_string());
    assert_eq!(Generation::new(None).to_json(), json!({ "bos_token_id": null, "eos_token_id": null }));
}

#[test]
fn values_that_mean_nothing_are_named() {
    for (key, value) in [
        ("eos_token_id", json!("</s>")),
        ("eos_token_id", json!([1, "</s>"])),
        ("eos_token_id", json!(1u64 << 40)),
        ("bos_token_id", json!(1.5)),
        ("do_sample", json!("yes")),
        ("temperature", json!(-1.0)),
        ("temperature", json!("warm")),
        ("top_p", json!(0.0)),
        ("top_p", json!(1.5)),
        ("min_p", json!(2)),
        ("top_k", json!(2.5)),
        ("repetition_penalty", json!(0)),
    ] {
        let message = found(&[("generation_config.json", json!({ key: value }))]).unwrap_err().to_string();
        assert!(message.contains("generation_config.json") && message.contains(key), "{key} = {value}: {message}");
    }
    let message = found(&[("generation_config.json", json!([]))]).unwrap_err().to_string();
    assert!(message.contains("must hold a JSON object"), "{message}");
}
