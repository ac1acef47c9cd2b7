use super::*;
use crate::fixtures::model;

fn section(prompts: &[&str], chat: &[&str]) -> EvalSection {
    let all = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    EvalSection { prompts: all(prompts), chat: all(chat), sample_tokens: 6, temperature: 0.0, ..EvalSection::default() }
}

fn with_template(text: &str) -> Tokenizer {
    Tokenizer::bytes().with_chat_template(text)
}

#[test]
fn messages_are_put_into_the_template_up_to_the_answer() {
    let tokenizer = with_template(ChatTemplate::built_in("plain").unwrap().source());
    let found = prompts(&section(&["Once"], &["Where?"]), &tokenizer).unwrap();
    let [text, message] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&*tokenizer.decode(&text.ids).unwrap(), text.chat, text.end.len()), ("Once", false, 0));
    assert_eq!(tokenizer.decode(&message.ids).unwrap(), "User: Where?\nAssistant:");
    // The end of text is one token also where it was spelled out.
    assert_eq!((message.chat, &message.end[..]), (true, &[tokenizer.eos_id().unwrap()][..]));
    // An end of several tokens is one in their order.
    let tokenizer = with_template(ChatTemplate::built_in("chatml").unwrap().source());
    let found = prompts(&section(&[], &["Where?"]), &tokenizer).unwrap();
    assert_eq!(found[0].end, tokenizer.encode("<|im_end|>").unwrap());
    assert!(found[0].ends(&tokenizer.encode("Here.<|im_end|>").unwrap()));
    assert!(!found[0].ends(&tokenizer.encode("Here.<|im_end|").unwrap()));
}

#[test]
fn messages_without_a_template_and_texts_without_tokens_are_refused() {
    let refused = |section: &EvalSection, tokenizer: &Tokenizer| prompts(section, tokenizer).unwrap_err().to_string();
    let message = refused(&section(&[], &["Where?"]), &Tokenizer::bytes());
    assert!(message.starts_with("eval.chat = \"Where?\"") && message.contains("no chat template"), "{message}");
    assert!(refused(&section(&[""], &[]), &Tokenizer::bytes()).contains("no token"));
    let picky = with_template("{{ raise_exception('system first') if messages[0].role != 'system' }}");
    assert!(refused(&section(&[], &["Where?"]), &picky).contains("system first"));
    let empty = with_template("{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}");
    let message = refused(&section(&[], &["Where?"]), &empty);
    assert!(message.contains("eval.chat"), "{message}");
}

#[test]
fn an_answer_stops_where_its_turn_ends() {
    let tokenizer = with_template("{% for m in messages %}{{ m.content }};{% endfor %}");
    let device = Device::flex();
    let (model, section) = (model(257, 32, 5, &device), section(&[], &["Where?"]));
    let mut prompt = prompts(&section, &tokenizer).unwrap().remove(0);
    assert_eq!(prompt.end, tokenizer.encode(";").unwrap());
    let whole = prompt.written(&model, &section, 1, &tokenizer, &device).unwrap();
    let plain = Prompt { end: Vec::new(), ..prompt.clone() };
    assert_eq!(plain.written(&model, &section, 1, &tokenizer, &device).unwrap(), whole);
    // What the model writes first is now what ends a turn, and no more is written.
    let all = GenerateConfig { max_new_tokens: 6, ..GenerateConfig::default() };
    let ids = generate(&model, &prompt.ids, &all, &device, &mut |_| ControlFlow::Continue(())).unwrap().ids;
    for len in 1..=3 {
        prompt.end = ids[len - 1..=len].to_vec();
        let first = ids.windows(2).position(|pair| pair == prompt.end).unwrap();
        let expected = tokenizer.decode_after(&prompt.ids, &ids[..first]).unwrap();
        assert_eq!(prompt.written(&model, &section, 1, &tokenizer, &device).unwrap(), expected);
    }
}
