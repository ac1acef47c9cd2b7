use serde_json::json;

use super::*;

#[test]
fn a_table_becomes_a_section_and_a_key_a_row() {
    let schema = json!({
        "description": "A file.",
        "properties": {
            "name": { "description": "Its name.", "type": "string" },
            "size": {
                "description": "Its size.",
                "type": "object",
                "properties": { "width": { "description": "In a|b.", "type": "integer", "minimum": 0, "default": 3 } },
            },
        },
        "required": ["name"],
    });
    let text = reference([("The file", &schema)]);
    let (_, text) = text.split_once("\n## ").unwrap();
    assert_eq!(
        text,
        "The file\n\nA file.\n\n| key | value | default | meaning |\n|---|---|---|---|\n\
         | `name` | text | needed | Its name. |\n\
         | `size` | table |  | Its size. |\n\
         \n### `[size]`\n\nIts size.\n\n| key | value | default | meaning |\n|---|---|---|---|\n\
         | `width` | whole number | `3` | In a\\|b. |\n"
    );
}

#[test]
fn a_table_of_several_kinds_has_a_section_for_each() {
    let kind = |name: &str, more: Value| {
        let mut properties = json!({ "kind": { "type": "string", "const": name } });
        properties.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "description": format!("The {name} kind."), "type": "object", "properties": properties, "required": ["kind"] })
    };
    let either = json!({ "oneOf": [kind("a", json!({})), kind("b", json!({ "x": { "type": "boolean" } }))] });
    let schema = json!({ "properties": { "one": either, "many": { "type": "array", "items": either } } });
    let text = reference([("T", &schema)]);
    assert!(text.contains("| `one` | table, whose `kind` is `\"a\"` or `\"b\"` |"), "{text}");
    assert!(text.contains("### `[one]` with `kind = \"a\"`\n\nThe a kind.\n\nNo other keys.\n"), "{text}");
    assert!(
        text.contains("### `[[many]]` with `kind = \"b\"`") && text.contains("| `many` | list of tables |"),
        "{text}"
    );
    assert!(text.contains("| `x` | `true` or `false` |  |  |"), "{text}");
}

#[test]
fn values_are_told_with_their_bounds() {
    for (schema, words) in [
        (json!({ "type": "integer", "minimum": 1, "maximum": 1_048_576 }), "whole number, 1 to 1_048_576"),
        (json!({ "type": "integer", "minimum": 1 }), "whole number, 1 or more"),
        (json!({ "type": "number", "exclusiveMinimum": 0 }), "number, above 0"),
        (json!({ "type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0 }), "number, 0 to below 1"),
        (json!({ "type": "number" }), "number"),
        (json!({ "type": "array", "items": { "type": "string" } }), "list, each: text"),
        (
            json!({ "type": "array", "items": { "type": "number" }, "minItems": 2, "maxItems": 2 }),
            "list of 2, each: number",
        ),
        (json!({ "type": "array", "items": { "type": "string" }, "minItems": 1 }), "list of 1 or more, each: text"),
        (json!({ "type": "array", "items": [{ "type": "number" }, { "type": "string" }] }), "`[`number, text`]`"),
        (json!({ "type": "object", "additionalProperties": { "type": "string" } }), "table, each value: text"),
        (json!({ "type": "object", "additionalProperties": true }), "table of any keys"),
        (json!({ "oneOf": [{ "const": "a" }, { "const": "b" }, { "const": "c" }] }), "`\"a\"`, `\"b\"` or `\"c\"`"),
        (json!({}), "anything"),
    ] {
        assert_eq!(kind_of_value(&schema), words, "{schema}");
    }
}

#[test]
fn each_value_of_a_choice_is_explained() {
    let schema = json!({ "description": "Which.", "oneOf": [{ "const": "a", "description": "The first." }] });
    assert_eq!(cell(&meaning(&schema)), "Which.<br>`\"a\"`: The first.");
}

#[test]
fn defaults_stand_as_in_a_file() {
    for (value, text) in
        [(json!("auto"), "\"auto\""), (json!([0.9, 0.95]), "[0.9, 0.95]"), (json!(1e-8), "1e-8"), (json!([]), "[]")]
    {
        assert_eq!(literal(&value).as_deref(), Some(text));
    }
    assert_eq!(literal(&json!({ "every": 0 })), None);
}
