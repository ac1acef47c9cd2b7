//! Tools, calls of them and their answers in the forms of the built-in templates.

use super::*;

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "sky", "description": "<of> a & b", "parameters": {"type": "object"}}})
}

/// A question, a call with its arguments as a mapping, the tool's answer, and what the assistant makes of it.
fn asked(calls: Value) -> Conversation {
    Conversation::from_json(json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": calls},
            {"role": "tool", "content": "grey"},
            {"role": "assistant", "content": "Grey."},
        ],
        "tools": [weather()],
    }))
    .unwrap()
}

fn call() -> Value {
    json!({"function": {"name": "sky", "arguments": {"city": "Bern", "days": 1.5}}})
}

fn text_of(name: &str, conversation: &Conversation) -> String {
    ChatTemplate::built_in(name).unwrap().render(conversation, &Options::default()).unwrap().text
}

const DEFINITION: &str = "{\"type\": \"function\", \"function\": {\"name\": \"sky\", \"description\": \"<of> a & b\", \
                          \"parameters\": {\"type\": \"object\"}}}";

#[test]
fn each_family_writes_calls_in_its_form_and_marks_them_as_the_assistants() {
    let chat = asked(json!([call()]));
    let arguments = "{\"city\": \"Bern\", \"days\": 1.5}";
    let tagged = format!("<tool_call>\n{{\"name\": \"sky\", \"arguments\": {arguments}}}\n</tool_call><|im_end|>\n");
    for (name, said, last) in [
        ("chatml", tagged.clone(), "Grey.<|im_end|>\n"),
        ("qwen", tagged, "Grey.<|im_end|>\n"),
        ("llama3", format!("{{\"name\": \"sky\", \"parameters\": {arguments}}}<|eot_id|>"), "Grey.<|eot_id|>"),
        (
            "deepseek",
            format!(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sky\n```json\n{arguments}\n```<｜tool▁call▁end｜>\
                 <｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
            ),
            "Grey.<｜end▁of▁sentence｜>",
        ),
    ] {
        let template = ChatTemplate::built_in(name).unwrap();
        assert_eq!(answered(&template, &chat), [(2, said), (4, last.to_owned())], "{name}");
    }
}

#[test]
fn tools_and_their_answers_stand_where_a_family_has_them() {
    let chat = asked(json!([call()]));
    let text = text_of("chatml", &chat);
    assert!(text.starts_with("<|im_start|>system\nBe brief.\n\n"), "{text}");
    assert!(text.contains(&format!("<tools>\n{DEFINITION}\n</tools>\n")), "{text}");
    assert!(text.contains("<|im_start|>tool\n<tool_response>\ngrey\n</tool_response><|im_end|>\n"), "{text}");
    assert_eq!(text.matches("Be brief.").count(), 1);

    let text = text_of("qwen", &chat);
    assert!(text.contains(&format!("<tools>\n{DEFINITION}\n</tools>\n")), "{text}");
    assert!(text.contains("<|im_start|>user\n<tool_response>\ngrey\n</tool_response><|im_end|>\n"), "{text}");

    let text = text_of("llama3", &chat);
    let system =
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n\nBe brief.<|eot_id|>";
    assert!(text.starts_with(&format!("{system}<|start_header_id|>user<|end_header_id|>\n\n")), "{text}");
    assert!(text.contains("{\n    \"type\": \"function\",\n    \"function\": {\n        \"name\": \"sky\""), "{text}");
    assert!(text.contains("}\n\nWeather?<|eot_id|>"), "{text}");
    assert!(text.contains("<|start_header_id|>ipython<|end_header_id|>\n\ngrey<|eot_id|>"), "{text}");
    let mut unsaid = chat.clone();
    unsaid.messages.remove(0);
    assert!(
        text_of("llama3", &unsaid)
            .contains("system<|end_header_id|>\n\nEnvironment: ipython<|eot_id|><|start_header_id|>user")
    );

    let text = text_of("deepseek", &chat);
    assert!(text.starts_with("<｜begin▁of▁sentence｜>Be brief.\n\n## Tools\n"), "{text}");
    assert!(text.contains("### sky\nDescription: <of> a & b\n\nParameters: {\"type\": \"object\"}\n\n"), "{text}");
    let answer = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>grey<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Grey.<｜end▁of▁sentence｜>";
    assert!(text.ends_with(answer), "{text}");
    // After an answer of a tool DeepSeek goes on at once.
    let mut open = chat;
    open.messages.pop();
    let options = Options { add_generation_prompt: true, ..Options::default() };
    let prompt = ChatTemplate::built_in("deepseek").unwrap().render(&open, &options).unwrap().text;
    assert!(prompt.ends_with("<｜tool▁outputs▁end｜>"), "{prompt}");
}

#[test]
fn several_calls_follow_one_another_where_the_family_knows_that() {
    let mut chat = asked(json!([call(), {"name": "wind", "arguments": "{}"}]));
    chat.messages[2]["content"] = json!("Let me look.");
    chat.messages.insert(4, json!({"role": "tool", "content": {"speed": 3}}));
    for name in ["chatml", "qwen"] {
        let template = ChatTemplate::built_in(name).unwrap();
        let (_, said) = &answered(&template, &chat)[0];
        assert!(said.starts_with("Let me look.\n<tool_call>\n{\"name\": \"sky\""), "{said}");
        assert!(
            said.ends_with(
                "</tool_call>\n<tool_call>\n{\"name\": \"wind\", \"arguments\": {}}\n</tool_call><|im_end|>\n"
            ),
            "{said}"
        );
        let both =
            "\n<tool_response>\ngrey\n</tool_response>\n<tool_response>\n{\"speed\": 3}\n</tool_response><|im_end|>\n";
        assert!(text_of(name, &chat).contains(both));
    }
    let (_, said) = &answered(&ChatTemplate::built_in("deepseek").unwrap(), &chat)[0];
    assert!(said.starts_with("Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"), "{said}");
    assert!(
        said.contains("<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>wind\n```json\n{}\n```"),
        "{said}"
    );
    let outputs =
        "grey<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>{\"speed\": 3}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>";
    assert!(text_of("deepseek", &chat).contains(outputs));
    let refused = |chat: &Conversation| {
        ChatTemplate::built_in("llama3").unwrap().render(chat, &Options::default()).unwrap_err().to_string()
    };
    assert!(refused(&chat).contains("calls several"));
    chat.messages[2]["tool_calls"] = json!([call()]);
    assert!(refused(&chat).contains("has both"));
    chat.messages.retain(|message| message["role"] == "system");
    assert!(refused(&chat).contains("first message of the user"));
}

#[test]
fn plain_words_have_no_form_for_tools() {
    let template = ChatTemplate::built_in("plain").unwrap();
    let chat = asked(json!([call()]));
    let bare = Conversation { tools: None, ..chat.clone() };
    let answer = Conversation::new(vec![json!({"role": "tool", "content": "grey"})]);
    for refused in [chat, bare, answer] {
        let why = template.render(&refused, &Options::default()).unwrap_err().to_string();
        assert!(why.contains("no form for tools: take chatml, llama3, qwen or deepseek"), "{why}");
    }
}

#[test]
fn tools_are_written_in_the_form_of_qwen() {
    let chat = Conversation::from_json(json!({
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "sky", "arguments": {"city": "Bern", "days": 1.5}}}]},
            {"role": "tool", "content": "grey"},
            {"role": "assistant", "content": "Grey.", "reasoning_content": "It says so."},
        ],
        "tools": [{"type": "function", "function": {"name": "sky", "description": "<of> a & b"}}],
    }))
    .unwrap();
    let template = ChatTemplate::built_in("qwen").unwrap();
    let text = template.render(&chat, &Options::default()).unwrap().text;
    assert!(text.contains(
        "\n{\"type\": \"function\", \"function\": {\"name\": \"sky\", \"description\": \"<of> a & b\"}}\n</tools>"
    ));
    assert!(text.contains("<|im_start|>user\n<tool_response>\ngrey\n</tool_response><|im_end|>\n"));
    let call = "<tool_call>\n{\"name\": \"sky\", \"arguments\": {\"city\": \"Bern\", \"days\": 1.5}}\n</tool_call><|im_end|>\n";
    let last = "<think>\nIt says so.\n</think>\n\nGrey.<|im_end|>\n";
    assert_eq!(answered(&template, &chat), [(1, call.to_owned()), (3, last.to_owned())]);
}
