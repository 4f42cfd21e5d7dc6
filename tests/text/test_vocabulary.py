"""src/text/vocabulary.py: files of every kind, ids as others give them, and files that are damaged.

SPLITRL_ALL_TEXTS=1 compares 2,000 texts of GSM8K and MATH with transformers instead of 200, and Llama 3's file too,
which transformers needs seconds to convert.
"""

import base64
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.text.vocabulary import HfTokenizers, SentencePiece, Tiktoken
from tests.reference import shared
from tests.text.files import TEXTS, WRITERS, write_json, write_merges, write_ranks

KINDS = list(WRITERS)
ALL_TEXTS = os.environ.get("SPLITRL_ALL_TEXTS") == "1"


def opens_as(path: Path, kind: str) -> bool:
    """Whether what a path means is taken for a file of this kind."""
    classes = {"sentencepiece": SentencePiece, "tiktoken": Tiktoken}
    return type(Tokenizer(path).vocabulary) is classes.get(kind, HfTokenizers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_read_off_the_content(folders: dict[str, Path], kind: str) -> None:
    assert opens_as(folders[kind], kind)


def test_a_name_says_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS[:2]:
        shutil.copyfile(folders[kind] / "tokenizer.model", tmp_path / "vocabulary.bin")
        assert opens_as(tmp_path / "vocabulary.bin", kind)
    shutil.copytree(folders["tokenizer.json"], tmp_path / "named")
    (tmp_path / "named/tokenizer.json").rename(tmp_path / "named/tokenizer.model")
    assert opens_as(tmp_path / "named", "tokenizer.json")


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer(folders[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_tokenizer_json_gives_the_ids_of_transformers(folders: dict[str, Path]) -> None:
    found = Tokenizer(folders["tokenizer.json"])
    expected = PreTrainedTokenizerFast(tokenizer_file=str(folders["tokenizer.json"] / "tokenizer.json"))
    for text in [*TEXTS, "<think>12 + 7</think>"]:
        assert found.encode(text) == expected.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_merges_give_the_ids_of_transformers(tmp_path: Path, tokenizer_class: str) -> None:
    write_merges(tmp_path, tokenizer_class)
    found, expected = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(expected).__name__.startswith(tokenizer_class)
    for text in [*TEXTS, "e\u0301", "<think>12 + 7</think>"]:
        assert found.encode(text) == expected.encode(text, add_special_tokens=False), text


def test_three_digits_are_one_stretch_for_llama_3_and_three_for_qwen(tmp_path: Path) -> None:
    ids = {}
    for n in (128000, 151643):
        tokenizer = Tokenizer(write_ranks(tmp_path / f"{n}.tiktoken", n))
        ids[n] = tokenizer.encode("1234")
        assert tokenizer.vocab_size == n + {128000: 256, 151643: 208}[n]
    one_byte_each = [ord(digit) for digit in "1234"]
    assert ids[151643] == one_byte_each
    pair = 256 + 256 * ord("1") + ord("2")  # merged before the third digit, and the fourth stands apart
    assert ids[128000][0] >= pair and len(ids[128000]) < 4 and ids[128000][-1] == ord("4")


@pytest.mark.parametrize(
    "name, cases", [("llama2", "llama2"), ("llama3", "llama3"), ("qwen2", "qwen2"), ("qwen1", "qwen2")]
)
def test_the_47_published_cases(name: str, cases: str) -> None:
    tokenizer = Tokenizer(shared(f"tokenizers/{name}"))
    texts = shared("tokenizers/cases.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = shared(f"tokenizers/{cases}/cases.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text)
        assert ids == [int(number) for number in line.split()], text
        assert tokenizer.decode(ids) == text


def problem_texts() -> list[str]:
    """Problems and solutions of GSM8K and MATH, half each: 200, or 2,000 with SPLITRL_ALL_TEXTS=1."""
    n, texts = 500 if ALL_TEXTS else 50, []
    for file, keys in (
        ("gsm8k/test.jsonl", ("question", "answer")),
        ("math/test_5000.jsonl", ("problem", "solution")),
    ):
        with shared(file).open(encoding="utf-8") as lines:
            texts += [json.loads(line)[key] for line in itertools.islice(lines, n) for key in keys]
    return texts


@pytest.mark.parametrize("name", ["qwen2", "llama2", "mistral", *(["llama3"] if ALL_TEXTS else [])])
def test_problems_have_the_ids_of_transformers(name: str) -> None:
    folder = shared(f"tokenizers/{name}")
    library = LlamaTokenizer if name in ("llama2", "mistral") else AutoTokenizer
    expected, found = library.from_pretrained(folder), Tokenizer(folder)
    compared = 0
    for text in problem_texts():
        ids = found.encode(text)
        assert found.decode(ids) == text
        # transformers 5 rebuilds merges from sentencepiece's scores and joins two spaces, which sentencepiece does not
        if library is AutoTokenizer or "  " not in text:
            assert ids == expected.encode(text, add_special_tokens=False), text
            compared += 1
    assert compared >= (1600 if ALL_TEXTS else 140)


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """A way to damage a text file of a tokenizer."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return damage


def edit(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """A way to damage a json file of a tokenizer."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        change(values)
        write_json(folder / name, values)

    return damage


DAMAGES = [
    ("sentencepiece", lambda f: (f / "tokenizer.model").write_bytes(b"\x0a\x05hello"), "is no tokenizer"),
    ("sentencepiece", lambda f: (f / "tokenizer.model").write_bytes(b""), "is no tokenizer"),
    (
        "sentencepiece",
        lambda f: (f / "tokenizer.model").write_bytes((f / "tokenizer.model").read_bytes()[:-9]),
        "is no tokenizer: expected a sentencepiece model, .*; it may be truncated",
    ),
    (
        "sentencepiece",
        lambda f: (f / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "is a git-lfs pointer",
    ),
    (
        "tiktoken",
        rewrite("tokenizer.model", lambda text: text.replace(" 77\n", " 76\n", 1)),
        "line 78: found rank 76, token b'M'; expected rank 77",
    ),
    (
        "tiktoken",
        rewrite("tokenizer.model", lambda text: text.replace("TQ== 77\n", "QQ== 77\n", 1)),
        "line 78: found rank 77, token b'A'; expected rank 77 and a token that did not stand before",
    ),
    (
        "tiktoken",
        rewrite("tokenizer.model", lambda text: text[:30000] + "%" + text[30001:]),
        r"line \d+: expected a base64 token and its rank",
    ),
    (
        "tiktoken",
        rewrite("tokenizer.model", lambda text: text[: text.index(" 1000\n")]),
        "line 1001: expected a base64 token and its rank",
    ),
    (
        "tiktoken",
        rewrite("tokenizer.model", lambda text: text[: text.index(" 1000\n") + 6]),
        "holds 1001 tiktoken ranks; known are 128000 and 151643",
    ),
    (
        "tiktoken",
        lambda f: (f / "tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n"),
        "has no token for byte 0",
    ),
    ("tokenizer.json", rewrite("tokenizer.json", lambda text: text[:-50]), ": not valid json"),
    ("tokenizer.json", rewrite("tokenizer.json", lambda text: "{" * 100000), ": not valid json"),
    (
        "tokenizer.json",
        edit("tokenizer.json", lambda v: v["model"]["merges"].append(["zz", "zz"])),
        "is no readable tokenizer.json .*out of vocabulary",
    ),
    (
        "tokenizer.json",
        edit("tokenizer.json", lambda v: v["model"]["vocab"].update(a=20)),
        "both have id 20; the file is damaged",
    ),
    (
        "tokenizer.json",
        edit("tokenizer.json", lambda v: v["model"].pop("merges")),
        "is no readable tokenizer.json",
    ),
    (
        "vocab.json and merges.txt",
        lambda f: (f / "merges.txt").unlink(),
        "merges.txt is missing; vocab.json alone",
    ),
    ("vocab.json and merges.txt", lambda f: (f / "merges.txt").write_text("#version\n"), "holds no merges"),
    (
        "vocab.json and merges.txt",
        lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe\x00"),
        "merges.txt is not UTF-8",
    ),
    (
        "vocab.json and merges.txt",
        rewrite("merges.txt", lambda text: text + "zz zz\n"),
        r"merges.txt, line \d+: 'zz zz' merges pieces that vocab.json does not have",
    ),
    (
        "vocab.json and merges.txt",
        edit("vocab.json", lambda v: v.update(a=20)),
        "both have id 20; the file is damaged",
    ),
    ("vocab.json and merges.txt", edit("vocab.json", lambda v: v.update(a="x")), "token 'a' has id 'x'"),
    ("vocab.json and merges.txt", edit("vocab.json", lambda v: v.pop("Ġ")), "has no token for the byte 'Ġ'"),
    (
        "vocab.json and merges.txt",
        lambda f: (f / "tokenizer_config.json").unlink(),
        "names tokenizer_class None; expected one of Qwen2Tokenizer, GPT2Tokenizer",
    ),
    ("vocab.json and merges.txt", lambda f: (f / "vocab.json").write_text("[]"), "is no tokenizer"),
]


@pytest.mark.parametrize("kind, damage, message", DAMAGES, ids=[message[:40] for *_, message in DAMAGES])
def test_a_damaged_file_is_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, kind: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders[kind], folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as problem:
        Tokenizer(folder)
    assert "\n" not in str(problem.value) and str(folder) in str(problem.value)


@pytest.mark.parametrize("kind, tries", [("sentencepiece", 150), ("tokenizer.json", 150), (KINDS[3], 60)])
def test_mutated_files_open_or_are_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, tries: int
) -> None:
    for attempt in range(tries):
        rng = random.Random(f"{kind} {attempt}")
        folder = tmp_path / str(attempt)
        shutil.copytree(folders[kind], folder)
        path = rng.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 2, 5))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            tokenizer = Tokenizer(folder)
            tokenizer.decode(tokenizer.encode("12 + 7 = <|im_end|>"))
        except UserError as problem:
            assert "\n" not in str(problem), problem
