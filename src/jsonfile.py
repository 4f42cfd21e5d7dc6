"""The one reader of json, whose complaints say where in a file; and files that are written whole or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO, TypeVar

from src.errors import UserError

MAX_ROW = 16 * 2**20  # characters; a hundred times the longest published row, and still cut into tokens in seconds
MAX_FILE = 512 * 2**20  # bytes of a file that is one value; the largest tokenizers have 35 MB
MAX_DEPTH = 100  # so that whoever walks over a value, prints or writes it, stays within the stack

T = TypeVar("T")
BOM = b"\xef\xbb\xbf"
_OTHERS = {  # what files of other kinds begin with, and what to do about each
    b"\x1f\x8b": "compressed (gzip); unpack it first",
    b"BZh": "compressed (bzip2); unpack it first",
    b"\xfd7zXZ": "compressed (xz); unpack it first",
    b"(\xb5/\xfd": "compressed (zstd); unpack it first",
    b"PK\x03\x04": "compressed (zip); unpack it first",
    b"PAR1": "a parquet file; rename it to .parquet",
}
_LFS = b"version https://git-lfs"
_ROWS = "expected one object a line, or an array of objects"
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str | bytes, where: str, kind: type[T] = dict) -> T:
    """The value of a json text, of the kind that is expected. `where` begins the message of the UserError. A byte order
    mark is skipped. NaN and Infinity are read, since Python writes them: who wants a number checks it."""
    if isinstance(text, bytes):
        text = _decoded(text, where)
    try:
        value = _DECODER.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as problem:
        line = f", line {problem.lineno}" if getattr(problem, "lineno", 1) > 1 else ""
        raise UserError(f"{where}{line}: {_reason(problem)}") from None
    return _checked(value, text, where, kind)


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{where}: not UTF-8 (byte {problem.start}); convert it first") from None


def read_text(path: str | Path) -> str:
    """A text file without its byte order mark. Raises UserError that names it."""
    check_file(path)
    return _decoded(Path(path).read_bytes(), str(path))


def read_json(path: str | Path) -> dict[str, object]:
    """The object in a json file. Raises UserError that names the file."""
    check_file(path)
    if Path(path).stat().st_size > MAX_FILE:
        raise UserError(f"{path} has more than {MAX_FILE >> 20} MiB; is it the file you mean?")
    return parse(Path(path).read_bytes(), str(path))


def check_file(path: str | Path) -> None:
    """Raise UserError unless this is a file that can be opened and has an end; a pipe would be waited for."""
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISREG(mode):
            with Path(path).open("rb") as file:
                head = file.read(len(_LFS))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as problem:  # ValueError: NUL in the name
        raise UserError(f"{str(path)!r} cannot be read ({getattr(problem, 'strerror', problem)})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}; expected a file")
    if head == _LFS:
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` where it is from")


def write_json(path: str | Path, values: Mapping[str, object]) -> None:
    """Write a json object, whole or not at all; numbers that are not finite as null."""
    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """The value with null for the numbers that json has no word for: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it to the disk and rename it: a kill leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def telling_full_disk(place: Path, advice: str) -> Iterator[None]:
    """Raise UserError with the advice where the disk of a file or directory fills up while it is written."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(place if place.is_dir() else place.parent).free
        raise UserError(f"{place}: {problem.strerror.lower()} in the middle of writing, with {free:,} bytes free; "
                        f"{advice}") from None


def flush(path: Path) -> None:
    """Return once a file's bytes, or a directory's entries, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _refuse(problem: UserError) -> None:
    raise problem


def read_rows(
    path: str | Path, refuse: Callable[[UserError], None] = _refuse
) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a json array or of a jsonl file, each after what names it: `FILE, row N` or `FILE, line N`.

    Blank lines are skipped. No more than two times MAX_ROW is held at once. Raises UserError, also for a longer row.
    refuse: called with the complaint about one row; if it returns, the next rows follow. An array that is no json, of
    which no next row can be found, raises all the same.
    """
    check_file(path)
    with Path(path).open("rb") as file:
        head = file.read(4096)
    for start, what in _OTHERS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {what}; {_ROWS}")
    is_array = head.removeprefix(BOM).lstrip().startswith(b"[")
    return _array_rows(path, refuse) if is_array else _line_rows(path, refuse)


def _line_rows(path: str | Path, refuse: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, object]]]:
    with Path(path).open("rb") as file:
        number, advice = 0, f"; {_ROWS}"  # which a file with a good row follows
        while line := file.readline(MAX_ROW + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_ROW:
                refuse(UserError(_too_long(where)))
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW)
                continue
            if not (line := line.removeprefix(BOM).strip()):
                continue
            try:
                row = parse(line, where)
            except UserError as problem:
                refuse(UserError(f"{problem}{advice}"))
                continue
            advice = ""
            yield where, row


def _array_rows(path: str | Path, refuse: Callable[[UserError], None]) -> Iterator[tuple[str, dict[str, object]]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        window = _Window(file, str(path))
        window.take("[")
        while window.peek() != "]":
            if window.number > 1:
                window.take(",")
            where = f"{path}, row {window.number}"
            value, text = window.value(where)
            try:
                row = _checked(value, text, where, dict)
            except UserError as problem:
                refuse(problem)
                continue
            yield where, row
        window.take("]")
        if window.peek():
            raise window.complaint("not valid json (something stands behind the array)")


class _Window:
    """The part of an array that is looked at: at least one row of the allowed length, at most two."""

    def __init__(self, file: TextIO, path: str) -> None:
        self.file, self.path = file, path
        self.text, self.place, self.ended = "", 0, False
        self.line, self.number = 1, 1  # where the text begins, and which row comes next

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while not self.ended and len(self.text) - self.place <= MAX_ROW:
            try:
                more = self.file.read(MAX_ROW)
            except UnicodeDecodeError:
                raise self.complaint("not UTF-8 here or later; convert it first") from None
            self.line += self.text.count("\n", 0, self.place)
            self.text, self.place, self.ended = self.text[self.place :] + more, 0, not more
        self.place = _SPACE.match(self.text, self.place).end()
        return self.text[self.place : self.place + 1]

    def take(self, sign: str) -> None:
        """Step over the next character, which must be this one. Raises UserError."""
        if self.peek() != sign:
            raise self.complaint(f"not valid json (expected {sign!r}, found {self.peek() or 'the end of the file'!r})")
        self.place += 1

    def value(self, where: str) -> tuple[object, str]:
        """The next value and its text. Raises UserError."""
        self.peek()
        start = self.place
        try:
            found, self.place = _DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError) as problem:
            at = getattr(problem, "pos", start)
            if not self.ended and (at - start >= MAX_ROW or "Unterminated string" in str(problem)):
                raise UserError(_too_long(where)) from None
            self.place = at
            raise self.complaint(_reason(problem)) from None
        if self.place - start > MAX_ROW:
            raise UserError(_too_long(where))
        self.number += 1
        return found, self.text[start : self.place]

    def complaint(self, what: str) -> UserError:
        """What is wrong, with the row and the line where it is."""
        line = self.line + self.text.count("\n", 0, self.place)
        return UserError(f"{self.path}, row {self.number}, line {line}: {what}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object. Raises ValueError for a key with two values, of which any reader would lose one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise ValueError(f"the key {key!r} stands twice in one object, with two values")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _checked(value: object, text: str, where: str, kind: type[T]) -> T:
    """A value that was read from this text. Raises UserError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level = [inner for container in containers for inner in container]
    if level:
        raise UserError(f"{where}: {_reason(RecursionError())}")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as problem:
            before = problem.object[max(0, problem.start - 40) : problem.start]
            raise UserError(f"{where}: a lone surrogate, which is no Unicode, stands behind {before!r}") from None
    if not isinstance(value, kind):
        names = {dict: "a json object", list: "a list"}
        found = names.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{where}: found {found}; expected {names.get(kind, f'a {kind.__name__}')}")
    return value


def _reason(problem: ValueError | RecursionError) -> str:
    """What is wrong, in words that are not about Python."""
    if isinstance(problem, RecursionError):
        return f"nested more than {MAX_DEPTH} deep"
    if isinstance(problem, json.JSONDecodeError):
        return f"not valid json ({problem.msg})"
    if "digits" in str(problem):
        return "a whole number of more than 4,300 digits"
    return str(problem)


def _too_long(where: str) -> str:
    return f"{where}: the row has more than {MAX_ROW >> 20} MiB; {_ROWS}"
