//! What a template makes of conversations, and what it may not do.

use std::fs;

use serde_json::{Map, Value, json};

use super::*;
use crate::tokenizer::Tokenizer;

mod tools;

fn conversation() -> Conversation {
    Conversation::new(vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "Hé?"}),
        json!({"role": "assistant", "content": "漢 yes"}),
        json!({"role": "user", "content": " Sure? "}),
        json!({"role": "assistant", "content": "No."}),
    ])
}

fn template(text: &str) -> ChatTemplate {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    ChatTemplate::from_source("test", text, tokens.as_object().unwrap().clone()).unwrap()
}

fn rendered(text: &str) -> String {
    template(text).render(&conversation(), &Options::default()).unwrap().text
}

fn refusal(text: &str) -> String {
    let tokens = Map::new();
    let made = ChatTemplate::from_source("test", text, tokens);
    made.and_then(|t| t.render(&conversation(), &Options::default())).unwrap_err().to_string()
}

fn answered(template: &ChatTemplate, conversation: &Conversation) -> Vec<(usize, String)> {
    let answers = template.answers(conversation, Now::Clock).unwrap();
    answers.spans.iter().map(|span| (span.message, answers.text[span.bytes.clone()].to_owned())).collect()
}

#[test]
fn each_built_in_template_writes_its_form_and_marks_the_answers() {
    let asked = Options { add_generation_prompt: true, ..Options::default() };
    for (name, expected, prompt, first) in [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n漢 yes<|im_end|>\n\
             <|im_start|>user\n Sure? <|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
            "<|im_start|>assistant\n",
            "漢 yes<|im_end|>\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHé?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n漢 yes<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "漢 yes<|eot_id|>",
        ),
        (
            "qwen",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n漢 yes<|im_end|>\n\
             <|im_start|>user\n Sure? <|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
            "<|im_start|>assistant\n",
            "漢 yes<|im_end|>\n",
        ),
        (
            "deepseek",
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hé?<｜Assistant｜>漢 yes<｜end▁of▁sentence｜><｜User｜> Sure? \
             <｜Assistant｜>No.<｜end▁of▁sentence｜>",
            "<｜Assistant｜>",
            "漢 yes<｜end▁of▁sentence｜>",
        ),
        (
            "plain",
            "System: Be brief.\nUser: Hé?\nAssistant: 漢 yes<|endoftext|>\nUser:  Sure? \nAssistant: No.<|endoftext|>\n",
            "Assistant:",
            " 漢 yes<|endoftext|>",
        ),
    ] {
        let template = ChatTemplate::built_in(name).unwrap();
        assert!(template.marks_answers());
        let text = template.render(&conversation(), &Options::default()).unwrap().text;
        assert_eq!(text, expected, "{name}");
        let found = template.render(&conversation(), &asked).unwrap().text;
        assert_eq!(found, format!("{expected}{prompt}"), "{name}");
        let answers = answered(&template, &conversation());
        assert_eq!(answers[0], (2, first.to_owned()), "{name}");
        assert_eq!((answers.len(), answers[1].0), (2, 4), "{name}");
        // A template that marks nothing is understood the same way.
        let marks = ["{%- generation %}", "{%- endgeneration %}"];
        let bare = marks.iter().fold(template.source().to_owned(), |text, mark| text.replace(mark, ""));
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
        let bare = ChatTemplate::from_source(name, &bare, tokens).unwrap();
        let words: Vec<usize> = answered(&bare, &conversation()).iter().map(|(message, _)| *message).collect();
        assert_eq!(words, [2, 4], "{name}");
    }
    assert!(ChatTemplate::built_in("vicuna").unwrap_err().to_string().contains("chatml, llama3, qwen"));
}

#[test]
fn constructs_of_published_templates_are_rendered_as_jinja_renders_them() {
    for (text, expected) in [
        ("{{ messages[::-1] | map(attribute='role') | join(',') }}", "assistant,user,assistant,user,system"),
        (
            "{% for m in messages[1:] %}{{ loop.index0 }}{{ m['role'][0] }}{% if not loop.last %} {% endif %}{% endfor %}",
            "0u 1a 2u 3a",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{% macro f(x, y='-') %}{{ x ~ y }}{% endmacro %}{{ f(1) }}{{ f(2, y=3) }}", "1-23"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        ),
        ("{{ messages[0] | tojson }}", "{\"role\": \"system\", \"content\": \"Be brief.\"}"),
        (
            "{{ {'b': [1, 1.0, none], 'a': '<é>'} | tojson(indent=1, sort_keys=true) }}",
            "{\n \"a\": \"<é>\",\n \"b\": [\n  1,\n  1.0,\n  null\n ]\n}",
        ),
        ("{{ ['é', 1e20] | tojson(ensure_ascii=true, separators=(',', ':')) }}", "[\"\\u00e9\",1e+20]"),
        ("{{ {'a': [true, none, 1.5, 'x']} }}", "{'a': [True, None, 1.5, 'x']}"),
        (
            "{{ 'a</think>\n\nb'.split('</think>')[-1].lstrip('\n') }}{{ ' x '.strip() }}{{ 'ab'.startswith(('x', 'a')) }}",
            "bxTrue",
        ),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'x': 1}.get('y', 2) }}", "x12"),
        ("{% set t %}\n  a\n{% endset %}[{{ t | trim }}]", "[a]"),
        (
            "{{ 'a\nb' | indent(2, first=true) }}|{{ 'x' if false else 'y' }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
            "  a\n  b|y|2",
        ),
        ("  {% if true %}\n  a\n  {% endif %}\nb {%- if true -%} c {%- endif %}", "  a\nbc"),
        ("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ missing is defined }}{{ missing }}", "<s></s>TrueFalse"),
        ("{{ 'a' is sequence }}{{ {} is mapping }}{{ none is iterable }}{{ true is number }}", "TrueTrueFalseTrue"),
        ("{{ 'x' | int }}{{ '7' | int + 1 }}{{ '<' | e }}{{ [2, 1] | sort }}", "08&lt;[1, 2]"),
    ] {
        assert_eq!(rendered(text), expected, "{text}");
    }
}

#[test]
fn the_present_is_what_it_is_said_to_be() {
    let options = Options { now: Now::At("2026-01-15T12:00:00".parse().unwrap()), ..Options::default() };
    let text = template("{{ strftime_now('%d %b %Y') }}").render(&conversation(), &options).unwrap().text;
    assert_eq!(text, "15 Jan 2026");
}

#[test]
fn a_refusal_has_the_templates_own_words_and_an_error_its_line() {
    for (text, words) in [
        ("{{ raise_exception('roles must ' ~ 'alternate') }}", "refuses the conversation: roles must alternate"),
        ("\n{{ missing.field }}", "line 2"),
        ("{% for tool in tools %}{% endfor %}", "a loop over none"),
        ("{{ missing | tojson }}", "undefined"),
        ("{{ messages.append(1) }}", "may not change a list: append"),
        ("{{ 'a'.nothing() }}", "no method nothing"),
        ("{{ missing + 'a' }}", "line 1"),
        ("{% if %}", "line 1"),
        ("{% include 'other' %}", "line 1"),
        ("{% generation %}", "without {% endgeneration %}"),
    ] {
        let why = refusal(text);
        assert!(why.starts_with("chat template test: ") && why.contains(words), "{text}: {why}");
    }
}

#[test]
fn a_hostile_template_ends_with_an_error_and_soon() {
    let begun = std::time::Instant::now();
    let grown = |seed: &str, step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(x={seed}) %}}{{% for i in range(100000) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
        )
    };
    for text in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        "{% macro f(n) %}{{ f([n, n]) }}{% endmacro %}{{ f(0) }}".to_owned(),
        "{{ 'a' * 1000000000 }}".to_owned(),
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}{{ 'a'.center(10000000000) }}".to_owned(),
        "{{ 'a\n\n' | indent(1000000000, true, true) }}".to_owned(),
        "{{ '{:1000000000}'.format(1) }}".to_owned(),
        grown("'aaaa'", "ns.x ~ ns.x", ""),
        grown("[1]", "ns.x + ns.x", "{{ ns.x | length }}"),
        grown("[1]", "[ns.x]", "{{ ns.x }}"),
        grown("[1]", "ns.x[0:]", "{{ ns.x }}"),
        grown("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
        grown("{}", "{'a': ns.x}", "{{ ns.x == ns.x }}"),
        format!("{{{{ {}1{} }}}}", "(".repeat(5_000), ")".repeat(5_000)),
        format!("{{{{ 1{} }}}}", " ~ 1".repeat(10_000)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(10_000)),
        "x".repeat(1 << 20),
    ] {
        let why = refusal(&text);
        assert!(why.len() < 700, "{why}");
    }
    assert!(begun.elapsed().as_secs() < 60);
}

#[test]
fn marks_of_a_template_are_cut_out_where_they_stand() {
    let marked = template(
        "{% for m in messages %}<{% if m.role == 'assistant' %} {%- generation -%} {{ m.content }}! {%- endgeneration -%} {% else %}{{ m.content }}{% endif %}>{% endfor %}",
    );
    let found = marked.render(&conversation(), &Options::default()).unwrap();
    assert_eq!(found.text, "<Be brief.><Hé?><漢 yes!>< Sure? ><No.!>");
    let parts: Vec<&str> = found.spans.iter().map(|span| &found.text[span.clone()]).collect();
    assert_eq!(parts, ["漢 yes!", "No.!"]);
    // A text that holds the marks themselves brings no answer of its own.
    let forged = Conversation::new(vec![
        json!({"role": "user", "content": "\u{10FF00}a\u{10FF01}"}),
        json!({"role": "assistant", "content": "b"}),
    ]);
    assert_eq!(answered(&marked, &forged), [(1, "b!".to_owned())]);
    let lost = template("{% set x %} {% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}");
    assert!(lost.render(&conversation(), &Options::default()).unwrap_err().to_string().contains("its place is lost"));
}

#[test]
fn several_marks_of_one_message_belong_to_it() {
    let two = "{% for m in messages %}{% if m.role == 'assistant' %}{% if '漢' in m.content %}{% generation %}a{% endgeneration %}-{% endif %}\
               {% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}";
    let found = answered(&template(two), &conversation());
    assert_eq!(found, [(2, "a".to_owned()), (2, "漢 yes".to_owned()), (4, "No.".to_owned())]);
}

#[test]
fn answers_are_found_or_refused_where_the_template_marks_none() {
    let turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}";
    let asked = "{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let found = answered(&template(&(turns.to_owned() + asked)), &conversation());
    assert_eq!(found, [(2, "漢 yes<|end|>\n".to_owned()), (4, "No.<|end|>\n".to_owned())]);
    // The last turn alone begins with a thought, and ends the text.
    let last = "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}\
                {{ m.content }}<|end|>{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '</s>' }}";
    let found = answered(&template(last), &conversation());
    assert_eq!(found, [(2, "漢 yes<|end|>".to_owned()), (4, "<think></think>No.<|end|></s>".to_owned())]);
    for (text, word) in [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write it"),
        (
            "{% for m in messages %}{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
            "ends otherwise",
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "more than the message's own words"),
        (
            "{{ raise_exception('no') if messages | length < 5 }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "where it ends with it",
        ),
    ] {
        let why = template(text).answers(&conversation(), Now::Clock).unwrap_err().to_string();
        assert!(why.contains(word), "{text}: {why}");
    }
}

#[test]
fn tokens_belong_to_the_answer_that_they_have_a_byte_of() {
    let tokenizer = Tokenizer::bytes();
    let answers = ChatTemplate::built_in("plain").unwrap().answers(&conversation(), Now::Clock).unwrap();
    let tokens = tokenizer.encode_placed(&answers.text).unwrap();
    let owners = answers.messages_of(tokens.iter().map(|token| &token.bytes));
    let said = |message| {
        let ids: Vec<u32> =
            tokens.iter().zip(&owners).filter(|(_, owner)| **owner == Some(message)).map(|(t, _)| t.id).collect();
        (tokenizer.decode(&ids).unwrap(), ids.last().copied())
    };
    assert_eq!(said(2), (" 漢 yes".to_owned(), tokenizer.eos_id()));
    assert_eq!(said(4), (" No.".to_owned(), tokenizer.eos_id()));
    // One that reaches over either end of an answer is the answer's, one that has no place is nobody's.
    let answers = Answers { text: "abcdef".to_owned(), spans: vec![Span { message: 7, bytes: 2..4 }] };
    assert_eq!(answers.messages_of(&[0..2, 1..3, 3..3, 3..6, 4..6]), [None, Some(7), None, Some(7), None]);
}

#[test]
fn a_last_message_can_be_left_open() {
    let options = Options { continue_final_message: true, ..Options::default() };
    let text = ChatTemplate::built_in("chatml").unwrap().render(&conversation(), &options).unwrap().text;
    assert!(text.ends_with("<|im_start|>assistant\nNo."));
    let why =
        template("{% for m in messages %}{{ m.role }}{% endfor %}").render(&conversation(), &options).unwrap_err();
    assert!(why.to_string().contains("cannot be continued"));
}

#[test]
fn a_models_template_is_found_wherever_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let source = |name| ChatTemplate::of_directory(dir.path(), name).unwrap().map(|t| t.source().to_owned());
    assert_eq!(source(None), None);
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}"}, {"name": "rag", "template": "b"}]}"#,
    );
    assert_eq!(
        (source(None).as_deref(), source(Some("rag")).as_deref(), source(Some("x"))),
        (Some("{{ bos_token }}"), Some("b"), None)
    );
    let found = ChatTemplate::of_directory(dir.path(), None).unwrap().unwrap();
    assert_eq!(found.render(&conversation(), &Options::default()).unwrap().text, "<s>");
    write("chat_template.json", r#"{"chat_template": "c"}"#);
    assert_eq!(source(None).as_deref(), Some("c"));
    write("chat_template.jinja", "d");
    write("additional_chat_templates/rag.jinja", "e");
    assert_eq!((source(None).as_deref(), source(Some("rag")).as_deref()), (Some("d"), Some("e")));
    assert!(ChatTemplate::of_directory(dir.path(), Some("../rag")).is_err());
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    write("chat_template.json", r#"{"chat_template": [1]}"#);
    assert!(ChatTemplate::of_directory(dir.path(), None).unwrap_err().to_string().contains("name and template"));
}

#[test]
fn a_tokenizer_brings_the_template_that_its_folder_has() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    Tokenizer::bytes().save(dir.path()).unwrap();
    let both = || {
        let found = ChatTemplate::of_directory(dir.path(), None).unwrap();
        let tokenizer = Tokenizer::from_model_dir(dir.path()).unwrap();
        let brought = ChatTemplate::of_tokenizer(&tokenizer).unwrap();
        let source = |template: &Option<ChatTemplate>| template.as_ref().map(|t| t.source().to_owned());
        assert_eq!(source(&found), source(&brought));
        assert_eq!(source(&found), ChatTemplate::source_of_tokenizer(&tokenizer).unwrap());
        brought
    };
    assert!(both().is_none());
    write("chat_template.json", r#"{"chat_template": "{{ eos_token }}!"}"#);
    let only = both().unwrap();
    assert_eq!(only.render(&conversation(), &Options::default()).unwrap().text, "<|endoftext|>!");
    // It goes where the tokenizer goes.
    let other = tempfile::tempdir().unwrap();
    Tokenizer::from_model_dir(dir.path()).unwrap().save(other.path()).unwrap();
    let carried = ChatTemplate::of_directory(other.path(), None).unwrap().unwrap();
    assert_eq!(carried.source(), "{{ eos_token }}!");
    write("chat_template.jinja", "{{ bos_token }}");
    assert_eq!(both().unwrap().source(), "{{ bos_token }}");
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    write("chat_template.json", r#"{"chat_template": 7}"#);
    let why = ChatTemplate::of_tokenizer(&Tokenizer::from_model_dir(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(why.starts_with("chat_template.json: chat_template must be a text"), "{why}");
}

#[test]
fn what_is_no_conversation_is_refused_by_name() {
    for (value, word) in [
        (json!(1), "a number"),
        (json!({}), "has no messages"),
        (json!({"messages": {}}), "messages must be a list"),
        (json!([{"role": "user"}, 1]), "message 2: must be an object"),
        (json!([{"content": "x"}]), "message 1: has no role"),
        (json!([{"role": 1}]), "role must be a string"),
        (json!({"messages": [], "tools": 1}), "tools must be a list"),
        (json!({"messages": [], "documents": [1]}), "documents: item 1"),
        (json!({"messages": [], "variables": []}), "variables must be an object"),
    ] {
        let why = Conversation::from_json(value).unwrap_err().to_string();
        assert!(why.contains(word), "{why}");
    }
    let read: Conversation =
        serde_json::from_str(r#"{"messages": [{"role": "user", "content": "x"}], "id": 3}"#).unwrap();
    assert_eq!(read.messages.len(), 1);
    let variables: Value = json!({"messages": [], "variables": {"bos_token": "<b>"}});
    let chat = Conversation::from_json(variables).unwrap();
    assert_eq!(template("{{ bos_token }}").render(&chat, &Options::default()).unwrap().text, "<b>");
}

#[test]
fn what_ends_a_turn_is_what_the_template_writes_behind_an_answer() {
    for (name, end) in [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("deepseek", "<｜end▁of▁sentence｜>"),
        ("plain", "<|endoftext|>"),
    ] {
        assert_eq!(ChatTemplate::built_in(name).unwrap().end_of_turn().unwrap(), end, "{name}");
    }
    let each =
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}";
    assert_eq!(template(each).end_of_turn().unwrap(), "</s>");
    assert_eq!(template("{% for m in messages %}[{{ m.content }}]\n\n{% endfor %}").end_of_turn().unwrap(), "]");
    let blank = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ '\n' }}{% endfor %}";
    assert_eq!(template(blank).end_of_turn().unwrap(), "\n");
}

#[test]
fn a_tokenizers_template_is_the_one_that_its_saved_folder_has() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::of_tokenizer(&Tokenizer::bytes()).unwrap().is_none());
    let tokenizer = Tokenizer::bytes().with_chat_template(ChatTemplate::built_in("plain").unwrap().source());
    tokenizer.save(dir.path()).unwrap();
    let saved = ChatTemplate::of_directory(dir.path(), None).unwrap().unwrap();
    let own = ChatTemplate::of_tokenizer(&tokenizer).unwrap().unwrap();
    let texts = [saved, own].map(|template| template.render(&conversation(), &Options::default()).unwrap().text);
    assert!(texts[0].contains("<|endoftext|>") && texts[0] == texts[1], "{texts:?}");
}
