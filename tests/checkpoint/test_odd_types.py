"""Every key of the json files beside weights and tokenizers, turned into another type: read, or refused in one line."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from src.checkpoint import export, storage
from src.checkpoint.sources import open_source, read_config
from src.checkpoint.split import split
from src.errors import UserError
from src.text.chat import find_source
from src.text.tokenizer import Tokenizer
from tests import zoo
from tests.checkpoint.weights import META, random_weights, write_json
from tests.text.files import write_merges

Place = tuple[str | int, ...]

ODD: list[object] = [
    None, True, False, 0, 1, -1, 3, 2.5, 10**9, 10**400, float("nan"), float("inf"), "", "x", "3", "a\0b", [], [[]],
    [1, "x", None], ["full_attention"], {}, {"x": 1}, {"type": "linear"}, {"rope_type": [], "factor": "2"},
]


def places(values: object, at: Place = ()) -> Iterator[Place]:
    """Where something stands in a json document, the document itself left out."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(values: dict[str, object], at: Place, value: object) -> dict[str, object]:
    """A copy of a document with another value somewhere."""
    document = copy.deepcopy(values)
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return document


def indexed(root: Path) -> Path:
    """A Hugging Face directory of one part and its index."""
    folder = zoo.make(root / "indexed", "llama-2-70b")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = safe_open(folder / "model-00001-of-00001.safetensors", "pt").keys()
    write_json(
        folder / export.INDEX,
        {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")},
    )
    return folder


def shards(root: Path) -> Path:
    split(open_source(str(zoo.make(root / "hf", "qwen-2-window"))), root / "ours", 1, "hf")
    return root / "ours"


def open_shards(folder: Path) -> None:
    read_config(folder)
    storage.verify_hashes(folder)
    storage.fingerprint(folder)


def meta(root: Path) -> Path:
    torch.save(random_weights(), root / "consolidated.00.pth")
    scaled = {
        "use_scaled_rope": True,
        "rope_scaling_factor": 8,
        "moe": {},
        "multiple_of": 48,
        "max_seq_len": 64,
    }
    write_json(root / "params.json", META | {"dim": 18} | META | scaled)
    return root


def tokenizer(root: Path) -> Path:
    """A tokenizer whose config files say everything that is read from them."""
    template = "{% for message in messages %}{{ message.content }}{% if loop.index0 %}<|im_end|>{% endif %}{% endfor %}"
    write_merges(
        root,
        eos_token={"content": "<|im_end|>"},
        add_bos_token=False,
        additional_special_tokens=["<|im_end|>"],
        chat_template=[{"name": "default", "template": template}],
    )
    write_json(
        root / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 1, "do_sample": True}
    )
    write_json(root / "added_tokens.json", {"<think>": Tokenizer(root).vocab_size - 1})
    return root


def open_tokenizer(folder: Path) -> None:
    Tokenizer(folder)
    find_source("file", folder)


# What is read, how it is made, the file in it, how it is read.
KINDS: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], object]]] = {
    **{
        name: (
            lambda root, name=name: zoo.make(root / "hf", name),
            "config.json",
            lambda at: open_source(str(at)),
        )
        for name in (
            "llama-3.1",
            "mistral-window",
            "qwen",
            "qwen-2-window",
            "qwen-3-moe",
            "gemma-2",
            "internlm2",
        )
    },
    "index": (indexed, export.INDEX, lambda at: open_source(str(at))),
    "params.json": (shards, "params.json", read_config),
    "manifest.json": (shards, "manifest.json", open_shards),
    "Meta's params.json": (meta, "params.json", lambda at: open_source(str(at))),
    "generation_config.json": (tokenizer, "generation_config.json", open_tokenizer),
    "tokenizer_config.json": (tokenizer, "tokenizer_config.json", open_tokenizer),
    "added_tokens.json": (tokenizer, "added_tokens.json", open_tokenizer),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_type_at_any_place_is_read_or_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    make, name, read = KINDS[kind]
    folder = make(tmp_path)
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8"))
    read(folder)
    refused = 0
    for at in places(values):
        for value in ODD:
            write_json(path, changed(values, at, value))
            try:
                read(folder)
            except UserError as problem:
                refused += 1
                assert "\n" not in str(problem), (at, value, problem)
            except Exception as problem:
                raise AssertionError(f"{kind}: {at} = {str(value)[:60]!r}: {problem!r}") from problem
    assert refused > 10
