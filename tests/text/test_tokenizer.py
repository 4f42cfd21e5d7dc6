"""src/text/tokenizer.py: control tokens, where a sequence begins and ends, and what a text can never say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import UserError
from src.text.chat import MARK
from src.text.tokenizer import Tokenizer
from tests.text.files import (
    CONTROL,
    WRITERS,
    write_json,
    write_merges,
    write_ranks,
    write_sentencepiece,
    write_tokenizer_json,
)
from tests.tiny import write_tokenizer

KINDS = list(WRITERS)


def test_round_trip_and_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in ("", "1+2=3", "a\n\n#### 5", "  a  b "):
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_pieces_joined_are_the_text(opened: dict[str, Tokenizer]) -> None:
    for kind in KINDS:
        ids = [index for text in ("1 + 22  = 3", " a\n\n#### 5") for index in opened[kind].encode(text)]
        pieces = opened[kind].pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == opened[kind].decode(ids), kind
        shown = opened[kind].pieces([*ids, opened[kind].eos_id], show_control=True)
        assert "".join(shown) == opened[kind].decode([*ids, opened[kind].eos_id], show_control=True), kind
        assert {*"".join(opened[kind].pieces(opened[kind].encode("\u20ac")))} in ({"\u20ac"}, {"\ufffd"}), kind


def test_ids_of_a_padded_vocabulary_vanish(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert tokenizer.vocab_size < 64
    assert tokenizer.decode([*tokenizer.encode("1+2"), tokenizer.vocab_size, 63]) == "1+2"


def test_a_lone_surrogate_is_refused(opened: dict[str, Tokenizer]) -> None:
    for kind in KINDS:
        with pytest.raises(UserError, match="lone surrogate at character 1"):
            opened[kind].encode("a\ud800")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="tokenizer.model does not exist; expected a tokenizer's file or directory"
    ):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(
        UserError, match=r"holds no tokenizer \(tokenizer.model, .*\); give checkpoint_split.py"
    ):
        Tokenizer(tmp_path)


# What begins and ends sequences


def test_ends_of_the_four_kinds(opened: dict[str, Tokenizer]) -> None:
    ends = {}
    for kind, tokenizer in opened.items():
        name = {index: token for token, index in tokenizer.control.items()}
        stops = sorted(name[index] for index in tokenizer.stop_ids)
        ends[kind] = (name.get(tokenizer.bos_id), name[tokenizer.eos_id], stops)
    assert ends == {
        "sentencepiece": ("<s>", "</s>", ["</s>"]),
        "tiktoken": ("<|begin_of_text|>", "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"]),
        "tokenizer.json": ("<s>", "</s>", ["</s>"]),
        "vocab.json and merges.txt": (None, "<|im_end|>", ["<|im_end|>"]),
    }


def test_llama_3_and_qwen_know_their_control_tokens(tmp_path: Path, opened: dict[str, Tokenizer]) -> None:
    llama = opened["tiktoken"]
    assert llama.vocab_size == 128256 and len(llama.control) == 256
    for token, index in (
        ("<|begin_of_text|>", 128000),
        ("<|end_of_text|>", 128001),
        ("<|start_header_id|>", 128006),
        ("<|end_header_id|>", 128007),
        ("<|eom_id|>", 128008),
        ("<|eot_id|>", 128009),
        ("<|python_tag|>", 128010),
        ("<|reserved_special_token_247|>", 128255),
    ):
        assert llama.control[token] == index
    qwen = Tokenizer(write_ranks(tmp_path / "qwen.tiktoken", 151643))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_204|>")
    assert [qwen.control[token] for token in names] == [151643, 151644, 151645, 151850]
    assert qwen.bos_id is None and qwen.stop_ids == {151643, 151645}


def test_a_config_renames_llama_3_s_reserved_tokens(tmp_path: Path) -> None:
    # Llama 3.0 had not named <|finetune_right_pad_id|> yet
    write_ranks(tmp_path / "tokenizer.model")
    decoder = {"128004": {"content": "<|reserved_special_token_2|>", "special": True}}
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "eos_token": {"content": "<|eot_id|>"}},
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.control["<|reserved_special_token_2|>"] == 128004
    assert "<|finetune_right_pad_id|>" not in tokenizer.control
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (128009, {128009})


def test_internlm2_names_unused_pieces(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path, user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    plain = Tokenizer(path)
    index = plain.encode("[UNUSED_TOKEN_146]")[-1]
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": {str(index): {"content": "<|im_start|>", "special": True}}},
    )
    tokenizer = Tokenizer(path)
    assert tokenizer.control["<|im_start|>"] == index
    assert tokenizer.encode_rendered("<|im_start|>a")[0] == index
    assert index not in tokenizer.encode("<|im_start|> [UNUSED_TOKEN_146]")


@pytest.mark.parametrize("said, expected", [(7, {2, 7}), ([2, 5, 9], {2, 5, 9}), (None, {2})])
def test_generation_config_names_further_stops(tmp_path: Path, said: object, expected: set[int]) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": said})
    assert Tokenizer(tmp_path).stop_ids == expected


def test_a_config_decides_about_bos(tmp_path: Path) -> None:
    for add_bos, expected in ((None, 1), (True, 1), (False, None)):
        write_sentencepiece(tmp_path)
        write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": add_bos})
        assert Tokenizer(tmp_path).bos_id == expected
    write_tokenizer_json(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", model | {"post_processor": None})
    assert (
        Tokenizer(tmp_path / "tokenizer.json").bos_id is None
    )  # named, but the file puts none before a sequence


def test_added_tokens_json_and_special_tokens_map(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path)
    size = Tokenizer(path).vocab_size
    write_json(tmp_path / "added_tokens.json", {"<pad>": size, "<step>": size + 1})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<pad>"}, "eos_token": "</s>"})
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.control["<pad>"] == size and "<step>" not in tokenizer.control
    text = " 12 <step>  + 7<pad> <step>"
    ids = tokenizer.encode(text)  # the one is a word of the vocabulary, the other cannot be said
    assert ids.count(size + 1) == 2 and size not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([size, *ids, size]) == text


CONFLICTS: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "sentencepiece",
        lambda f: write_json(f / "added_tokens.json", {"<x>": 420, "<y>": 420}),
        "give id 420 to '<y>', but that is '<x>'",
    ),
    (
        "vocab.json and merges.txt",
        lambda f: write_json(f / "added_tokens.json", {"<x>": 5}),
        "give id 5 to '<x>', but that is another token in the vocabulary",
    ),
    (
        "tokenizer.json",
        lambda f: write_json(f / "added_tokens.json", {"<|im_end|>": 900}),
        "give id 900 to '<|im_end|>', but that is id 3 in the vocabulary",
    ),
    (
        "sentencepiece",
        lambda f: write_json(f / "added_tokens.json", {"<x>": "many"}),
        "token '<x>' has id 'many'; expected a whole number",
    ),
    (
        "sentencepiece",
        lambda f: write_json(f / "tokenizer_config.json", {"added_tokens_decoder": {"420": 7}}),
        "added_tokens_decoder must give an object with its content for each id",
    ),
    (
        "sentencepiece",
        lambda f: write_json(f / "tokenizer_config.json", {"eos_token": "<end>"}),
        "eos_token is '<end>', which the vocabulary does not have",
    ),
    (
        "tokenizer.json",
        lambda f: (f / "tokenizer_config.json").unlink(),
        "eos_token is None, .*; expected tokenizer_config.json beside it to name one",
    ),
    (
        "sentencepiece",
        lambda f: write_json(f / "generation_config.json", {"eos_token_id": [2, 99999]}),
        "eos_token_id 99999 is not among the tokenizer's 420 ids",
    ),
    ("sentencepiece", lambda f: (f / "generation_config.json").write_text("{"), ": not valid json"),
]


@pytest.mark.parametrize("kind, damage, message", CONFLICTS, ids=[message[:40] for *_, message in CONFLICTS])
def test_config_files_that_do_not_go_with_the_vocabulary(
    folders: dict[str, Path], tmp_path: Path, kind: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders[kind], folder)
    damage(folder)
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as problem:
        Tokenizer(folder)
    assert "\n" not in str(problem.value)


# What a text can never say


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token(
    folders: dict[str, Path], opened: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = opened[kind]
    if kind == "sentencepiece":  # the turn tokens are pieces that sentencepiece itself would find
        tokenizer = Tokenizer(folders[kind], "gemma")
        assert {"<start_of_turn>", "<end_of_turn>"} <= tokenizer.control.keys()
    controls = set(tokenizer.control.values())
    spelled = [*tokenizer.control][:40]
    for text in (
        "".join(spelled),
        " ".join(spelled),
        *spelled,
        *(f"a {token} b\n{token}" for token in spelled),
    ):
        ids = tokenizer.encode(text)
        assert not controls & set(ids), text
        assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*CONTROL, *(t[:3] for t in CONTROL), " ", "\n", "é", "12", "<", ">", "|"])
    ),
    kind=st.sampled_from([kind for kind in KINDS if kind != "tiktoken"]),
)
def test_no_mixture_becomes_a_control_token(folders: dict[str, Path], pieces: list[str], kind: str) -> None:
    if kind not in OPEN:
        OPEN[kind] = Tokenizer(folders[kind], {"sentencepiece": "gemma"}.get(kind, "none"))
    tokenizer, text = OPEN[kind], "".join(pieces)
    ids = tokenizer.encode(text)
    assert not set(tokenizer.control.values()) & set(ids)
    assert tokenizer.decode(ids) == text


OPEN: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_s_text_may_hold_control_tokens_unless_they_are_marked(
    opened: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = opened[kind]
    token = max(tokenizer.control, key=len)
    index = tokenizer.control[token]
    broken = token[0] + MARK + token[1:]
    ids = tokenizer.encode_rendered(f"{token}a b{token}{token} c{broken}")
    assert [index] * 3 == [i for i in ids if i == index]
    assert ids[0] == index and tokenizer.decode(ids[1:]).startswith("a b")
    assert tokenizer.decode(ids).endswith(token) and MARK not in tokenizer.decode(ids)
    shown = tokenizer.decode(ids, show_control=True)
    assert shown.startswith(token) and shown.count(token) == 4


def test_a_stretch_has_one_space_before_it_however_it_is_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    assert tokenizer.encode_rendered("<s>What is") == [1, *tokenizer.encode("What is")]
    assert tokenizer.encode_rendered("<s> What is") == [1, *tokenizer.encode("What is")]
    assert tokenizer.encode_rendered("<s>  What is") == [1, *tokenizer.encode(" What is")]
    bare = Tokenizer(write_sentencepiece(tmp_path, add_dummy_prefix=False))  # as Gemma's
    assert bare.encode_rendered("<s> What") == [1, *bare.encode(" What")] != bare.encode_rendered("<s>What")


def test_white_space_beside_a_token_may_belong_to_it(tmp_path: Path) -> None:
    decoder = {"420": {"content": "<|end|>", "special": True, "rstrip": True, "lstrip": True}}
    path = write_sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = Tokenizer(path)
    assert tokenizer.encode_rendered("a \n<|end|>\n b") == [
        *tokenizer.encode("a"),
        420,
        *tokenizer.encode("b"),
    ]


def test_fingerprints_are_of_what_texts_become(
    folders: dict[str, Path], opened: dict[str, Tokenizer], tmp_path: Path
) -> None:
    prints = {tokenizer.fingerprint() for tokenizer in opened.values()}
    assert len(prints) == len(KINDS)
    merges = folders["vocab.json and merges.txt"]
    shutil.copytree(merges, tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy", "qwen").fingerprint() == Tokenizer(merges).fingerprint()
    lines = (tmp_path / "copy/merges.txt").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "copy/merges.txt").write_text("".join(lines[:-1]), encoding="utf-8")
    assert Tokenizer(tmp_path / "copy").fingerprint() != Tokenizer(merges).fingerprint()
    write_merges(
        tmp_path, eos_token="</s>", added_tokens_decoder={"390": {"content": "</s>", "special": True}}
    )
    assert Tokenizer(tmp_path).fingerprint() != Tokenizer(merges).fingerprint()
