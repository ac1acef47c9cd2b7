#!/usr/bin/env python3
"""Makes the reference cases: small checkpoints with random weights, and what transformers computes from them.

    pip install -r requirements.txt
    python make.py            # writes cases/, tokenizers/ and SHA256SUMS anew
    python make.py --check    # makes everything again elsewhere, and compares it with what is here

Weights come from numpy's Philox generator, keyed by the case's seed and the tensor's name, so that no version of torch has a
say in them. They are hard on purpose: norm weights between 0.5 and 1.5, odd sizes, biases that matter.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import peft
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent
ROWS, SEQ, NEW = 2, 13, 12
# The smallest difference between the best and the second-best logit of any greedy step.
MARGIN = 0.02

TOLERANCE = {"logits_abs": 2e-4, "loss_abs": 2e-5, "grad_rel_l2": 1e-3, "adamw_losses_abs": 2e-3}

COMMON = dict(
    vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    tie_word_embeddings=False, attention_bias=False,
)
MLA = dict(
    num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
    first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    moe_intermediate_size=8,
)
GROUPED = dict(num_key_value_heads=2, head_dim=6)
PLAIN = dict(rope_type="default", rope_theta=10000.0)


def yarn(**more):
    return dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=16,
                beta_slow=1, **more)


# name: (model_type, keys beside COMMON and those of the family, rope parameters, what it is for)
CASES = {
    "v2_plain": ("deepseek_v2", {}, PLAIN, "V2, queries without a latent, pairs side by side"),
    "v2_yarn_qlora": ("deepseek_v2", dict(q_lora_rank=10), yarn(mscale=0.7, mscale_all_dim=0.7), "V2 with q-LoRA and YaRN"),
    "v2_mlp_bias": ("deepseek_v2", dict(mlp_bias=True), PLAIN, "V2 with biases in the feed-forward layers"),
    "v3_plain": ("deepseek_v3", {}, PLAIN, "V3, queries without a latent"),
    "v3_qlora": ("deepseek_v3", dict(q_lora_rank=10), PLAIN, "V3 with q-LoRA"),
    "v3_yarn": ("deepseek_v3", dict(q_lora_rank=10), yarn(mscale=1.0, mscale_all_dim=1.0), "V3, YaRN as its repository has it"),
    "v3_yarn_mixed": ("deepseek_v3", {}, yarn(mscale=1.4, mscale_all_dim=0.6), "YaRN with two different factors"),
    "v3_yarn_without": ("deepseek_v3", {}, yarn(), "YaRN without mscale and mscale_all_dim"),
    "v3_far": ("deepseek_v3", dict(max_position_embeddings=256), yarn(mscale=1.0, mscale_all_dim=1.0),
               "YaRN ten times past its original context"),
    "v3_biases": ("deepseek_v3", dict(attention_bias=True, q_lora_rank=10), PLAIN, "biases in attention"),
    "v3_halves": ("deepseek_v3", dict(rope_interleave=False), PLAIN, "rotation of halves"),
    "v3_tied": ("deepseek_v3", dict(tie_word_embeddings=True), PLAIN, "the embedding is the head"),
    "v3_bf16": ("deepseek_v3", dict(q_lora_rank=10), PLAIN, "weights stored in bfloat16"),
    "v3_shards": ("deepseek_v3", dict(q_lora_rank=10), PLAIN, "weights in several files with an index"),
    "v3_odd": ("deepseek_v3", dict(hidden_size=21, intermediate_size=35, num_attention_heads=3, num_key_value_heads=3,
                                   kv_lora_rank=11, q_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=6, v_head_dim=7,
                                   vocab_size=53), PLAIN, "sizes that divide nothing"),
    "llama_gqa": ("llama", {}, PLAIN, "grouped queries"),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1), PLAIN, "one key head, all biases"),
    "qwen2": ("qwen2", {}, PLAIN, "biases of q, k and v"),
    "qwen3": ("qwen3", {}, PLAIN, "norms of queries and keys"),
}


def values(seed, name, shape):
    """The weights of a tensor."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.Philox(key=key))
    if name.endswith("norm.weight"):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    spread = {1: 0.2, 2: 1.3 / np.sqrt(shape[-1])}[len(shape)]
    if "embed_tokens" in name:
        spread = 0.8
    if name == "lm_head.weight":
        spread *= 2
    return (spread * random.standard_normal(shape)).astype(np.float32)


def build(kind, keys, rope, seed, dtype):
    family = MLA if kind.startswith("deepseek") else GROUPED
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **family, **keys}, rope_parameters=dict(rope))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values(seed, name, tuple(parameter.shape))).to(dtype).float())
    return model


def legacy(config, kind):
    """The same configuration as repositories wrote it before transformers 5."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **scaling}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.46.0"
    if kind.startswith("deepseek"):
        config |= {"hidden_act": "silu", "scoring_func": "sigmoid" if kind == "deepseek_v3" else "softmax", "ep_size": 1}
    return config


def loss_of(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


def trajectory(make, ids, limit):
    """Losses before each of five steps of AdamW and after the last."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for step in range(6):
        loss = loss_of(model, ids, ids)
        losses.append(loss.item())
        if step < 5:
            optimizer.zero_grad()
            loss.backward()
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
    return np.array(losses, np.float32)


def greedy(model, ids):
    """Continuations, and the smallest lead of a chosen token over the next best."""
    rows, margin = ids, float("inf")
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(input_ids=rows).logits[:, -1].double()
            best = logits.topk(2).values
            margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
            rows = torch.cat([rows, logits.argmax(-1, keepdim=True)], 1)
    return rows[:, ids.shape[1]:], margin


def make_case(name, out):
    kind, keys, rope, purpose = CASES[name]
    dtype = torch.bfloat16 if name == "v3_bf16" else torch.float32
    rows, seq = (1, 170) if name == "v3_far" else (ROWS, SEQ)
    seed = sum(map(ord, name))
    while True:
        make = lambda: build(kind, keys, rope, seed, dtype)  # noqa: E731
        model = make()
        random = np.random.Generator(np.random.Philox(key=seed))
        ids = torch.from_numpy(random.integers(2, model.config.vocab_size, (rows, seq)))
        continued, margin = greedy(model, ids)
        if margin > MARGIN:
            break
        seed += 1000
    masked = ids.clone()
    masked[:, ::3] = -100

    kept = {}
    layer = model.model.layers[0].self_attn
    hooks = [layer.register_forward_hook(lambda _, __, output: kept.__setitem__("attn_out.0", output[0]))]
    if hasattr(layer, "kv_a_layernorm"):
        hooks.append(layer.kv_a_layernorm.register_forward_hook(lambda _, __, output: kept.__setitem__("latent.0", output)))
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    kept["logits"] = output.logits
    for i, hidden in enumerate(output.hidden_states):
        kept[f"hidden.{i}"] = hidden
    if "latent.0" in kept:
        # What transformers caches: whole keys, whose ends are the rotated one, or the latent, with the rotated key as its values. No
        # case has values as wide as rotated keys.
        cached, config = output.past_key_values.layers[0], model.config
        assert config.v_head_dim != config.qk_rope_head_dim
        whole = cached.values.shape[-1] == config.v_head_dim
        kept["k_rope.0"] = cached.keys[:, 0, :, config.qk_nope_head_dim:] if whole else cached.values[:, 0]
        assert kept["k_rope.0"].shape[-1] == model.config.qk_rope_head_dim, (cached.keys.shape, cached.values.shape)

    loss = loss_of(model, ids, ids)
    loss.backward()
    kept["loss"] = loss.detach().reshape(1)
    kept["loss_masked"] = loss_of(model, ids, masked).detach().reshape(1)
    norm = torch.sqrt(sum(parameter.grad.double().square().sum() for parameter in model.parameters()))
    kept["grad_norm"] = norm.float().reshape(1)
    for parameter_name, parameter in model.named_parameters():
        kept[f"grad.{parameter_name}"] = parameter.grad
    expected = {key: value.detach().float().contiguous().numpy() for key, value in kept.items()}
    expected |= {key: value.numpy().astype(np.int64).copy() for key, value in
                 {"input_ids": ids, "labels_masked": masked, "greedy_ids": continued}.items()}
    expected["adamw.losses"] = trajectory(make, ids, None)
    expected["adamw_clip.losses"] = trajectory(make, ids, 0.5)

    folder = out / "cases" / name
    folder.mkdir(parents=True)
    model.to(dtype).save_pretrained(folder, max_shard_size="12KB" if name == "v3_shards" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config_legacy.json").write_text(json.dumps(legacy(config, kind), indent=2, sort_keys=True) + "\n")
    save_file(expected, folder / "expected.safetensors")
    case = {"name": name, "purpose": purpose, "model_type": kind, "seed": seed, "greedy_min_margin": round(margin, 3),
            "suggested_tolerance": TOLERANCE}
    (folder / "case.json").write_text(json.dumps(case, indent=2) + "\n")
    check_saved(folder, expected["logits"])


def check_saved(folder, logits):
    """Both spellings of the configuration, read from disk, give the logits that were computed."""
    ids = torch.from_numpy(load_file(folder / "expected.safetensors")["input_ids"])
    for spelling in ("config.json", "config_legacy.json"):
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, other, dirs_exist_ok=True)
            shutil.copyfile(folder / spelling, pathlib.Path(other) / "config.json")
            model = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                off = np.abs(model.eval()(input_ids=ids).logits.numpy() - logits).max()
        assert off < 2e-5, f"{folder.name}: {spelling} is off by {off}"


# name: (base, keys of PEFT's LoraConfig)
ADAPTERS = {
    "lora": ("v3_qlora", dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], r=4, lora_alpha=8, rank_pattern={"o_proj": 2},
                              alpha_pattern={"kv_b_proj": 3}, modules_to_save=["norm"])),
    "rslora": ("v3_qlora", dict(target_modules=r".*self_attn\.(q_b_proj|kv_b_proj|o_proj)", r=3, lora_alpha=5, use_rslora=True)),
    "dora": ("v3_biases", dict(target_modules=["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], r=3, lora_alpha=6,
                               use_dora=True, layers_to_transform=[1])),
    "head": ("llama_gqa", dict(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"], r=2, lora_alpha=4)),
    "embedding": ("v3_plain", dict(target_modules=["embed_tokens", "q_proj"], r=3, lora_alpha=6, lora_dropout=0.3)),
}
STEPS = 10
# Times that numbers are left out of what an adapter reads, to see what that does on average.
DRAWS = 20000


def longrope(divisors):
    """Divisors of a model that reads no text beyond its original length."""
    return dict(rope_type="longrope", rope_theta=10000.0, short_factor=divisors, long_factor=[9.0 * x for x in divisors],
                original_max_position_embeddings=64)


LLAMA4 = yarn(mscale=1.0, mscale_all_dim=1.0) | dict(original_max_position_embeddings=64, llama_4_scaling_beta=0.1)
SCALES = dict(scale_emb=12, scale_depth=1.4, dim_model_base=8)

# name: (model_type, keys beside COMMON and those of the family, rope parameters, what it is for). Read as one of the families above.
DIALECTS = {
    "minicpm3": ("minicpm3", dict(q_lora_rank=10, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-5, **SCALES),
                 longrope([1.0, 2.5]), "MiniCPM3: factors between weights, one matrix as embedding and head, LongRoPE"),
    "minicpm3_untied": ("minicpm3", dict(scale_emb=3, scale_depth=None, dim_model_base=None, mlp_bias=True), PLAIN,
                        "MiniCPM3 with biases in the feed-forward layers and a head of its own"),
    "mistral": ("mistral", dict(num_key_value_heads=2, head_dim=6, sliding_window=None), PLAIN, "Mistral, grouped queries"),
    "mistral4": ("mistral4", dict(q_lora_rank=10), LLAMA4, "Mistral 4, latents"),
    "mistral3": ("mistral4", dict(q_lora_rank=10), LLAMA4, "Mistral 4 inside a model of images and text"),
}
VISION = dict(model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
              image_size=16, patch_size=8)


def make_dialect(name, out):
    """A checkpoint of a model type that has other keys, names or factors, and its logits."""
    kind, keys, rope, purpose = DIALECTS[name]
    seed = sum(map(ord, name))
    family = GROUPED if kind == "mistral" else MLA
    keys = {**COMMON, **family, **keys}
    if kind in ("mistral", "mistral4"):
        keys.pop("attention_bias")
    text = transformers.AutoConfig.for_model(kind, **keys, rope_parameters=dict(rope))
    if name == "mistral3":
        config = transformers.AutoConfig.for_model("mistral3", text_config=text.to_dict(), vision_config=VISION,
                                                   tie_word_embeddings=False)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        # No automatic class knows Mistral 4 by itself.
        model = (transformers.Mistral4ForCausalLM(text) if kind == "mistral4" else transformers.AutoModelForCausalLM.from_config(text))
    model = model.float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            # What is for images counts for nothing here.
            parameter.copy_(torch.from_numpy(values(seed, tensor, shape)) if len(shape) < 3 else torch.zeros(shape))
    random = np.random.Generator(np.random.Philox(key=seed))
    ids = torch.from_numpy(random.integers(2, COMMON["vocab_size"], (ROWS, SEQ)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    continued, margin = greedy(model, ids)
    folder = out / "dialects" / name
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"logits": logits.numpy(), "input_ids": ids.numpy().astype(np.int64).copy(),
               "greedy_ids": continued.numpy().astype(np.int64).copy()}, folder / "expected.safetensors")
    case = {"name": name, "purpose": purpose, "seed": seed, "greedy_min_margin": round(margin, 4)}
    (folder / "case.json").write_text(json.dumps(case, indent=2) + "\n")


PARTS = ("cases", "adapters", "dialects", "tokenizers")


def dropped(model, random):
    """What leaving numbers out makes of one map: mean and deviation of its outputs."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.from_numpy(random.standard_normal((1, 3, layer.in_features)).astype(np.float32))
    torch.manual_seed(1)
    layer.train()
    with torch.no_grad():
        # Each row of a batch draws for itself.
        y = layer(x.expand(DRAWS, -1, -1)).double()
    layer.eval()
    return {"dropout.x": x.numpy(), "dropout.mean": y.mean(0).float().numpy(), "dropout.deviation": y.std(0).float().numpy()}


def make_adapter(name, out):
    """An adapter as PEFT saves it, what it computes, and ten steps of AdamW on it."""
    base, keys = ADAPTERS[name]
    seed = sum(map(ord, name))

    def make():
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "cases" / base, dtype=torch.float32, attn_implementation="eager")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **keys))
        with torch.no_grad():
            for tensor, parameter in model.named_parameters():
                if "magnitude" not in tensor and "lora_" in tensor:
                    parameter.copy_(torch.from_numpy(0.4 * values(seed, tensor, tuple(parameter.shape))))
                elif "magnitude" in tensor:
                    parameter.mul_(torch.from_numpy(1 + 0.5 * values(seed, tensor, tuple(parameter.shape))))
        return model.eval()

    model = make()
    random = np.random.Generator(np.random.Philox(key=seed))
    ids = torch.from_numpy(random.integers(2, model.config.vocab_size, (ROWS, SEQ)))
    with torch.no_grad():
        expected = {"logits": model(input_ids=ids).logits.numpy(), "input_ids": ids.numpy().astype(np.int64).copy()}
    if keys.get("lora_dropout"):
        expected |= dropped(model, random)
    folder = out / "adapters" / name
    model.peft_config["default"].base_model_name_or_path = f"../../cases/{base}"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # Its keys in an order of their own: sets are written as they fall.
    config = json.loads((folder / "adapter_config.json").read_text())
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    trained = [(tensor, parameter) for tensor, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for _, parameter in trained if parameter.ndim > 1]
    vectors = [parameter for _, parameter in trained if parameter.ndim == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS + 1):
        loss = loss_of(model, ids, ids)
        losses.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected["adamw.losses"] = np.array(losses, np.float32)
    for tensor, parameter in peft.get_peft_model_state_dict(model).items():
        expected[f"adamw.{tensor}"] = parameter.detach().numpy().copy()
    save_file(expected, folder / "expected.safetensors")


TEXT = """The cat sat on the mat. It said: "Hello, world!" and looked at 3,141 mice.
    def grün(naïve): return "Straße" + '日本語'  # 😀 two  spaces
don't stop; we've seen it all before, haven't we? cat cats sat sats mat mats""".split("\n")

STRINGS = ["", "The cat", "The cat sat on the mat.", " leading", "trailing ", "two  spaces", "a\nb\n\nc", "\ttab", "don't we've",
           "Straße naïve grün", "日本語", "😀 smile 😀", "caf\u00e9 cafe\u0301", "3,141", "\u00a0nbsp", "<s> </s>", "UPPER lower",
           "x" * 40, "def f(x):\n    return x"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


def llama():
    """SentencePiece's BPE as Llama 2 has it: blanks are letters, unknown characters are bytes, a text begins with <s>."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = sorted({c for line in TEXT for c in line if c.isascii() and c != " "} | {"▁"})
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, limit_alphabet=len(alphabet),
                                  initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([line for line in TEXT * 4 if line.isascii()], trainer)
    description = json.loads(trained.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
                                                             special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return tokenizer


def word_level():
    words = sorted({word for line in TEXT for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


def end_of_word():
    """BPE as before ByteLevel: `</w>` ends a word, and the decoder makes a blank of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "llama": llama, "unigram": unigram, "word_piece": word_piece,
              "word_level": word_level, "end_of_word": end_of_word}


def make_tokenizer(name, out):
    folder = out / "tokenizers" / name
    folder.mkdir(parents=True)
    # A committed tokenizer stays: trainers may break ties anew from version to version. What it does is what is compared.
    given = HERE / "tokenizers" / name / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(given)) if given.is_file() else TOKENIZERS[name]()
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = []
    for text in STRINGS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append({
            "text": text,
            "ids": ids,
            "ids_with_special_tokens": tokenizer.encode(text, add_special_tokens=True).ids,
            "decoded": tokenizer.decode(ids, skip_special_tokens=True),
        })
    (folder / "expected.json").write_text(json.dumps(rows, ensure_ascii=True, indent=1) + "\n")


def sums(out):
    files = sorted(path for part in PARTS for path in (out / part).rglob("*") if path.is_file())
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}\n" for path in files)


def make(out):
    for name in CASES:
        make_case(name, out)
        print(f"{name}: {sum(p.stat().st_size for p in (out / 'cases' / name).iterdir()) // 1024} KiB", flush=True)
    for name in ADAPTERS:
        make_adapter(name, out)
    for name in DIALECTS:
        make_dialect(name, out)
    for name in TOKENIZERS:
        make_tokenizer(name, out)


def compare(made, here):
    """The names of what differs: weights and texts in any bit, figures beyond the tolerance of their case."""
    wrong = []
    for path in sorted(p for part in PARTS for p in (made / part).rglob("*") if p.is_file()):
        name = path.relative_to(made).as_posix()
        other = here / name
        if not other.is_file():
            wrong.append(f"{name} is missing")
        elif path.name == "expected.safetensors":
            new, old = load_file(path), load_file(other)
            if new.keys() != old.keys():
                wrong.append(f"{name} holds other tensors")
                continue
            for key in new:
                limit = TOLERANCE["adamw_losses_abs" if key.startswith("adamw") else "logits_abs"]
                if key.startswith("dropout."):
                    # Other versions may draw otherwise.
                    limit = 0.05
                if new[key].shape != old[key].shape or np.abs(new[key].astype(np.float64) - old[key]).max() > limit:
                    wrong.append(f"{name}: {key}")
        elif path.name.endswith(".safetensors"):
            if path.read_bytes() != other.read_bytes():
                wrong.append(name)
        elif path.suffix == ".json" and "config" in path.name:
            drop = lambda text: {k: v for k, v in json.loads(text).items() if k not in ("transformers_version", "peft_version")}  # noqa: E731
            if drop(path.read_text()) != drop(other.read_text()):
                wrong.append(name)
        elif path.read_bytes() != other.read_bytes():
            wrong.append(name)
    return wrong


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--check", action="store_true", help="make everything again elsewhere and compare")
    check = arguments.parse_args().check
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, torch {torch.__version__}")
    if check:
        with tempfile.TemporaryDirectory() as made:
            made = pathlib.Path(made)
            make(made)
            wrong = compare(made, HERE)
        if sums(HERE) != (HERE / "SHA256SUMS").read_text():
            wrong.append("SHA256SUMS does not list the files as they are")
        print("\n".join(wrong) or "everything is as it was")
        sys.exit(bool(wrong))
    with tempfile.TemporaryDirectory() as made:
        made = pathlib.Path(made)
        make(made)
        for part in PARTS:
            shutil.rmtree(HERE / part, ignore_errors=True)
            shutil.copytree(made / part, HERE / part)
    (HERE / "SHA256SUMS").write_text(sums(HERE))


if __name__ == "__main__":
    main()
