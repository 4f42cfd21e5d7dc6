"""src/data/rows.py: parquet files and directories of Hugging Face `datasets` give the rows that json gives."""

import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from src.data.examples import Chat, Instruction, read_instructions
from src.errors import UserError

ROWS = [{"instruction": f"{n}+1=", "output": [str(n + 1), "so"]} for n in range(5)]
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_json(tmp_path / "rows.jsonl")
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    expected = [Instruction(row["instruction"], row["output"]) for row in ROWS]
    for name in ("rows.parquet", "rows.jsonl", "saved"):
        assert list(read_instructions(str(tmp_path / name))) == expected


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
