"""What other libraries say: tiny random transformers models, their logits and gradients, and a tiny tokenizer."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from src.checkpoint.convert import from_hf_name, rotary_from_hf
from src.data.batch import Batch
from src.models.config import ModelConfig

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that every part of the model shows in the logits
}
_ROPE_500K = {"rope_type": "default", "rope_theta": 5e5}
MODELS: dict[str, dict[str, object]] = {
    "mha": {"num_attention_heads": 4, "rms_norm_eps": 1e-3},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 4, "rope_parameters": _ROPE_500K},
    "tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,  # 8 heads of 8 are wider than the model
        "tie_word_embeddings": True,
    },
}

# Three rows of different lengths; the response starts where the mask does.
ROWS = [
    ([1, 17, 5, 33, 8, 60, 2], 3),
    ([1, 40, 41, 9, 9, 12, 7, 25, 50, 3, 2], 6),
    ([1, 22, 2], 1),
]

_TEXT = """The red ball is in the box. Two cats and three dogs play in the park.
There are 12 apples, 7 pears and 30 plums: 12 + 7 + 30 = 49.
She said that the answer is 8 because 2 * 4 = 8, and 9 - 1 = 8, and 16 / 2 = 8.
Lily was sad and did not know what to do. So the box is full of 56 toys."""


def shared(path: str) -> Path:
    """A third-party file of ../shared/data; the test is skipped where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/data/{path} is not here")
    return SHARED / path


def make_llama(folder: Path, kind: str) -> Path:
    """Save a tiny random float32 Llama of MODELS as a Hugging Face directory. Returns the directory."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, **MODELS[kind]))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms begin at 1, where a wrong order of operations can hide
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def make_tokenizer(path: Path) -> Path:
    """Train a sentencepiece model of at most 64 pieces with <unk> <s> </s> = 0 1 2. Returns the file."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=64,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def batch() -> Batch:
    """ROWS padded on the right."""
    longest = max(len(tokens) for tokens, _ in ROWS)
    tokens = torch.zeros(len(ROWS), longest, dtype=torch.int64)
    mask = torch.zeros(len(ROWS), longest, dtype=torch.bool)
    for index, (row, start) in enumerate(ROWS):
        tokens[index, : len(row)] = torch.tensor(row)
        mask[index, start : len(row)] = True
    return Batch(tokens, mask)


def hf_model(folder: Path) -> LlamaForCausalLM:
    """transformers' model of a directory, float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_logits_and_loss(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V] of batch(), and the mean negative log-likelihood of its response tokens."""
    tokens, mask, *_ = batch()
    logits = model(tokens).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return logits, -logprobs[mask[:, 1:]].mean()


def hf_gradients(model: LlamaForCausalLM, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Gradients of a model after backward() under our names and in our rotary layout."""
    for hf_name, parameter in model.named_parameters():
        name = from_hf_name(hf_name)
        yield name, rotary_from_hf(name, parameter.grad, config)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value, which may be zero."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
