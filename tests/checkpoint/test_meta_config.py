"""src/checkpoint/meta_config.py: params.json of Meta and of Mistral AI."""

import pytest

from src.checkpoint.meta_config import config_from_meta, meta_ffn_dim
from src.checkpoint.released import MODEL_TYPES
from src.errors import UserError
from src.models.config import ModelConfig
from tests.checkpoint.weights import META


def meta(values: dict[str, object], tied: bool = False) -> ModelConfig:
    return config_from_meta(
        values, "params.json",
        ffn_dim=48, vocab_size=64, tied=tied, value_head=False, embedding_split_dim=0, dtype="bfloat16",
    )


def test_meta_rope_is_scaled_by_8_and_in_the_small_tied_models_by_32() -> None:
    scaled = META | {"use_scaled_rope": True}
    assert (meta(scaled).rope_type, meta(scaled).rope_factor) == ("wavelength", 8.0)
    assert meta(scaled, tied=True).rope_factor == 32.0
    for dim, n_layers, factor in ((2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0)):  # output trained apart
        assert meta(scaled | {"dim": dim, "n_layers": n_layers, "hidden_dim": 48}).rope_factor == factor
    assert meta(scaled | {"rope_scaling_factor": 16}).rope_factor == 16.0
    assert meta(META | {"use_scaled_rope": False}).rope_type == "default"


def test_params_of_mistral_and_mixtral() -> None:
    values = {
        "dim": 32, "n_layers": 2, "head_dim": 4, "hidden_dim": 48, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5,
        "vocab_size": 64, "rope_theta": 1e6,
    }
    assert meta(values).family == "mistral"
    assert meta(values).windows == ()
    assert meta(values | {"sliding_window": 4096}).windows == (4096, 4096)
    experts = meta(values | {"moe": {"num_experts": 8, "num_experts_per_tok": 2}})
    assert (experts.family, experts.n_experts, experts.n_active_experts) == ("mixtral", 8, 2)
    assert experts.renormalised_experts


@pytest.mark.parametrize(
    ("model_type", "multiple_of", "multiplier"),
    [
        ("llama-1-7b", 256, None),
        ("llama-1-13b", 256, None),
        ("llama-1-30b", 256, None),
        ("llama-1-65b", 256, None),
        ("llama-2-70b", 4096, 1.3),
        ("llama-3-8b", 1024, 1.3),
        ("llama-3-70b", 4096, 1.3),
        ("llama-3.1-405b", 4096, 1.2),
        ("llama-3.2-1b", 256, 1.5),
        ("llama-3.2-3b", 256, 1.0),
    ],
)
def test_ffn_width_of_released_models(model_type: str, multiple_of: int, multiplier: float | None) -> None:
    facts = MODEL_TYPES[model_type].facts
    assert meta_ffn_dim(facts["dim"], multiple_of, multiplier) == facts["ffn_dim"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_kv_heads": "4"}, "n_kv_heads='4'"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"multiple_of": [256]}, r"multiple_of=\[256\]"),
        ({"moe": ["experts"]}, "moe="),
        ({"moe": {"num_experts": 2.5, "num_experts_per_tok": 1}}, "num_experts=2.5; expected an integer"),
        ({"sliding_window": [4, None]}, r"sliding_window=\[4, None\]"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope='yes'; expected true or false"),
        ({"vocab_size": "64"}, "vocab_size='64', but tok_embeddings has 64 rows"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0; expected a number above 0"),
    ],
)
def test_odd_values_in_params_of_meta_are_refused_by_key(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"params.json: {named}"):
        meta(META | values)


@pytest.mark.parametrize(
    "values",
    [
        {"yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "alpha": 1.0, "beta": 32.0}},
        {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32}},
        {"use_qk_norm": True},
        {"attention_chunk_size": 8192},
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
        {"activation": "gelu"},
        {"causal": False},
        {"model_type": "mamba"},
        {"moe": {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_key_that_may_change_the_model_is_refused_unless_it_is_off(values: dict[str, object]) -> None:
    ((key, value),) = values.items()
    with pytest.raises(UserError, match=f"params.json: (moe: num_shared_experts|{key})=.* is not implemented"):
        meta(META | values)
    off = value | {"num_shared_experts": 0} if key == "moe" else None
    meta(META | {key: off})


def test_what_mistral_says_of_a_plain_model_is_read() -> None:
    said = {"model_type": "transformer", "activation": "silu", "causal": True, "tied_embeddings": True}
    values = {key: value for key, value in META.items() if key != "max_seq_len"} | {"max_position_embeddings": 512}
    config = meta(values | said, tied=True)
    assert (config.tied, config.max_seq_len) == (True, 512)
    with pytest.raises(UserError, match="tied_embeddings=True, but output and tok_embeddings differ"):
        meta(META | said)
