"""src/jsonfile.py: every way in which a json text or file can be wrong is one UserError that names the place."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src import jsonfile
from src.errors import UserError
from src.jsonfile import parse, read_json, read_rows, write_json


def rows(path: Path) -> list[object]:
    """Every row of a file without its place."""
    return [values for _, values in read_rows(path)]


def test_values_of_every_kind() -> None:
    assert parse('{"a": [1, 2.5, null, "\\u00e9 \\ud83d\\ude00"]}', "x") == {"a": [1, 2.5, None, "é 😀"]}
    assert parse(b"\xef\xbb\xbf[1]", "x", list) == parse("\ufeff[1]", "x", list) == [1]
    assert parse('{"a": 1, "a": 1}', "x") == {"a": 1}  # said twice, but nothing is lost
    assert parse("NaN", "x", float) != 0
    deep = "[" * 100 + "]" * 100
    json.dumps(parse(deep, "x", list))


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    values = {"auc": float("nan"), "curve": [1, 0.5, (float("inf"),)], 3: {"kept": -0.0}}
    write_json(tmp_path / "x.json", values)
    strict = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert strict == {"auc": None, "curve": [1, 0.5, [None]], "3": {"kept": 0.0}}


WRONG = {
    "": "x: not valid json",
    '{"a": ': "x: not valid json (Expecting value)",
    '{\n"a": 1,\n}': f"x, line {3 if sys.version_info < (3, 13) else 2}: not valid json",
    '{"a": 1} {}': "x: not valid json (Extra data)",
    '{"a": 01}': "x: not valid json",
    "{'a': 1}": "x: not valid json",
    "\0" * 50: "x: not valid json",
    "[" * 100_000: "x: nested more than 100 deep",
    '{"a":' * 100_000: "x: nested more than 100 deep",
    '{"a":' * 101 + "1" + "}" * 101: "x: nested more than 100 deep",
    '{"a": ' + "9" * 5000 + "}": "x: a whole number of more than 4,300 digits",
    '{"a": -' + "9" * 5000 + "}": "x: a whole number of more than 4,300 digits",
    '{"a": [{"b": 1, "b": 2}]}': "x: the key 'b' stands twice in one object, with two values",
    '{"a": "b \\ud800"}': "x: a lone surrogate, which is no Unicode, stands behind '{\"a\": \"b '",
    '{"\\udfff": 1}': "x: a lone surrogate",
    "[1]": "x: found a list; expected a json object",
    "null": "x: found a NoneType; expected a json object",
    '"a"': "x: found a str; expected a json object",
}


@pytest.mark.parametrize("text, message", WRONG.items(), ids=lambda text: text[:20])
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    """As a text, as a file, and as a row of lines and of an array where the text is one."""
    with pytest.raises(UserError, match=re.escape(message)):
        parse(text, "x")
    with pytest.raises(UserError, match=re.escape(message)):
        parse(text.encode(), "x")
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_json(path)
    if text.strip() and "\n" not in text:
        what = message.removeprefix("x: ").split(" (")[0].split(" stands behind")[0]
        path.write_text('{"a": 1}\n' + text)
        with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {what}")):
            rows(path)
        path.write_text('[{"a": 1},\n' + text + "]")
        with pytest.raises(UserError, match=f"{path}, row [23](, line 2)?: "):
            rows(path)


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), '{"a": "é"}'.encode("latin-1")):
        path.write_bytes(data)
        for read in (read_json, rows):
            with pytest.raises(UserError, match=r"x(, line 1)?: not UTF-8 \(byte \d\)"):
                read(path)
    path.write_bytes(b'[{"a": 1}, {"a": "\xff"}]')
    with pytest.raises(UserError, match="x, row 1, line 1: not UTF-8 here or later"):
        rows(path)


@pytest.mark.parametrize(("head", "what"), [
    # mtime: the bytes name the test, and every worker must name it alike
    (gzip.compress(b'{"a": 1}', mtime=0), "compressed (gzip); unpack it first"), (b"PK\x03\x04..", "compressed (zip)"),
    (b"(\xb5/\xfd..", "compressed (zstd)"), (b"BZh9..", "compressed (bzip2)"), (b"PAR1..", "a parquet file; rename it"),
])
def test_files_of_other_kinds_are_called_by_their_names(tmp_path: Path, head: bytes, what: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(head)
    with pytest.raises(UserError, match=re.escape(f"{path} is {what}")):
        rows(path)


@pytest.mark.parametrize("text", ["instruction,output\n1,2", '{\n "a": 1\n}', "- a: 1", "{'a': 1}", '"a"'])
def test_a_file_without_a_good_row_is_told_what_rows_are(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match="x, line 1: .*; expected one object a line, or an array of objects"):
        rows(path)
    path.write_text('{"a": 1}\n' + text)
    with pytest.raises(UserError, match=r"x, line 2: (?!.*expected one object a line)"):
        rows(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        tmp_path / "none": "none does not exist",
        tmp_path: "is a directory; expected a file",
        tmp_path / "pipe": "pipe is a pipe; expected a file",
        Path("/dev/zero"): "/dev/zero is a device; expected a file",
        tmp_path / "loop": "loop' cannot be read",
        tmp_path / ("n" * 300): "cannot be read (File name too long)",
        "a\0b": "'a\\x00b' cannot be read (",  # in words that differ by Python's version
    }.items():
        for read in (read_json, rows):
            with pytest.raises(UserError, match=re.escape(message)):
                read(path)


@pytest.mark.parametrize(
    "text",
    ["[]", "", " [ ]\n", '[{"a": 1}]',
     '\ufeff[{"a": 1},\r\n {"a": [2]}]\n\n', '{"a": 1}\n\n \r\n{"a": [2]}', '\ufeff{"a": 1}\n'],
)
def test_rows_are_what_json_says(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text, newline="")
    plain = text.removeprefix("\ufeff")
    array = plain.strip().startswith("[")
    assert rows(path) == (json.loads(plain) if array else [json.loads(x) for x in plain.split("\n") if x.strip()])


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1},]', "[,]", '[{"a": 1} {"a": 2}]', '[{"a": 1}]]', '[{"a": 1}]\n{"a": 2}', "["]
)
def test_a_torn_array_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x, row [123], line [12]: not valid json"):
        rows(path)


@pytest.mark.parametrize("as_text", [json.dumps, lambda found: "\n".join(map(json.dumps, found))])
def test_a_file_much_longer_than_its_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_text: Callable[[object], str]
) -> None:
    monkeypatch.setattr(jsonfile, "MAX_ROW", 64)
    path, found = tmp_path / "x", [{"n": n, "t": "x" * (n % 40)} for n in range(200)]
    path.write_text(as_text(found))
    assert rows(path) == found
    for long in ({"t": "x" * 64}, {"t": [1] * 40}, {"t": {str(n): n for n in range(20)}}):
        for place in (0, 100, 199):
            path.write_text(as_text([*found[:place], long, *found[place:]]))
            with pytest.raises(UserError, match=rf"x, (row|line) {place + 1}: the row has more than"):
                rows(path)


@pytest.mark.parametrize("start, unit", [('{"a": "', "x"), ('[{"a": [', "{},")])
def test_a_row_of_200_mb_takes_little_memory(tmp_path: Path, start: str, unit: str) -> None:
    """In a GiB of address space, of which Python and its libraries take a part."""
    path = tmp_path / "x"
    with path.open("w") as file:
        file.write(start)
        for _ in range(25):
            file.write(unit * (8_000_000 // len(unit)))
    code = f"""import resource
from src.jsonfile import read_rows
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try: list(read_rows({str(path)!r}))
except Exception as problem: print(type(problem).__name__, problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.match(rf"UserError {path}, (row|line) 1: the row has more than 16 MiB", done.stdout)
