"""src/checkpoint/export.py: what transformers opens is what was exported."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from src import load, parallel
from src.checkpoint import export, storage
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.checkpoint.tensor_files import StoredTensor
from src.checkpoint.weight_files import Source
from src.errors import UserError
from src.models.config import ModelConfig
from tests import reference, zoo
from tests.checkpoint.weights import CONFIG, random_weights


def shards_of(config: ModelConfig, folder: Path, n: int, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights of a config as a directory of ours."""
    weights = random_weights(config, dtype)
    with storage.writing(folder):
        storage.write_shard(folder, storage.WEIGHTS, 0, {name: w / 5 for name, w in weights.items()})
        storage.finish(folder, 1, {"params.json": config.to_dict()}, [], {})
    if n > 1:
        split(open_source(str(folder)), folder / "cut", n, "random weights")
    return folder / "cut" if n > 1 else folder


@pytest.mark.parametrize("name", [name for name, model in zoo.MODELS.items() if not model.layout])
def test_hf_to_ours_to_hf_gives_identical_files_and_logits(tmp_path: Path, name: str) -> None:
    original = zoo.make(tmp_path / "hf", name)
    split(open_source(str(original)), tmp_path / "two", 2, "hf")
    export.export_hf(open_source(str(tmp_path / "two")), tmp_path / "back", "two")
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    tokens = reference.batch()[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert torch.equal(theirs(tokens).logits, zoo.reference_model(original)(tokens).logits)


def test_files_stay_under_the_size_asked_for_and_transformers_opens_them(tmp_path: Path) -> None:
    folder = shards_of(CONFIG, tmp_path / "ours", 4)
    export.export_hf(open_source(str(folder)), tmp_path / "hf", "ours", max_shard_bytes=20_000)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 20_000 + 2_000 for path in files)  # and the header
    index = json.loads((tmp_path / "hf" / export.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in random_weights().values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    parallel.start()
    tokens = reference.batch()[0]
    ours = load.load_solver(str(shards_of(CONFIG, tmp_path / "one", 1)))
    logits = ours.logits(ours(tokens))
    assert reference.relative_difference(model(tokens).logits, logits) < 1e-4
    again = open_source(str(tmp_path / "hf"))
    assert all(
        torch.equal(again.tensors[name].load(), weight / 5) for name, weight in random_weights().items()
    )


def test_parts_hold_one_tensor_at_least() -> None:
    tensors = {
        name: StoredTensor((size,), lambda: torch.ones(1), torch.float32)
        for name, size in (("a", 1), ("b", 9), ("c", 1), ("d", 1))
    }
    parts = export.file_parts(tensors, "", 8)
    assert {file_name: list(part) for file_name, part in parts.items()} == {
        "model-00001-of-00003.safetensors": ["a"],
        "model-00002-of-00003.safetensors": ["b"],
        "model-00003-of-00003.safetensors": ["c", "d"],
    }


@pytest.mark.parametrize("score", ["last", "mean"])
def test_verifier_is_transformers_classifier(tmp_path: Path, score: str) -> None:
    facts = {"value_head": True, "objective": "process", "score": score, "score_mean": 0.5, "step": "line"}
    config = ModelConfig(**CONFIG.to_dict() | facts | {"carried": {"pad_token_id": None}})
    folder = shards_of(config, tmp_path / "ours", 2)
    export.export_hf(open_source(str(folder)), tmp_path / "hf", "ours")
    parallel.start()
    verifier = load.load_verifier(str(shards_of(config, tmp_path / "one", 1)))
    row = torch.tensor([[1, 17, 5, 33, 8, 60, 2]])
    scores = verifier.scores(verifier(row))
    if score == "last":
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        assert theirs(row).logits.shape == (1, 1)
        scores = scores[:, -1:]
    else:
        theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        scores = scores[..., None]
    assert reference.relative_difference(theirs(row).logits, scores) < 1e-4
    again = open_source(str(tmp_path / "hf"))
    assert again.config == config
    assert torch.equal(again.tensors["v_head.weight"].load(), random_weights(config)["v_head.weight"] / 5)


def test_weights_of_others_are_never_written_over(tmp_path: Path) -> None:
    theirs = reference.make_llama(tmp_path / "hf", "mha")
    before = (theirs / "model.safetensors").read_bytes()
    source = open_source(str(shards_of(CONFIG, tmp_path / "ours", 1)))
    with pytest.raises(UserError, match=r"holds model\.safetensors, weights that were not written"):
        export.export_hf(source, theirs, "ours")
    assert (theirs / "model.safetensors").read_bytes() == before
    export.export_hf(source, tmp_path / "out", "ours")
    export.export_hf(source, tmp_path / "out", "ours", max_shard_bytes=20_000)  # its own it replaces
    assert not (tmp_path / "out" / "model.safetensors").exists()
    storage.verify_hashes(tmp_path / "out")


def as_verifier(source: Source, score: str) -> Source:
    """A random value head on a solver."""
    config = dataclasses.replace(source.config, value_head=True, tied=False, score=score)
    head = torch.randn(1, config.dim, generator=torch.Generator().manual_seed(1))
    tensors = {name: stored for name, stored in source.tensors.items() if name != "output.weight"}
    tensors["v_head.weight"] = StoredTensor((1, config.dim), lambda: head, torch.float32)
    return source._replace(config=config, tensors=tensors)


@pytest.mark.parametrize("score", ["last", "steps"])
@pytest.mark.parametrize("name", ["mixtral", "qwen", "glm-4", "gemma-3", "granite", "olmo-2", "olmo-3", "phi-3"])
def test_verifiers_of_every_family_are_classifiers_or_refused(tmp_path: Path, name: str, score: str) -> None:
    """The row ends in what the class of OLMo 2 takes for padding where config.json does not say."""
    verifier = as_verifier(open_source(str(zoo.make(tmp_path / "hf", name))), score)
    verifier.config.carried.pop("pad_token_id", None)
    auto, names = {
        "last": (AutoModelForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        "steps": (AutoModelForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    }[score]
    if verifier.config.family not in names:
        with pytest.raises(UserError, match=f"score={score}; transformers has no .*Classification of"):
            export.export_hf(verifier, tmp_path / "out", "ours")
        return
    export.export_hf(verifier, tmp_path / "out", "ours")
    split(verifier, tmp_path / "ours", 1, "ours")
    parallel.start()
    model, row = load.load_verifier(str(tmp_path / "ours")), torch.tensor([[5, 17, 33, 8, 60, 1]])
    classifier = auto.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        scores = model.scores(model(row))
        found = classifier(row).logits
    assert classifier.config.architectures == [names[verifier.config.family]] == [type(classifier).__name__]
    assert reference.relative_difference(found.flatten(), scores[0, -1:] if score == "last" else scores[0]) < 1e-4
