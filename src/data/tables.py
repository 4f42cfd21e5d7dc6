"""Rows of a parquet file or of a directory written by Hugging Face `datasets`. The door to pyarrow."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from src.errors import UserError
from src.jsonfile import MAX_ROW, check_file


def is_table(path: Path) -> bool:
    """Whether read_table() is the one to read this."""
    return path.is_dir() or path.suffix == ".parquet"


def read_table(path: Path) -> list[dict[str, object]]:
    """The rows in order. Raises UserError for a damaged file, a directory that is no saved dataset, or a huge row."""
    try:
        files = _arrow_files(path) if path.is_dir() else [path]
        return [row for file in files for row in _read_file(file)]
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


def _read_file(path: Path) -> list[dict[str, object]]:
    """A parquet file, or an Arrow stream, the format of Dataset.save_to_disk()."""
    check_file(path)
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        _check_rows(table, path)
        return table.to_pylist()
    with pyarrow.memory_map(str(path)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        _check_rows(table, path)
        return table.to_pylist()


def _check_rows(table: pyarrow.Table, path: Path, first: int = 1) -> None:
    """Raise UserError for a row that is longer than any row of json may be; they are searched for by halves."""
    if table.nbytes <= MAX_ROW:
        return
    if table.num_rows == 1:
        raise UserError(f"{path}, row {first}: the row has more than {MAX_ROW >> 20} MiB")
    half = table.num_rows // 2
    _check_rows(table[:half], path, first)
    _check_rows(table[half:], path, first + half)
