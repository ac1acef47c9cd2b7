//! Whether a TOML value keeps to a JSON Schema: as much of draft 7 as the schemas use, and a panic at anything else.

use serde_json::Value as Json;
use toml::Value;

/// The same value in TOML.
pub(crate) fn from_json(value: &Json) -> Value {
    match value {
        Json::Null => panic!("TOML has no null"),
        Json::Bool(bool) => Value::Boolean(*bool),
        Json::Number(number) => number.as_i64().map_or_else(|| Value::Float(number.as_f64().unwrap()), Value::Integer),
        Json::String(text) => Value::String(text.clone()),
        Json::Array(values) => Value::Array(values.iter().map(from_json).collect()),
        Json::Object(map) => Value::Table(map.iter().map(|(key, value)| (key.clone(), from_json(value))).collect()),
    }
}

/// The first thing that is wrong with a value, and where.
pub(crate) fn fault(schema: &Json, value: &Value) -> Option<String> {
    let schema = match schema {
        Json::Bool(all) => return (!all).then(|| format!("{value} may not stand here")),
        Json::Object(schema) => schema,
        other => panic!("{other} is no schema"),
    };
    schema.iter().find_map(|(keyword, rule)| {
        let wrong = |is_wrong: bool| is_wrong.then(|| format!("{value}: {keyword} is {rule}"));
        match keyword.as_str() {
            "$schema" | "title" | "description" | "default" => None,
            "type" => wrong(!is_of_type(value, rule.as_str().unwrap())),
            "const" => wrong(*value != from_json(rule)),
            "minimum" => wrong(number(value).is_some_and(|x| x < rule.as_f64().unwrap())),
            "maximum" => wrong(number(value).is_some_and(|x| x > rule.as_f64().unwrap())),
            "exclusiveMinimum" => wrong(number(value).is_some_and(|x| x <= rule.as_f64().unwrap())),
            "exclusiveMaximum" => wrong(number(value).is_some_and(|x| x >= rule.as_f64().unwrap())),
            "minLength" => {
                wrong(value.as_str().is_some_and(|text| (text.chars().count() as u64) < rule.as_u64().unwrap()))
            }
            "minItems" => wrong(value.as_array().is_some_and(|list| (list.len() as u64) < rule.as_u64().unwrap())),
            "maxItems" => wrong(value.as_array().is_some_and(|list| list.len() as u64 > rule.as_u64().unwrap())),
            "items" => value.as_array()?.iter().enumerate().find_map(|(i, item)| match rule {
                Json::Array(each) => each.get(i).and_then(|each| fault(each, item)),
                each => fault(each, item),
            }),
            "required" => {
                let missing =
                    |key: &&Json| value.as_table().is_some_and(|table| !table.contains_key(key.as_str().unwrap()));
                rule.as_array().unwrap().iter().find(missing).map(|key| format!("{key} is missing"))
            }
            "properties" => {
                let of_key =
                    |(key, of): (&String, &Json)| fault(of, value.get(key)?).map(|why| format!("{key}: {why}"));
                rule.as_object().unwrap().iter().find_map(of_key)
            }
            "additionalProperties" => {
                let known = schema.get("properties").and_then(Json::as_object);
                let others =
                    value.as_table()?.iter().filter(|(key, _)| known.is_none_or(|known| !known.contains_key(*key)));
                others.into_iter().find_map(|(key, value)| fault(rule, value).map(|why| format!("{key}: {why}")))
            }
            "oneOf" => {
                let faults: Vec<_> = rule.as_array().unwrap().iter().map(|one| fault(one, value)).collect();
                let fitting = faults.iter().filter(|fault| fault.is_none()).count();
                (fitting != 1).then(|| format!("{fitting} of its kinds fit: {faults:?}"))
            }
            "anyOf" => {
                let faults: Vec<_> = rule.as_array().unwrap().iter().map(|one| fault(one, value)).collect();
                faults.iter().all(Option::is_some).then(|| format!("nothing of what it may be fits: {faults:?}"))
            }
            other => panic!("this check knows no {other}"),
        }
    })
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "boolean" => value.is_bool(),
        "string" => value.is_str(),
        "integer" => value.is_integer(),
        "number" => number(value).is_some(),
        "array" => value.is_array(),
        "object" => value.is_table(),
        other => panic!("this check knows no type {other}"),
    }
}
