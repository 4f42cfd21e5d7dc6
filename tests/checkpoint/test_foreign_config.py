"""src/checkpoint/foreign_config.py and its tables: released facts, foreign configs, and claims that contradict."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from src.checkpoint.families import FAMILIES
from src.checkpoint.foreign_config import (
    check_model_type,
    claimed_facts,
    config_from_hf,
    config_to_hf,
    left_out_in_training,
    released,
    released_config,
)
from src.checkpoint.params import config_from_dict
from src.checkpoint.released import MODEL_TYPES
from src.errors import UserError
from src.models.config import ModelConfig
from tests import reference, zoo
from tests.checkpoint.weights import CONFIG, HF

HF_QWEN = HF | {
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 16,
    "max_window_layers": 1,
}

EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
QWEN_1 = {
    "model_type": "qwen", "kv_channels": 4, "seq_length": 64, "layer_norm_epsilon": 1e-5, "intermediate_size": 96
}
MIXED = ["full_attention", "sliding_attention"]
WAVELENGTH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0, 2.0],
    "long_factor": [1.0, 4.0],
}
POINTS = torch.linspace(-5, 5, 11)
PHI, GEMMA_3 = {"model_type": "phi3"}, {"model_type": "gemma3_text", "head_dim": 4}


def test_sizes_are_the_published_ones() -> None:
    published = json.loads(reference.shared("model_facts.json").read_text(encoding="utf-8"))
    names = {
        "hidden": "dim", "layers": "n_layers", "heads": "n_heads", "kv": "n_kv_heads", "ffn": "ffn_dim",
        "vocab": "vocab_size", "rope_theta": "rope_theta", "norm_eps": "norm_eps", "experts": "n_experts",
        "experts_per_tok": "n_active_experts", "kv_channels": "head_dim", "tie": "tied",
    }
    rows = {
        name.removesuffix(" (v1)").replace("qwen2", "qwen-2"): row
        for name, row in published.items()
        if name != "_note"
    }
    assert len(rows) == 25
    for name, row in rows.items():
        claimed = claimed_facts(released(name))
        for key, field in names.items():
            if key in row and (field in claimed or key != "norm_eps"):
                assert claimed[field] == row[key], f"{name}: {key}"


@pytest.mark.parametrize("model_type", [name for name, row in MODEL_TYPES.items() if row.facts])
def test_every_released_size_is_a_model_that_its_family_can_say(model_type: str) -> None:
    row = MODEL_TYPES[model_type]
    facts = claimed_facts(row)
    assert not {"dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_theta"} - set(
        facts
    )
    config = ModelConfig(**facts, max_seq_len=4096, embedding_split_dim=0)
    check_model_type(config, model_type, "itself")
    back = config_from_hf(config_to_hf(config), "config.json", "float32")
    assert back == dataclasses.replace(config, embedding_split_dim=0 if config.tied else 1)
    check_model_type(config, f"{model_type}-chat", "itself")


def test_model_type_must_not_contradict_the_checkpoint() -> None:
    check_model_type(CONFIG, "", "ckpt")
    check_model_type(CONFIG, "llama", "ckpt")
    with pytest.raises(UserError, match="ckpt has dim=32, but --model_type llama-2-7b means dim=4096"):
        check_model_type(CONFIG, "llama-2-7b", "ckpt")
    with pytest.raises(UserError, match="--model_type gpt is unknown; expected one of llama, "):
        check_model_type(CONFIG, "gpt", "ckpt")


@pytest.mark.parametrize(
    ("model_type", "open"),
    [
        ("llama-2-7b", {"value_head": True, "objective": "process", "score": "steps", "step": "line"}),
        ("gemma-2b", {"value_head": True, "objective": "outcome", "tied": False}),
        ("qwen-7b", {"rope_type": "dynamic", "logn_attention": True}),  # as published
    ],
)
def test_a_released_model_may_differ_in_what_no_size_fixes(model_type: str, open: dict[str, object]) -> None:
    check_model_type(dataclasses.replace(released_config(model_type, 2048), **open), model_type, "ckpt")


@pytest.mark.parametrize(
    ("model_type", "wrong", "named"),
    [
        ("llama-3.1-8b", {"rope_type": "default", "rope_factor": 1.0}, "rope_type=default"),
        ("llama-2-7b", {"vocab_size": 32001}, "vocab_size=32001"),
        ("mistral-7b-instruct-v0.1", {"windows": ()}, r"windows=\(\)"),
        ("mistral-7b-instruct-v0.2", {"rope_theta": 1e4}, "rope_theta=10000.0"),
        ("mixtral-8x7b-instruct-v0.1", {"n_active_experts": 1}, "n_active_experts=1"),
        ("qwen-7b", {"qkv_bias": False}, "qkv_bias=False"),
        ("qwen-3-8b", {"head_dim": 64}, "head_dim=64"),
        ("gemma-2-27b", {"query_pre_attn_scalar": 128.0}, "query_pre_attn_scalar=128.0"),
        ("internlm2", {"family": "llama"}, "family=llama"),
    ],
)
def test_each_fact_of_a_released_model_is_checked(
    model_type: str, wrong: dict[str, object], named: str
) -> None:
    facts = claimed_facts(released(model_type))
    facts = (
        (dataclasses.asdict(CONFIG) if len(facts) < 10 else {"max_seq_len": 4096})
        | facts
        | {"embedding_split_dim": 0}
    )
    config = ModelConfig(**facts | wrong)
    with pytest.raises(UserError, match=f"ckpt has {named}, but --model_type {model_type} means"):
        check_model_type(config, model_type, "ckpt")


def test_added_tokens_are_not_of_the_released_vocabulary() -> None:
    facts = claimed_facts(released("llama-2-7b")) | {"vocab_size": 32003, "max_seq_len": 4096}
    check_model_type(ModelConfig(**facts, n_added_tokens=3), "llama-2-7b", "ckpt")
    with pytest.raises(UserError, match="vocab_size=32003"):
        check_model_type(ModelConfig(**facts), "llama-2-7b", "ckpt")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": "no"}, "attention_bias='no'; expected true or false"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "rope_scaling=.*proportional"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type yarn lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling.mscale=0.7 is not implemented"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=False is not implemented"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, r"rope_short_factors=\[1.0\]: expected 2 numbers"),
        ({"rope_scaling": LONGROPE | {"long_factor": 2.0}}, "long_factor=2.0; expected a list of numbers"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0, "2"]}}, "long_factor='2'; expected a number above 0"),
        (PHI | {"partial_rotary_factor": 0.3}, "head_dim=4, of which 1 rotate"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers=\[1\]; expected 0 or 1 for each of 2"),
        ({"model_type": "smollm3", "use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        (GEMMA_3 | {"sliding_window_pattern": 5}, "sliding_window_pattern=5 is not implemented"),
        (
            GEMMA_3 | {"rope_parameters": {"full_attention": {}, "sliding_attention": YARN}},
            "rope_parameters.sliding_attention=.*yarn.*expected 'default'",
        ),
        (GEMMA_3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "say which layers they are of"),
        (PHI | {"rope_parameters": LONGROPE}, "original_max_position_embeddings=16 stands with the rope alone.* 4096"),
        (
            {"model_type": "olmo3", "original_max_position_embeddings": 16}
            | {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "original_max_position_embeddings=16 stands on its own, where transformers does not read it",
        ),
        ({"model_type": "olmo3", "rope_parameters": YARN}, "do not say which layers they are of"),
        (GEMMA_3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not implemented"),
        ({"model_type": "qwen2_moe", "moe_intermediate_size": 8, "num_experts": 4} | EXPERTS
         | {"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        ({"model_type": "deepseek_v3"}, r"'deepseek_v3' is not supported \(multi-head latent attention\)"),
        ({"model_type": "qwen3_next"}, r"'qwen3_next' is not supported \(gated delta nets\)"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear lacks 'factor'"),
        ({"rope_parameters": {"full": {"rope_theta": 1e4}}}, "rope_parameters differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types="),
        ({"model_type": "gemma", "head_dim": 8, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "qwen3", "head_dim": 8, "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen3"}, "key 'head_dim' is missing"),
        ({"model_type": "mixtral"}, "key 'num_experts_per_tok' is missing"),
        ({"model_type": "internlm2", "bias": True}, "bias=True"),
        ({"hidden_size": "32"}, "hidden_size='32'; expected a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0; expected a number above 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0; expected an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; expected a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta=inf; expected a number above 0"),
        ({"hidden_size": 10**400}, "hidden_size=1000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0; expected a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'; expected true or false"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"is_causal": False}, "is_causal=False is not implemented"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config="),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'; expected a token's id"),
        ({"pad_token_id": True}, "pad_token_id=True; expected a token's id"),
        ({"bos_token_id": [1]}, r"bos_token_id=\[1\]; expected a token's id"),
        ({"splitrl": {"dim": 4}}, "splitrl="),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types=.*does not read for this family"),
        # rope_scaling
        ({"rope_scaling": ["linear"]}, r"rope_scaling=\['linear'\]"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling=.*is not implemented"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling=.*is not implemented",
        ),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor=nan"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1.0}},
            "rope_theta=500000.0, but 1.0 in",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta=500000.0, but 1.0 in"),
        (
            {"rope_scaling": WAVELENGTH, "original_max_position_embeddings": 16},
            "original_max_position_embeddings=16, but 32 in rope_scaling",
        ),
        ({"rope_parameters": {"type": "proportional", "factor": 4.0}}, "rope_scaling=.*proportional"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling=.*linear.* and rope_parameters=.*default.*differ",
        ),
        (QWEN_1 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*is not implemented"),
        # windows
        (
            {"model_type": "mixtral", "layer_types": ["full_attention"] * 2} | EXPERTS,
            "layer_types=.*does not read",
        ),
        ({"model_type": "mistral", "layer_types": [[], {}]}, "layer_types="),
        (
            {"model_type": "mistral", "layer_types": MIXED, "sliding_window": None},
            "layer_types=.*no window is in use",
        ),
        ({"model_type": "qwen2", "layer_types": MIXED}, "layer_types=.*no window is in use"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0; expected a number above 0"),
        ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window='8'"),
        (
            {"model_type": "qwen2", "use_sliding_window": "false"},
            "use_sliding_window='false'; expected true or false",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
            "max_window_layers=None",
        ),
    ],
)
def test_what_we_do_not_implement_is_refused_by_name(values: dict[str, object], named: str) -> None:
    config_from_hf(HF, "config.json", "float32")
    with pytest.raises(UserError, match=f"config.json: .*{named}|config.json: {named}"):
        config_from_hf(HF | values, "config.json", "float32")


@pytest.mark.parametrize("model_type", [name for name, row in MODEL_TYPES.items() if row.facts])
def test_every_released_size_can_be_planned(model_type: str) -> None:
    config = released_config(model_type, 128)
    assert config.dim == MODEL_TYPES[model_type].facts["dim"]
    check_model_type(config, model_type, "its plan")
    assert config.embedding_split_dim == (0 if config.tied else 1)


def test_released_configs_of_gemma_leave_their_activation_null() -> None:
    values = HF | {"model_type": "gemma", "head_dim": 8, "hidden_act": "gelu", "hidden_activation": None}
    assert config_from_hf(values, "config.json", "float32").activation == "gelu_tanh"


def test_silu_by_its_other_name() -> None:
    assert config_from_hf(HF | {"hidden_act": "swish"}, "x", "float32").activation == "silu"
    swish, silu = (transformers.activations.ACT2FN[name](POINTS) for name in ("swish", "silu"))
    assert torch.equal(swish, silu)


def test_windows_by_layer() -> None:
    def windows(**values: object) -> tuple[int, ...]:
        return config_from_hf(HF_QWEN | values, "config.json", "float32").windows

    assert windows() == ()
    assert windows(use_sliding_window=True) == (0, 16)
    assert windows(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]) == (16, 0)
    assert windows(use_sliding_window=True, max_window_layers=2) == ()
    assert windows(model_type="mistral") == (16, 16)
    assert windows(model_type="mistral", sliding_window=None) == ()
    assert windows(model_type="mistral", layer_types=MIXED) == (0, 16)
    assert windows(model_type="mistral", layer_types=MIXED[:1] * 2) == ()
    assert windows(model_type="mistral", layer_types=None) == (16, 16)


def test_a_window_that_qwen_leaves_to_transformers_is_4096_from_layer_28_on() -> None:
    values = {
        key: value for key, value in HF_QWEN.items() if key not in ("sliding_window", "max_window_layers")
    }
    config = config_from_hf(
        values | {"use_sliding_window": True, "num_hidden_layers": 30}, "config.json", "float32"
    )
    theirs = transformers.Qwen2Config(**values | {"use_sliding_window": True, "num_hidden_layers": 30})
    windowed = [kind == "sliding_attention" for kind in theirs.layer_types]
    assert config.windows == tuple(theirs.sliding_window * each for each in windowed) and sum(windowed) == 2


def test_rope_that_is_said_twice_alike_is_read() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    both = HF | {"rope_scaling": linear, "rope_parameters": linear | {"rope_theta": HF["rope_theta"]}}
    assert config_from_hf(both, "config.json", "float32").rope_factor == 2.0


def test_what_no_config_of_the_family_says_is_not_exported() -> None:
    for wrong in (
        {"windows": (4, 8)},
        {"qkv_bias": True},
        {"rope_low_freq_factor": 2.0},
        {"windows": (4, 0)},
    ):
        with pytest.raises(UserError, match="has no form in a config.json of family llama"):
            config_to_hf(dataclasses.replace(CONFIG, **wrong))
    mixed = dataclasses.replace(CONFIG, family="mistral", windows=(0, 8))
    assert config_to_hf(mixed)["layer_types"] == MIXED
    with pytest.raises(UserError, match=r"windows=\(4, 8\) has no form"):
        config_to_hf(dataclasses.replace(mixed, windows=(4, 8)))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_config_survives_the_way_to_hf_and_back(tmp_path: Path, name: str) -> None:
    values = json.loads((zoo.make(tmp_path / name, name) / "config.json").read_text(encoding="utf-8"))
    config = config_from_hf(values, "config.json", "float32")
    written = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(written, "params.json") == config
    older = {key: value for key, value in written.items() if key not in ("template_args", "carried")}
    assert config_from_dict(older, "params.json") == dataclasses.replace(config, template_args={}, carried={})
    exported = config_to_hf(config)
    assert config_from_hf(exported, "config.json", "float32") == config
    if FAMILIES[config.family].remote:  # every key of the published layout says what it said
        assert {key: exported[key] for key in values} == values
        return
    theirs = transformers.AutoConfig.for_model(**exported)
    assert theirs.head_dim == config.head_dim if hasattr(theirs, "head_dim") else True
    assert theirs.rope_parameters.get("full_attention", theirs.rope_parameters)["rope_theta"] == config.rope_theta
    assert theirs.num_key_value_heads == config.n_kv_heads


@pytest.mark.parametrize("name", ["llama-1", "mixtral", "phi-3", "qwen-2-moe"])
def test_what_transformers_computes_in_training_alone_is_named(name: str) -> None:
    tiny, ids = zoo.MODELS[name], torch.arange(1, 13)[None]

    def config(**changes: object) -> transformers.PreTrainedConfig:
        return transformers.AutoConfig.for_model(tiny.model_type, **zoo._SIZES | tiny.settings | changes)

    keys = [key for key in config().to_dict() if any(word in key for word in ("drop", "jitter", "router"))]
    assert "attention_dropout" in keys
    for key in keys:
        changed = config(**{key: True if key == "output_router_logits" else 0.5})
        learning, plain = map(transformers.AutoModelForCausalLM.from_config, (changed, config()))
        plain.load_state_dict(learning.state_dict())
        with torch.no_grad():
            found, expected = (model(ids, labels=ids).loss.item() for model in (learning.train(), plain.eval()))
        named = left_out_in_training(config_from_hf(changed.to_dict(), "config.json", "float32"))
        assert named == ([f"{key}={changed.to_dict()[key]}"] if abs(found - expected) > 1e-6 else []), key
    assert not left_out_in_training(config_from_hf(config().to_dict(), "config.json", "float32"))
