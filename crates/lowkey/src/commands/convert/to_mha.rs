//! `lowkey convert --to mha` and `--to mqa`.

use std::path::Path;

use burn::tensor::Device;
use lowkey_convert::to_mha::{Form, exact, nearest};
use lowkey_convert::{Error, Progress};
use lowkey_files::mark::Kind;
use lowkey_model::{CausalLm, ModelDir, NewModelDir};
use serde_json::{Value, json};

use super::same::Same;
use super::{TOKENS, dtype, write};
use crate::cli::ConvertArguments;
use crate::commands::{WrongUse, text};
use crate::output::{bytes, pairs, say, say_json};
use crate::progress::Measuring;

pub(super) fn convert(
    arguments: &ConvertArguments,
    form: Form,
    source: &ModelDir,
    model: &CausalLm,
    device: &Device,
) -> anyhow::Result<()> {
    let asked = [
        ("--kv-rank-budget", arguments.kv_rank_budget.is_some()),
        ("--kv-rank", arguments.kv_rank.is_some()),
        ("--rope-dim", arguments.rope_dim.is_some()),
        ("--rope-keep", arguments.rope_keep.is_some()),
    ];
    if let Some((flag, _)) = asked.iter().find(|(_, given)| *given) {
        return Err(WrongUse(format!("{flag} chooses the width of a latent, and there is none to be")).into());
    }
    // Said before anything is read: only who gives a text means the nearest model instead.
    let same = match (exact(model, form, device), arguments.data.is_some()) {
        (Ok(made), _) => Some(made),
        (Err(Error::Unsupported { .. }), true) if model.config.attention().latent().is_some() => None,
        (Err(why), _) => return Err(why.into()),
    };
    let name = match form {
        Form::Heads => "mha",
        Form::Single => "mqa",
    };
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| Path::new("models").join(format!("{}-{name}", text::name(&arguments.model))));
    let new = NewModelDir::begin(&out, Kind::Model, arguments.overwrite, source)?;
    let text = match arguments.data.is_some() {
        true => {
            let tokens = arguments.tokens.unwrap_or(TOKENS);
            Some(text::Calibration::find(arguments.data.as_deref(), &arguments.model, &model.config, tokens)?)
        }
        false => None,
    };
    let train = text.as_ref().map_or(&[][..], |text| &text.train);
    let bar = Measuring::new();
    let observe = &mut |p: Progress| bar.show(p.doing, p.done, p.of);
    let (made, is_exact) = match same {
        Some(made) => (made, true),
        None => (nearest(model, form, train, device, observe)?, false),
    };
    let same = Same::of(model, &made, train, device)?;
    if is_exact {
        same.logits.check()?;
    }
    drop(bar);
    let losses = |text: &[Vec<u32>]| -> anyhow::Result<[f64; 2]> {
        Ok([lowkey_convert::loss(model, text, device)?, lowkey_convert::loss(&made, text, device)?])
    };
    let calibration = text.as_ref().map(|text| losses(&text.train)).transpose()?;
    let held_out =
        text.as_ref().filter(|text| !text.held_out.is_empty()).map(|text| losses(&text.held_out)).transpose()?;
    let told = |losses: [f64; 2]| json!({ "loss_before": losses[0], "loss_after": losses[1] });
    let mut of_text = calibration.map(told);
    if let (Some(Value::Object(map)), Some(text)) = (&mut of_text, &text) {
        map.insert("text".into(), json!(text.name));
        map.insert("tokens".into(), json!(text.tokens()));
    }
    let report = json!({
        "from": model.config.attention_name(),
        "to": made.config.attention_name(),
        "model_type": made.config.family.model_type(),
        "exact": is_exact.then(|| same.logits.report()),
        "latent_norms_absorbed": !is_exact,
        "greedy_tokens": same.greedy_report(),
        "cache_numbers_before": model.config.cache_numbers(),
        "cache_numbers": made.config.cache_numbers(),
        "calibration": of_text,
        "held_out": held_out.map(told),
    });
    write(new, source, (&made, dtype(arguments)), &report)?;
    if arguments.json {
        return say_json(&json!({ "out": out, "report": report }));
    }
    // In bf16.
    let cache = |model: &CausalLm| bytes(2 * model.config.cache_numbers());
    let change = |[before, after]: [f64; 2]| {
        let perplexities = format!("perplexity {:.3} → {:.3}", before.exp(), after.exp());
        format!("{before:.4} → {after:.4} nats ({:+.4}), {perplexities}", after - before)
    };
    let mut facts = vec![("cache", format!("{} → {} per token in bf16", cache(model), cache(&made)))];
    facts.extend(same.facts());
    if !is_exact {
        facts.push(("norms", "those of latents became constants, so that this is not the same model".into()));
    }
    facts.extend(
        calibration
            .zip(text.as_ref())
            .map(|(losses, text)| ("calibration", format!("{}: {}", text.name, change(losses)))),
    );
    facts.extend(held_out.map(|losses| ("held out", change(losses))));
    let (family, name) = (made.config.family.model_type(), made.config.attention_name());
    say(&format!("{}: MLA as {name} ({family})\n{}", out.display(), pairs(&facts)));
    Ok(())
}
