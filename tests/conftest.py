"""The tiny checkpoints that several tests share."""

from pathlib import Path
from typing import NamedTuple

import pytest

from src import assemble, parallel
from src.text.tokenizer import Tokenizer
from tests.tiny import make_verifier, split, write_hf_llama


class Folders(NamedTuple):
    """One random model in several directories: for transformers, in one and two shards, and as a verifier."""

    hf: Path
    one: str
    two: str
    verifier: str
    verifier_two: str


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Written once for all tests; nothing in them may be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    hf = write_hf_llama(folder / "hf")
    parallel.start()
    one = split(hf, folder / "one")
    verifier = make_verifier(one, folder / "verifier", mean=0.5, std=2.0)
    return Folders(
        hf, one, split(hf, folder / "two", 2), verifier, split(Path(verifier), folder / "verifier_two", 2)
    )


@pytest.fixture
def tokenizer(folders: Folders) -> Tokenizer:
    return assemble.load_tokenizer(folders.one)
