"""The tiny checkpoints that several tests share."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

import checkpoint_split
import solver_train
from src import load, parallel, runlog
from src.text.tokenizer import Tokenizer
from tests.tiny import make_verifier, split, write_hf_llama

TOY_BASE = Path(__file__).parents[1] / "dataset" / "toy" / "base"

runlog.logger()  # it does not propagate; pytest's caplog listens to such a logger if it stands before a test begins


CODE_QUESTION = "Ana has 76 pears. She loses 20. She finds 4 bags of 3. How many pears are there now?"
CODE_BLOCKS = [
    {"type": "text", "content": "Left:"},
    {"type": "code", "content": "x=76-20\nprint(x)"},
    {"type": "execution", "content": "56\n"},
    {"type": "text", "content": "Then:"},
    {"type": "code", "content": "print(x+4*3)"},
    {"type": "execution", "content": "68\n"},
    {"type": "text", "content": "#### 68"},
]
CODE_SOLUTION = "".join(f"<|{block['type']}|>{block['content']}<|endofblock|>" for block in CODE_BLOCKS)


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
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(TOY_BASE), save_path=str(folder), n=1, dtype="float32", code_tokens=True
        )
    )
    return str(folder)


@pytest.fixture(scope="session")
def code_tokenizer(code_base: str) -> Tokenizer:
    """Its tokenizer; the checkpoint says which form it writes."""
    return load.load_tokenizer(code_base)


@pytest.fixture(scope="session")
def code_solver(code_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """That base, trained until it knows one solution with code by heart, and goes wrong in it one time in three."""
    folder = tmp_path_factory.mktemp("code-solver")
    wrong = [*CODE_BLOCKS[:4]]
    wrong += [
        block | {"content": block["content"].replace("*3", "*2").replace("8", "4")}
        for block in CODE_BLOCKS[4:]
    ]
    rows = [
        {"messages": [{"role": "user", "content": CODE_QUESTION}, {"role": "assistant", "content": blocks}]}
        for blocks in (CODE_BLOCKS, CODE_BLOCKS, wrong)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    flags = {"epochs": 40, "lr": 4e-3, "max_batch_size": 3}
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=code_base, save_dir=str(folder / "out"), train_file=str(folder / "train.json"), **flags
        )
    )
    return str(folder / "out")


@pytest.fixture
def tokenizer(folders: Folders) -> Tokenizer:
    return load.load_tokenizer(folders.one)
