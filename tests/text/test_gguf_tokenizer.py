"""src/text/gguf_tokenizer.py: tokenizers into GGUF's keys and back."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from src.errors import UserError
from src.text import gguf_tokenizer
from src.text.extend import say_ends
from src.text.gguf_tokenizer import spaces_apart, tokenizer_metadata, write_tokenizer
from src.text.tokenizer import Tokenizer
from tests import reference, tiny
from tests.text.files import (
    CONTROL,
    TEXTS,
    byte_level,
    write_json,
    write_merges,
    write_ranks,
    write_sentencepiece,
    write_tokenizer_json,
)

MORE_TEXTS = [
    *TEXTS, "12345 + ½ = ٣ ４５", "He's   here\n\n\t\tNOW, isn'T he?", "<|im_start|>user<think>", "日本語 テスト 한국어"
]


def metadata_of(folder: Path, n_rows: int = 512, **changed: object) -> dict[str, object]:
    return {"general.architecture": "llama"} | tokenizer_metadata(folder, n_rows) | changed


def back(metadata: dict[str, object], folder: Path, n_rows: int = 512) -> Tokenizer:
    """The tokenizer of a file, opened."""
    folder.mkdir()
    write_tokenizer(metadata, folder, n_rows, "model.gguf")
    return Tokenizer(folder)


def assert_same(found: Tokenizer, expected: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = expected.encode(text)
        assert found.encode(text) == ids, text
        assert found.decode(ids) == expected.decode(ids), text
    for text in ("<|im_start|>user\nWhat?<|im_end|>\n", "<s> 12<think>34</s>"):
        assert found.encode_rendered(text) == expected.encode_rendered(text)
    assert (found.bos_id, found.eos_id, found.stop_ids) == (expected.bos_id, expected.eos_id, expected.stop_ids)
    assert expected.control.items() - {("<unk>", 0)} <= found.control.items()


def write_smollm(folder: Path) -> None:
    model = byte_level(CONTROL)
    digits = pre_tokenizers.Digits(individual_digits=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})


def write_merged(folder: Path, gemma: bool = False) -> None:
    """The tokenizer.json that transformers makes of a sentencepiece model, without the model."""
    (folder / "spm").mkdir()
    write_sentencepiece(folder / "spm", add_dummy_prefix=not gemma)
    name = "GemmaTokenizer" if gemma else "LlamaTokenizer"
    config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    write_json(folder / "spm" / "tokenizer_config.json", config | {"pad_token": "</s>"})
    AutoTokenizer.from_pretrained(folder / "spm").save_pretrained(folder)


WRITERS = {
    "sentencepiece": write_sentencepiece,
    "sentencepiece without user-defined pieces": lambda folder: write_sentencepiece(folder, user_defined_symbols=[]),
    "sentencepiece without prefix": lambda folder: write_sentencepiece(folder, add_dummy_prefix=False),
    "characters": tiny.write_tokenizer,
    "tokenizer.json": write_tokenizer_json,
    "smollm": write_smollm,
    "merges of Qwen": write_merges,
    "merges of GPT-2": lambda folder: write_merges(folder, "GPT2Tokenizer"),
    "merged": write_merged,
    "merged, of Gemma": lambda folder: write_merged(folder, gemma=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    (tmp_path / "first").mkdir()
    WRITERS[name](tmp_path / "first")
    found = back(metadata_of(tmp_path / "first"), tmp_path / "back")
    first = Tokenizer(tmp_path / "first")
    # transformers' form of a sentencepiece model puts a space before a text and none after a control token: no GGUF
    # file says that, so what follows such a token has its ids
    assert_same(found, first, [] if name == "merged" else MORE_TEXTS)
    for text in MORE_TEXTS if name == "merged" else []:
        ids = first.encode_rendered(f"<s>{text}")
        assert found.encode_rendered(f"<s>{text}") == ids, text
        assert found.decode(ids, show_control=True) == first.decode(ids, show_control=True), text
    texts = [text for text in MORE_TEXTS if not text.startswith(" ") and "<" not in text]  # transformers reads "<s>"
    say_ends(tmp_path / "back", "", {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")  # an export of it is for transformers
    for text in texts:
        assert theirs(text, add_special_tokens=False).input_ids == found.encode(text), text
    assert theirs.encode("<s>a</s>b", add_special_tokens=False) == found.encode_rendered("<s>a</s>b")
    assert theirs.encode("ab") == [*([] if found.bos_id is None else [found.bos_id]), *found.encode("ab")]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_that_llama_cpp_puts_otherwise_are_told(tmp_path: Path, scheme: str) -> None:
    merged(tmp_path, cut=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    assert metadata_of(tmp_path)["tokenizer.ggml.add_space_prefix"] is (scheme == "always")
    told = {"first": "but none after a control token", "always": "puts no space before a text that begins with one"}
    assert told.get(scheme, "") in spaces_apart(tmp_path) and bool(spaces_apart(tmp_path)) is (scheme in told)


def test_tiktoken_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    write_ranks(tmp_path / "first" / "tokenizer.model")
    metadata = metadata_of(tmp_path / "first", 128256)
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    found, first = back(metadata, tmp_path / "back", 128256), Tokenizer(tmp_path / "first")
    for text in MORE_TEXTS:
        assert found.encode(text) == first.encode(text), text
    assert (found.bos_id, found.eos_id, found.stop_ids) == (first.bos_id, first.eos_id, first.stop_ids)
    assert found.control == first.control


@pytest.mark.parametrize("kind", ["llama2", "llama3", "qwen2"])
def test_released_vocabularies_give_the_published_ids(tmp_path: Path, kind: str) -> None:
    folder = reference.shared("tokenizers") / kind
    found = back(metadata_of(folder, 152000), tmp_path / "back", 152000)
    texts = (folder.parent / "cases.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "cases.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=True):
        assert found.encode(text) == [int(index) for index in line.split()], text


@pytest.mark.parametrize("pre", [*gguf_tokenizer._CUTS, "llama3", "llama-v3", "deepseek-r1-qwen"])
def test_pre_tokenizers_by_name(tmp_path: Path, pre: str) -> None:
    """Each cuts as the tokenizers library does with its patterns, and is known again by them."""
    (tmp_path / "first").mkdir()
    write_merges(tmp_path / "first")
    metadata = metadata_of(tmp_path / "first") | {"tokenizer.ggml.pre": pre}
    found = back(metadata, tmp_path / "back")
    again = tokenizer_metadata(tmp_path / "back", 512)
    assert again["tokenizer.ggml.pre"] == gguf_tokenizer._ALSO.get(pre, pre)
    if pre not in ("gpt-2", "llama-bpe", "llama3", "llama-v3"):
        assert found.encode("1234") == [found.vocabulary.token_id(digit) for digit in "1234"]


def test_ends_template_and_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    write_tokenizer_json(tmp_path / "first", pad_token="<|im_start|>")
    write_json(tmp_path / "first" / "generation_config.json", {"eos_token_id": [3, 1, 5]})
    (tmp_path / "first" / "chat_template.jinja").write_text("{{ messages }}é")
    metadata = metadata_of(tmp_path / "first")
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 0, "eos": 1, "eot": 3, "eom": 5, "padding": 2}  # </s> is the tokenizer's own end
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    found = back(metadata, tmp_path / "back")
    assert (found.bos_id, found.eos_id, found.stop_ids) == (0, 1, {1, 3, 5})
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}é"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [1, 3, 5]


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    write_merges(tmp_path / "first")
    first = Tokenizer(tmp_path / "first")
    metadata = metadata_of(tmp_path / "first", first.vocab_size + 3)
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{first.vocab_size + 2}]"
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert back(metadata, tmp_path / "back", first.vocab_size + 3).vocab_size == first.vocab_size
    with pytest.raises(UserError, match=f"but the model has {first.vocab_size - 1} rows"):
        metadata_of(tmp_path / "first", first.vocab_size - 1)


def test_padding_that_the_file_names_is_a_token(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    write_sentencepiece(tmp_path / "first")
    rows = Tokenizer(tmp_path / "first").vocab_size + 3
    metadata = metadata_of(tmp_path / "first", rows) | {"tokenizer.ggml.padding_token_id": rows - 2}
    assert back(metadata, tmp_path / "back", rows).vocab_size == rows - 1


def test_bos_is_put_where_the_file_or_llama_cpp_puts_it(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    write_sentencepiece(tmp_path / "first")
    metadata = metadata_of(tmp_path / "first")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert back(metadata, tmp_path / "default").bos_id == 1
    assert back(metadata | {"tokenizer.ggml.add_bos_token": False}, tmp_path / "none").bos_id is None


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    write_tokenizer({"general.architecture": "llama"}, tmp_path, 64, "model.gguf")
    assert not list(tmp_path.iterdir())


def odd(folder: Path, **parts: object) -> None:
    """A tokenizer.json with other parts."""
    model = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, part in parts.items():
        setattr(model, name, part)
    model.add_special_tokens(["</s>"])
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


def merged(folder: Path, *normalizer: normalizers.Normalizer, cut: pre_tokenizers.PreTokenizer | None = None,
           **options: object) -> None:
    """A tokenizer.json with byte_fallback that replaces spaces. normalizer: steps before that; cut: the one after."""
    vocab = {text: index for index, text in enumerate(["<unk>", "</s>", "▁", "▁▁", "1", "2", "12"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    facts = {"vocab": vocab, "merges": [("1", "2")], "unk_token": "<unk>", "byte_fallback": True}
    model = tokenizers.Tokenizer(models.BPE(**facts | options))
    model.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "▁")])
    model.pre_tokenizer = cut
    model.add_special_tokens(["</s>"])
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


def unigram(folder: Path, byte_fallback: bool) -> None:
    """A tokenizer.json of pieces with scores, which merges nothing."""
    model = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0, byte_fallback))
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


UNKNOWN = {
    "unigram of tokenizer.json": (lambda folder: unigram(folder, False), "type Unigram has no form"),
    "unigram with byte_fallback": (lambda folder: unigram(folder, True), "type Unigram has no form"),
    "digits": (lambda folder: merged(folder, cut=pre_tokenizers.Split("1", "isolated")), "step .*'Split'.* has no"),
    "words of merged spaces": (
        lambda folder: merged(folder, cut=pre_tokenizers.Metaspace(), merges=[("▁", "▁")]), "step .*'Metaspace'.* has"
    ),
    "letters": (lambda folder: merged(folder, normalizers.Replace("A", "a")), "step .*'Replace'.* has no form"),
    "repeated spaces": (
        lambda folder: merged(folder, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")), "step .*'Replace'.* has no"
    ),
    "another prefix": (lambda folder: merged(folder, normalizers.Prepend("a")), "step .*'Prepend'.* has no form"),
    "whole pieces": (lambda folder: merged(folder, ignore_merges=True), "ignore_merges=true has no form"),
    "unigram": (lambda folder: write_sentencepiece(folder, model_type="unigram", vocab_size=330), "of type 1 has no"),
    "nfkc": (lambda folder: write_sentencepiece(folder, normalization_rule_name="nmt_nfkc"), "a table that replaces"),
    "spaces": (lambda folder: write_sentencepiece(folder, remove_extra_whitespaces=True), "the removal of repeated"),
    "lower case": (lambda folder: odd(folder, normalizer=normalizers.Lowercase()), "llama.cpp has no pre-tokenizer"),
    "a prefix": (lambda folder: odd(folder, pre_tokenizer=pre_tokenizers.ByteLevel()), "step ByteLevel has no form"),
    "white space": (lambda folder: odd(folder, pre_tokenizer=pre_tokenizers.Whitespace()), "step Whitespace has"),
    "ends": (
        lambda folder: (
            write_sentencepiece(folder), write_json(folder / "generation_config.json", {"eos_token_id": [2, 3, 4, 5]})
        ),
        "ends responses at 4 tokens",
    ),
}


def test_spaces_that_are_kept_have_no_form(tmp_path: Path) -> None:
    merged(tmp_path, cut=pre_tokenizers.Metaspace())
    tokenizer_metadata(tmp_path, 512)
    merged(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text()) | {"normalizer": None}
    write_json(tmp_path / "tokenizer.json", document)
    with pytest.raises(UserError, match="keeps spaces"):
        tokenizer_metadata(tmp_path, 512)


@pytest.mark.parametrize("case", UNKNOWN)
def test_tokenizers_without_a_form(tmp_path: Path, case: str) -> None:
    write, said = UNKNOWN[case]
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        tokenizer_metadata(tmp_path, 200000)


G = "tokenizer.ggml."
DAMAGED = {
    "tokens": ({f"{G}tokens": None}, "key 'tokenizer.ggml.tokens' is missing"),
    "many": ({f"{G}tokens": ["a"] * 600}, "tokens names 600 tokens, for 512 rows"),
    "twice": ({f"{G}tokens": ["a"] * 512}, "tokens names 512 tokens, some twice"),
    "numbers": ({f"{G}tokens": [1] * 512}, "tokens holds other values than str"),
    "a merge": ({f"{G}merges": ["a b c"]}, "merges has 'a b c', no two tokens that make one"),
    "merges": ({f"{G}merges": ["zz yy"]}, "merges has 'zz yy'"),
    "pre": ({f"{G}pre": None}, "tokenizer.ggml.pre=None is not implemented"),
    "suppressed": ({f"{G}suppress_tokens": [1]}, "tokenizer.ggml.suppress_tokens is not implemented"),
    "an id": ({f"{G}bos_token_id": "one"}, "tokenizer.ggml.bos_token_id='one'; expected a int"),
    "no end": ({f"{G}eos_token_id": None}, "its tokenizer does not open"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_metadata(tmp_path: Path, case: str) -> None:
    (tmp_path / "first").mkdir()
    write_merges(tmp_path / "first")
    changed, said = DAMAGED[case]
    metadata = {key: value for key, value in (metadata_of(tmp_path / "first") | changed).items() if value is not None}
    (tmp_path / "back").mkdir()
    with pytest.raises(UserError, match=said) as caught:
        write_tokenizer(metadata, tmp_path / "back", 512, "model.gguf")
    assert "model.gguf" in str(caught.value)
