"""Hugging Face -> ours -> Hugging Face: transformers computes, generates and stops as with the original."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src import load, parallel
from src.checkpoint import export
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from tests import reference, workers, zoo

ALL = zoo.MODELS | zoo.VARIANTS
STEPS = 12
# What transformers notes about the file rather than the model, and what it reads into rope_parameters
NOTES = {"_name_or_path", "transformers_version", "architectures", "partial_rotary_factor", "rope_local_base_freq"}


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def facts(folder: Path) -> dict[str, object]:
    """All that transformers reads in a config.json, in one form of those that mean the same."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    values["rope_parameters"].pop("type", None)
    for key in values.keys() & {"original_max_position_embeddings"}:  # a model that is built goes by this one
        values["rope_parameters"][key] = values[key]
    if values["model_type"] == "ministral" and "sliding_attention" not in values["layer_types"]:
        values |= {"model_type": "mistral", "sliding_window": None}
        del values["layer_types"]
    return {key: value for key, value in values.items() if key not in NOTES}


def greedy(model: PreTrainedModel) -> list[int]:
    """The tokens that follow three of them, as generate() ends them by the files beside the weights."""
    prompt = torch.tensor([[1, 17, 5]])
    ended = model.generate(
        prompt, max_new_tokens=STEPS, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    return ended[0, 3:].tolist()


@pytest.mark.parametrize("name", [name for name, model in ALL.items() if not model.layout])
def test_transformers_sees_no_difference(tmp_path: Path, name: str) -> None:
    original = zoo.make(tmp_path / "hf", name)
    (original / "generation_config.json").unlink(missing_ok=True)
    path = original / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"eos_token_id": None}), encoding="utf-8")
    said = greedy(opened(original))
    # the end stands in config.json alone, in one of its two forms
    stop = {"eos_token_id": said[4] if len(name) % 2 else [63, said[4]], "pad_token_id": 9}
    path.write_text(json.dumps(values | stop), encoding="utf-8")

    split(open_source(str(original)), tmp_path / "ours", 2, "hf")
    export.export_hf(open_source(str(tmp_path / "ours")), tmp_path / "back", "ours")

    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert facts(tmp_path / "back") == facts(original)
    theirs, back = opened(original), opened(tmp_path / "back")
    assert torch.equal(back(workers.LONG_ROW[None]).logits, theirs(workers.LONG_ROW[None]).logits)
    assert greedy(back) == greedy(theirs) == said[: said.index(said[4]) + 1]


@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_logits_of_variants_equal_transformers(tmp_path: Path, name: str) -> None:
    parallel.start()
    original = zoo.make(tmp_path / "hf", name)
    split(open_source(str(original)), tmp_path / "ours", 1, "hf")
    model = load.load_solver(str(tmp_path / "ours"))
    with torch.no_grad():
        found, expected = (
            workers.all_logits(model, workers.LONG_ROW[None]),
            opened(original)(workers.LONG_ROW[None]).logits,
        )
    assert reference.relative_difference(found, expected) < 1e-4
