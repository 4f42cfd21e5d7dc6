"""src/training/run.py: rows are encoded once for a run, by one process; no other rows are taken for them."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from solver_train import SolverTrainConfig
from src import load, parallel
from src.command.config import TokenizerFlags
from src.data.encoded_rows import Fill, Sample
from src.data.encoding import Encoded
from src.data.examples import Chat, Instruction, Pair, StepLabels
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.training import run
from src.training.reward_model import label_dataset, pair_dataset
from src.training.run import KeptRows, Run
from src.training.sft import sft_dataset
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.tiny import write_tokenizer

SAMPLES: list[Sample] = [(Encoded([1, n, 2], 1), Encoded([1, n], 1, (math.nan,))) for n in range(1000)]


def filling(samples: list[Sample] = SAMPLES, killed: bool = False) -> Fill:
    def fill(add: object) -> str:
        for sample in samples:
            add(sample)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{len(samples)} samples"

    return fill


def unasked(add: object) -> str:
    raise AssertionError("the rows were encoded again")


def in_memory(fill: Fill) -> tuple[list[Sample], str]:
    samples: list[Sample] = []
    return samples, fill(samples.append)


def test_rows_of_a_file_equal_those_in_memory(tmp_path: Path, folders: Folders) -> None:
    tokenizer = load.load_tokenizer(folders.one, TokenizerFlags(chat_template="llama-2"))
    chat = [{"role": role, "content": text} for role, text in (("user", "1+1="), ("assistant", "2")) * 2]
    rows = [Instruction("1+1=", ["2", "#### 2"]), Instruction("2+2=", ["4"]), Chat("f, row 1", chat)]
    judged = [StepLabels("1+1=", ["a", "b", "c"], [1.0, None, 1 / 3]), StepLabels("2+2=", ["#### 4"], [0.0])]
    pairs = [Pair("1+1=", ["2", "#### 2"], ["3"])]
    options = {"max_seq_len": 200, "source": "rows"}
    for number, make in enumerate((
        lambda keep: sft_dataset(rows, tokenizer, keep=keep, **options),
        lambda keep: label_dataset(judged, tokenizer, keep=keep, **options)[0],
        lambda keep: pair_dataset(pairs, tokenizer, keep=keep, **options),
    )):
        kept, expected = make(KeptRows(tmp_path / f"{number}.ids", "one")), make(in_memory)
        assert repr(list(kept.samples)) == repr(expected.samples) and kept.report == expected.report


def test_only_the_same_undamaged_rows_are_taken(tmp_path: Path) -> None:
    keep = KeptRows(tmp_path / "train.ids", "one")
    assert keep(filling())[1] == "1000 samples"
    found, said = keep(unasked)
    assert repr(list(found)) == repr(SAMPLES) and said == "1000 samples"
    assert len(keep._replace(identity="other")(filling(SAMPLES[:9]))[0]) == 9
    assert len(found) == 1000 and repr(found[999]) == repr(SAMPLES[999])  # who maps the old file goes on with it
    keep(filling())
    for damage in (lambda data: data[:-4], lambda data: b"\1" + data[1:], lambda data: b""):
        keep.path.write_bytes(damage(keep.path.read_bytes()))
        with pytest.raises(AssertionError):
            keep(unasked)
        assert len(keep(filling())[0]) == 1000
    (tmp_path / "train.json").write_text("{")
    assert len(keep(filling())[0]) == 1000


def test_what_a_killed_or_failing_writer_leaves_is_nothing(tmp_path: Path) -> None:
    keep = KeptRows(tmp_path / "train.ids", "one")
    if not (child := os.fork()):
        keep(filling(killed=True))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["train.partial"]
    with pytest.raises(AssertionError):
        keep(unasked)
    assert not list(tmp_path.iterdir())
    assert len(keep(filling())[0]) == 1000 and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, fill: Fill) -> str:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(run, "write", full)
    full = r"train.ids: no space left on device in the middle of writing, with [\d,]+ bytes free; --dry_run"
    with pytest.raises(UserError, match=full):
        KeptRows(tmp_path / "train.ids", "one")(filling())
    assert not list(tmp_path.iterdir())


def ranks_share(path: str) -> dict[str, object]:
    """What a rank finds; only the first may encode, which takes a second."""
    def fill(add: object) -> str:
        assert parallel.rank() == 0
        time.sleep(1)
        return filling()(add)

    return {"rows": repr(list(KeptRows(Path(path), "one")(fill)[0]))}


def test_two_ranks_share_what_one_has_encoded(tmp_path: Path) -> None:
    found = run_ranks(2, "tests.training.test_run_rows:ranks_share", tmp_path, path=str(tmp_path / "train.ids"))
    assert [rank["rows"] for rank in found] == [repr(SAMPLES)] * 2


def test_data_tokenizer_and_flags_make_other_rows(tmp_path: Path, folders: Folders, tokenizer: Tokenizer) -> None:
    data, other = tmp_path / "rows.json", tmp_path / "other.json"
    data.write_text(json.dumps([{"instruction": "1+1=", "output": "2"}]))
    other.write_text(json.dumps([{"instruction": "1+1=", "output": "3"}]))
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer", "abc0123456789+=#")

    def identity(**flags: object) -> str:
        config = SolverTrainConfig(**{
            "ckpt_dir": folders.one, "save_dir": str(tmp_path / "out"), "train_file": str(data), **flags})
        return Run(config, "solver_train", tokenizer, load.load_config(config.ckpt_dir)).keep("train").identity

    same = [identity(), identity(lr=1.0), identity(max_batch_size=1, epochs=3)]
    others = [identity(train_file=str(other)), identity(max_seq_len=9), identity(loss_on="all"),
              identity(truncation="left"), identity(tokenizer_file=str(tmp_path / "tokenizer"))]
    assert len(set(same)) == 1 and len({same[0], *others}) == 6
