"""src/models/decoder.py against transformers, at tensor-parallel sizes 1 to 4."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from src.checkpoint.shards import cut_of, join
from src.checkpoint.sources import open_source, read_config
from src.checkpoint.split import split
from src.models.config import ModelConfig
from tests import reference
from tests.ranks import run_ranks

TINY = "hf_tiny_llama"
NAMES = [*reference.MODELS, TINY]
CACHED = ["mha", "tied"]


class Ranks(NamedTuple):
    """What n ranks computed for each model, and the models' configs."""

    results: list[dict[str, dict[str, object]]]
    configs: dict[str, ModelConfig]


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of this file as Hugging Face directories, the third-party one where it is at hand."""
    root = tmp_path_factory.mktemp("hf")
    folders = {kind: reference.make_llama(root / kind, kind) for kind in reference.MODELS}
    third_party = reference.SHARED / "weights" / TINY
    return folders | ({TINY: third_party} if third_party.is_dir() else {})


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(
    request: pytest.FixtureRequest, hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """Every model split for n ranks and run there."""
    n, root = request.param, tmp_path_factory.mktemp("split")
    for name, folder in hf_folders.items():
        split(open_source(str(folder)), root / name, n, str(folder))
    folders = {name: str(root / name) for name in hf_folders}
    tokens, mask = (x.tolist() for x in reference.batch()[:2])
    results = run_ranks(
        n, "tests.workers:decoders", root, folders=folders, tokens=tokens, mask=mask, cached=CACHED
    )
    return Ranks(results, {name: read_config(root / name) for name in folders})


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(ranks: Ranks, hf_folders: dict[str, Path], name: str) -> None:
    if name not in hf_folders:
        pytest.skip(f"../shared/data/weights/{name} is not here")
    with torch.no_grad():
        expected, _ = reference.hf_logits_and_loss(reference.hf_model(hf_folders[name]))
    for rank in ranks.results:
        assert reference.relative_difference(rank[name]["logits"], expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_sft_loss_equal_transformers(
    ranks: Ranks, hf_folders: dict[str, Path], name: str
) -> None:
    if name not in hf_folders:
        pytest.skip(f"../shared/data/weights/{name} is not here")
    model, config = reference.hf_model(hf_folders[name]), ranks.configs[name]
    reference.hf_logits_and_loss(model)[1].backward()
    pieces = [rank[name]["gradients"] for rank in ranks.results]
    expected = dict(reference.hf_gradients(model, config))
    assert set(expected) == set(pieces[0])
    for parameter, gradient in expected.items():
        own = [piece[parameter] for piece in pieces]
        whole = join(own, cut_of(parameter, config, len(own)))  # refuses copies that disagree
        assert reference.relative_difference(whole, gradient) < 1e-4, parameter


@pytest.mark.parametrize("way", ["padded", "token by token", "among others"])
def test_logprobs_do_not_depend_on_how_they_are_computed(ranks: Ranks, way: str) -> None:
    for rank in ranks.results:
        for name in CACHED:
            logprobs = rank[name]["cached"]
            torch.testing.assert_close(logprobs[way], logprobs["plain"], rtol=1e-6, atol=1e-5)
