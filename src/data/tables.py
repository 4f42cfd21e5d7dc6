"""Rows of a parquet file or of a directory written by Hugging Face `datasets`. The door to pyarrow."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from src.errors import UserError


def is_table(path: Path) -> bool:
    """Whether read_table() is the one to read this."""
    return path.is_dir() or path.suffix == ".parquet"


def read_table(path: Path) -> list[dict[str, object]]:
    """The rows in order. Raises UserError for a damaged file or a directory that is no saved dataset."""
    try:
        if path.is_dir():
            return [row for file in _arrow_files(path) for row in _read_stream(file)]
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as a table ({reason[:200]})") from None


def _arrow_files(folder: Path) -> list[Path]:
    """The data files of Dataset.save_to_disk(), or the parquet files of a downloaded dataset, in order."""
    files = sorted(folder.glob("*.arrow")) or sorted(folder.glob("*.parquet"))
    if not files:
        splits = sorted(path.parent.name for path in folder.glob("*/*.arrow"))
        hint = (
            f"it holds the splits {', '.join(dict.fromkeys(splits))}; name one of them"
            if splits
            else ("expected *.arrow or *.parquet files, as datasets.Dataset.save_to_disk writes them")
        )
        raise UserError(f"{folder} is a directory without rows: {hint}")
    return files


def _read_stream(path: Path) -> list[dict[str, object]]:
    """An Arrow stream, the format of Dataset.save_to_disk(); or a parquet file."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all().to_pylist()
