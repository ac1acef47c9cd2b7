use serde_json::json;

use super::*;

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(object) = value else { panic!("{value} is no object") };
    object
}

fn read(records: Records, value: Value) -> Result<Record, String> {
    records.read(&object(value), records.list().unwrap_or_default())
}

fn chat(record: Record) -> Chat {
    let Record::One(Sample::Chat(chat)) = record else { panic!("{record:?} is no conversation") };
    chat
}

/// Roles and contents.
fn turns(chat: &Chat) -> Vec<(&str, &str)> {
    let text = |message: &'_ Map<String, Value>, key: &str| message[key].as_str().unwrap().to_owned().leak() as &str;
    chat.messages.iter().map(|message| (text(message, "role"), text(message, "content"))).collect()
}

#[test]
fn every_kind_of_conversation_becomes_the_same_messages() {
    let expected = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")];
    for (records, value) in [
        (
            Records::Messages,
            json!({"messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"text": "2?"}]},
                {"role": "assistant", "content": "4", "tool_calls": null}
            ]}),
        ),
        (
            Records::ShareGpt,
            json!({"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}),
        ),
        (Records::Alpaca, json!({"system": "Be brief.", "instruction": "2 + 2?", "input": "", "output": "4"})),
        (
            Records::Completion,
            json!({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
                   "completion": [{"role": "assistant", "content": "4"}]}),
        ),
    ] {
        let chat = chat(read(records, value).unwrap());
        assert_eq!(turns(&chat), expected, "{records:?}");
        let prompt = matches!(records, Records::Alpaca | Records::Completion).then_some(2);
        assert_eq!(chat.prompt, prompt, "{records:?}");
    }
    let alpaca = json!({"instruction": "Sort.", "input": "b a", "output": "a b"});
    assert_eq!(turns(&chat(read(Records::Alpaca, alpaca).unwrap())), [("user", "Sort.\n\nb a"), ("assistant", "a b")]);
    let text = json!({"prompt": "2 + 2 =", "completion": " 4"});
    let expected = Sample::Text { prompt: "2 + 2 =".into(), completion: " 4".into() };
    assert_eq!(read(Records::Completion, text).unwrap(), Record::One(expected));
}

#[test]
fn arguments_of_tool_calls_are_mappings_however_they_are_written() {
    let call = |call: Value| {
        json!({"tools": "[{\"name\": \"add\"}]", "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "x"}
        ]})
    };
    let expected = json!([{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]);
    for form in [
        json!({"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}),
        json!({"function": {"name": "add", "arguments": "{\"a\": 1, \"b\": 2}"}}),
        json!({"name": "add", "arguments": {"a": 1, "b": 2}}),
    ] {
        let chat = chat(read(Records::Messages, call(form)).unwrap());
        assert_eq!(chat.messages[1]["tool_calls"], expected);
        assert_eq!((chat.messages[1]["content"].as_str(), &chat.messages[2]["tool_call_id"]), (Some(""), &json!("x")));
        assert_eq!(chat.tools, [json!({"name": "add"})]);
    }
    for (form, expected) in [
        (json!({"function": {"name": "add", "arguments": "{oops"}}), "arguments are not valid JSON"),
        (json!({"function": {"name": "add", "arguments": "[1]"}}), "the JSON of no object"),
        (json!({"function": {"arguments": {}}}), "without the name"),
        (json!(3), "no object but 3"),
    ] {
        let why = read(Records::Messages, call(form)).unwrap_err();
        assert!(why.contains(expected) && why.contains("message 2"), "{why}");
    }
}

#[test]
fn what_is_said_of_learning_a_message_is_0_or_1() {
    let message = |extra: Value| {
        let mut message = object(json!({"role": "assistant", "content": "x"}));
        message.extend(object(extra));
        json!({"messages": [{"role": "user", "content": "?"}, message]})
    };
    for (extra, expected) in [
        (json!({}), None),
        (json!({"weight": 0}), Some(false)),
        (json!({"weight": 1.0}), Some(true)),
        (json!({"training": false}), Some(false)),
        (json!({"training": true, "weight": 1}), Some(true)),
    ] {
        let chat = chat(read(Records::Messages, message(extra)).unwrap());
        assert_eq!(chat.said, [None, expected]);
        assert!(!chat.messages[1].contains_key("weight") && !chat.messages[1].contains_key("training"));
    }
    for (extra, expected) in [
        (json!({"weight": 0.5}), "weight = 0.5; it must be 0 or 1"),
        (json!({"weight": "1"}), "must be 0 or 1"),
        (json!({"training": 1}), "must be true or false"),
        (json!({"training": false, "weight": 1}), "contradict"),
    ] {
        let why = read(Records::Messages, message(extra)).unwrap_err();
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn pairs_have_the_prompt_that_is_given_or_what_both_begin_with() {
    let user = json!({"role": "user", "content": "2 + 2?"});
    let answer = |text: &str| json!({"role": "assistant", "content": text});
    let lists = |prompt: Option<Value>, with: bool| {
        let list = |text| if with { json!([user, answer(text)]) } else { json!([answer(text)]) };
        let mut record = object(json!({"chosen": list("4"), "rejected": list("5")}));
        record.extend(prompt.map(|prompt| ("prompt".to_owned(), prompt)));
        Value::Object(record)
    };
    for record in [
        lists(None, true),
        lists(Some(json!([user])), false),
        lists(Some(json!("2 + 2?")), true),
        lists(Some(json!("2 + 2?")), false),
        json!({"prompt": [user], "chosen": "4", "rejected": "5"}),
    ] {
        let Record::Pair { chosen: Sample::Chat(chosen), rejected: Sample::Chat(rejected) } =
            read(Records::Preference, record.clone()).unwrap()
        else {
            panic!("{record}")
        };
        assert_eq!((chosen.prompt, rejected.prompt), (Some(1), Some(1)), "{record}");
        assert_eq!(turns(&chosen), [("user", "2 + 2?"), ("assistant", "4")], "{record}");
        assert_eq!(turns(&rejected), [("user", "2 + 2?"), ("assistant", "5")], "{record}");
    }
    let texts = |record: Value| match read(Records::Preference, record).unwrap() {
        Record::Pair {
            chosen: Sample::Text { prompt, completion },
            rejected: Sample::Text { prompt: again, completion: other },
        } => {
            assert_eq!(prompt, again);
            (prompt, completion, other)
        }
        other => panic!("{other:?}"),
    };
    let expected = ("Q: a?".to_owned(), " yes".to_owned(), " yellow".to_owned());
    assert_eq!(texts(json!({"chosen": "Q: a? yes", "rejected": "Q: a? yellow"})), expected);
    assert_eq!(texts(json!({"prompt": "Q: a?", "chosen": " yes", "rejected": " yellow"})), expected);
    assert_eq!(texts(json!({"chosen": "yes", "rejected": "yellow"})).0, "");
    assert_eq!(texts(json!({"chosen": "a b", "rejected": "a b c"})), ("a".into(), " b".into(), " b c".into()));
    for (record, expected) in [
        (json!({"chosen": "a", "rejected": "a"}), "the same"),
        (json!({"chosen": "a"}), "no field \"rejected\""),
        (json!({"chosen": "a", "rejected": [answer("b")]}), "both be texts or both lists"),
        (json!({"chosen": [user], "rejected": [user, answer("b")]}), "how the other begins"),
    ] {
        let why = read(Records::Preference, record).unwrap_err();
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn what_is_no_record_is_refused_with_its_mend() {
    for (records, value, expected) in [
        (Records::Messages, json!({"conversations": []}), "the record has [\"conversations\"]"),
        (Records::Messages, json!({"messages": "hi"}), "not a list of messages"),
        (Records::Messages, json!({"messages": []}), "empty list"),
        (
            Records::Messages,
            json!({"messages": [{"role": "robot", "content": "x"}]}),
            "message 1 of \"messages\" has the unknown role \"robot\"",
        ),
        (Records::Messages, json!({"messages": [{"content": "x"}]}), "has no role"),
        (Records::Messages, json!({"messages": [{"from": "human", "value": "x"}]}), "sharegpt"),
        (Records::Messages, json!({"messages": [{"role": "user"}]}), "has no content"),
        (
            Records::Messages,
            json!({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
            "only text",
        ),
        (
            Records::Messages,
            json!({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}),
            "only an assistant",
        ),
        (Records::Messages, json!({"messages": [{"role": "user", "content": "x"}], "tools": "oops"}), "not valid JSON"),
        (Records::ShareGpt, json!({"conversations": [{"from": "alien", "value": "x"}]}), "unknown \"alien\""),
        (
            Records::ShareGpt,
            json!({"conversations": [{"role": "user", "content": "x"}]}),
            "source.records = \"messages\"",
        ),
        (Records::Alpaca, json!({"instruction": "x"}), "no field \"output\""),
        (Records::Alpaca, json!({"instruction": 3, "output": "x"}), "not a string"),
        (
            Records::Completion,
            json!({"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}),
            "\"prompt\" is not a list",
        ),
    ] {
        let why = read(records, value).unwrap_err();
        assert!(why.contains(expected), "{expected}: {why}");
    }
}
