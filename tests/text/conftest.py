"""A folder with a small tokenizer of each kind."""

from pathlib import Path

import pytest

from src.text.tokenizer import Tokenizer
from tests.text.files import WRITERS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a directory that holds such a tokenizer."""
    made = {}
    for kind, write in WRITERS.items():
        made[kind] = tmp_path_factory.mktemp("tokenizer")
        write(made[kind])
    return made


@pytest.fixture(scope="session")
def opened(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """Kind -> that tokenizer, without a chat template."""
    return {kind: Tokenizer(folder) for kind, folder in folders.items()}
