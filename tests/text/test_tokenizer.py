"""src/text/tokenizer.py: round trips, real vocabularies, and files that are none."""

from pathlib import Path

import pytest

from src.errors import UserError
from src.text.tokenizer import Tokenizer
from tests.reference import shared
from tests.tiny import write_tokenizer


def test_round_trip_and_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in ("", "1+2=3", "a\n\n#### 5", "  a  b "):
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_ids_of_a_padded_vocabulary_vanish(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert tokenizer.vocab_size < 64
    assert tokenizer.decode([*tokenizer.encode("1+2"), tokenizer.vocab_size, 63]) == "1+2"


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        write_tokenizer(tmp_path).encode("a\ud800")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer.model does not exist; give checkpoint_split.py"):
        Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_llama_2_gives_the_expected_ids_and_every_text_back() -> None:
    tokenizer = Tokenizer(shared("tokenizers/llama2/tokenizer.model"))
    texts = shared("tokenizers/cases.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = shared("tokenizers/llama2/cases.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text)
        assert ids == [int(number) for number in line.split()], text
        assert tokenizer.decode(ids) == text
