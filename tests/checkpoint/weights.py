"""One random model in our words, Meta's and Hugging Face's, for the tests of this folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import convert, shards
from src.models.config import ModelConfig

CONFIG = ModelConfig(
    dim=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=4, ffn_dim=48, vocab_size=64, max_seq_len=128,
    rope_theta=5e5, norm_eps=1e-6,
)
# The same model in Meta's words: int(8 * 32 / 3) = 85, half of it is 42, rounded up to a multiple of 16 is 48.
META = {
    "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "ffn_dim_multiplier": 0.5,
    "norm_eps": 1e-6, "rope_theta": 5e5, "vocab_size": -1, "max_seq_len": 128,
}
# The same model in Hugging Face's words.
HF = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5, "hidden_act": "silu", "tie_word_embeddings": False,
}

Tensors = dict[str, Tensor]


def random_weights(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    """Whole tensors of a config in our names and layout."""
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shards.expected_shapes(config).items()}


def as_hf(weights: Tensors, config: ModelConfig = CONFIG) -> Tensors:
    """The same tensors in Hugging Face's names and layout."""
    return {
        convert.to_hf_name(name): convert.rotary_to_hf(name, tensor, config).contiguous()
        for name, tensor in weights.items()
    }


def write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def parts(weights: Tensors, n: int = 3) -> list[Tensors]:
    """Every n-th parameter of a checkpoint."""
    names = sorted(weights)
    return [{name: weights[name] for name in names[start::n]} for start in range(n)]
