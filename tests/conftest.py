"""The tiny checkpoints that several tests share."""

from pathlib import Path
from typing import NamedTuple

import pytest

import checkpoint_split
from src import assemble, parallel
from src.text.tokenizer import Tokenizer
from tests.tiny import make_verifier, split, write_hf_llama

TOY_BASE = Path(__file__).parents[1] / "dataset" / "toy" / "base"


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


@pytest.fixture(scope="session")
def toy_tokenizer() -> Tokenizer:
    return Tokenizer(TOY_BASE)


@pytest.fixture(scope="session")
def code_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy's base with the markers of solutions with code."""
    folder = tmp_path_factory.mktemp("code") / "base"
    checkpoint_split.main(str(TOY_BASE), str(folder), 1, dtype="float32", code_tokens=True)
    return str(folder)


@pytest.fixture(scope="session")
def code_tokenizer(code_base: str) -> Tokenizer:
    """Its tokenizer; the checkpoint says which form it writes."""
    return assemble.load_tokenizer(code_base)


@pytest.fixture
def tokenizer(folders: Folders) -> Tokenizer:
    return assemble.load_tokenizer(folders.one)
