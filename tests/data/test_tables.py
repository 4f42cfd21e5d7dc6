"""src/data/rows.py: parquet files and directories of Hugging Face `datasets` give the rows that json gives."""

import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from src.data.examples import Chat, read_instructions, read_prompts
from src.data.rows import read_rows
from src.errors import UserError

ROWS = [{"instruction": f"{n}+1=", "output": [str(n + 1), "so"]} for n in range(5)]
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_json(tmp_path / "rows.jsonl")
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    expected = [(row["instruction"], row["output"]) for row in ROWS]
    for name in ("rows.parquet", "rows.jsonl", "saved"):
        assert [row[:2] for row in read_instructions(str(tmp_path / name))] == expected


def test_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_list([{"messages": CHAT}]).to_parquet(path)
    assert list(read_instructions(str(path))) == [Chat(f"{path}, row 1", CHAT)]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rows.arrow").write_bytes(b"\xff" * 100)
    datasets.Dataset.from_list([{"messages": CHAT[:1]}]).to_parquet(tmp_path / "silent.parquet")
    datasets.Dataset.from_list([{"messages": "hi"}]).to_parquet(tmp_path / "text.parquet")
    for name, message in {
        "torn.parquet": "torn.parquet cannot be read as a table",
        "splits": "splits is a directory without rows: it holds the splits train; name one of them",
        "empty": "empty is a directory without rows: expected",
        "bad": "bad cannot be read as a table",
        "none.parquet": "none.parquet does not exist",
        "silent.parquet": "silent.parquet, row 1: the assistant says nothing",
        "text.parquet": "row 1: 'messages' must be a non-empty list",
    }.items():
        with pytest.raises(UserError, match=message):
            list(read_instructions(str(tmp_path / name)))


def test_a_directory_gives_the_rows_that_datasets_loads_from_it(tmp_path: Path) -> None:
    dataset, folder = datasets.Dataset.from_list(ROWS), str(tmp_path / "saved")
    dataset.save_to_disk(folder, num_shards=3)
    dataset.select([4, 2]).save_to_disk(folder, num_shards=1)  # the files of the first save stay
    loaded = datasets.load_from_disk(folder)
    loaded.map(lambda row: {"output": [*row["output"], "more"]})  # leaves a file beside them
    assert [row.values for row in read_rows(folder)] == list(loaded)
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UserError, match="which of its rows are meant"):
        list(read_rows(folder))


def test_files_of_several_splits_are_no_dataset(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    for number, (names, message) in enumerate({
        ("train-00000-of-00001", "test-00000-of-00001"): "of several splits, test-00000-of-00001.parquet, train-",
        ("gsm8k-train", "gsm8k-test"): "of several splits, gsm8k-test.parquet, gsm8k-train.parquet; name one",
        ("train-00001-of-00002",): "holds 1 data files, but train-00001-of-00002 is one of 2",
        ("train-00000-of-00001", "train-00000-of-00003"): "holds 2 data files, but train-00000-of-00001 is one of 1",
        ("train-00000-of-00002-6f8a", "train-00001-of-00002-3b2c"): "",
        ("0000", "0001"): "",
    }.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            table.to_parquet(folder / f"{name}.parquet")
        if message:
            with pytest.raises(UserError, match=message):
                list(read_rows(str(folder)))
        else:
            assert [row.values for row in read_rows(str(folder))] == ROWS * len(names)


@pytest.mark.parametrize("kind, labels", [
    (np.float32, ["0.1", "3", "0.33333334", "-2.5", "16777216"]), (np.float16, ["0.1", "3", "0.3333", "-2.5", "2048"])])
def test_numbers_of_few_bits_are_as_short_as_they_were_written(tmp_path: Path, kind: type, labels: list[str]) -> None:
    path, column = tmp_path / "rows.parquet", pyarrow.array(np.array(labels, kind))
    pyarrow.parquet.write_table(pyarrow.table({"instruction": labels, "label": column}), path)
    assert [prompt.label for prompt in read_prompts(str(path), need_label=True)] == labels
    twice = pyarrow.Table.from_arrays([column, column], names=["label", "label"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match="has the column 'label' twice"):
        list(read_rows(str(path)))


# after a file of 2,000 rows, one of 20,000 may add as much as a heap happens to grow by, not a part of the file
READ = """import sys
from pathlib import Path
from src.data.rows import read_rows
def held() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) // 1024
for path in sys.argv[1:]:
    print(max(held() for n, row in enumerate(read_rows(path)) if n % 500 == 0))
"""


def test_what_a_reader_holds_does_not_grow_with_the_file(tmp_path: Path) -> None:
    names = ("rows.jsonl", "rows.parquet", "saved")
    for n in (2_000, 20_000):
        (tmp_path / str(n)).mkdir()
        dataset = datasets.Dataset.from_dict({"instruction": [random.randbytes(1024).hex() for _ in range(n)]})
        dataset.to_json(tmp_path / str(n) / names[0])
        dataset.to_parquet(tmp_path / str(n) / names[1], batch_size=n)  # one group of rows
        dataset.save_to_disk(tmp_path / str(n) / names[2])
    for name in names:
        files = [str(tmp_path / str(n) / name) for n in (2_000, 20_000)]
        done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, check=True)
        small, large = map(int, done.stdout.split())
        assert large < small + 20, (name, small, large)  # MiB; the file has 40
