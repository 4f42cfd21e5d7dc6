"""src/text/extend.py and checkpoint_split.py --code_tokens: tokens by id, rows for them, the same ids afterwards."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import checkpoint_split
from src import load, parallel
from src.checkpoint.sources import open_source
from src.checkpoint.split import with_added_tokens
from src.errors import UserError
from src.text.blocks import CODE_FORM, Marker, answer_pieces, text_form
from src.text.extend import add_control_tokens, say_ends
from src.text.tokenizer import Tokenizer
from tests import reference
from tests.conftest import TOY_BASE
from tests.text.files import CORPUS, TEXTS, write_json, write_ranks, write_sentencepiece

TEXT = "What is <|text|> 6 x 7?\n\n#### 42"


def test_scdpo_02_markers_get_the_ids_behind_the_vocabulary(toy_tokenizer: Tokenizer, code_base: str) -> None:
    extended = load.load_tokenizer(code_base)
    size = toy_tokenizer.vocab_size
    assert [extended.control[marker] for marker in Marker] == list(range(size, size + 8))
    assert extended.vocab_size == size + 8
    assert extended.encode(TEXT) == toy_tokenizer.encode(TEXT)
    assert (extended.chat_template, extended.eos_id) == ("code", extended.control[Marker.END_OF_MESSAGE])


def test_scdpo_02_each_new_row_is_the_mean_of_the_old_ones(code_base: str) -> None:
    old, new = open_source(str(TOY_BASE)), open_source(code_base)
    for name in ("tok_embeddings.weight", "output.weight"):
        before, after = old.tensors[name].load().float(), new.tensors[name].load().float()
        assert after.shape[0] == before.shape[0] + 8
        assert torch.equal(after[: len(before)], before)
        mean = before.mean(0).to(torch.bfloat16).float()  # the source's type
        assert all(torch.equal(row, mean) for row in after[len(before) :])


def test_scdpo_02_rows_that_pad_the_vocabulary_become_the_tokens() -> None:
    source = open_source(str(TOY_BASE))
    rows = source.config.vocab_size
    extended = with_added_tokens(source, 8, rows - 30)
    whole = extended.tensors["output.weight"].load()
    assert (extended.config.vocab_size, extended.config.n_added_tokens) == (rows, 0)
    assert extended.tensors["output.weight"].shape == whole.shape == source.tensors["output.weight"].shape
    mean = source.tensors["output.weight"].load()[: rows - 30].float().mean(0).to(whole.dtype)
    assert all(torch.equal(row, mean) for row in whole[rows - 30 : rows - 22])
    assert torch.equal(whole[rows - 22 :], source.tensors["output.weight"].load()[rows - 22 :])


def test_scdpo_02_reshard_and_export_keep_the_tokens(tmp_path: Path, code_base: str) -> None:
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=code_base, save_path=str(tmp_path / "two"), n=2)
    )
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(tmp_path / "two"), save_path=str(tmp_path / "hf"), format="hf"
        )
    )
    tokenizer = Tokenizer(tmp_path / "hf", "code")
    assert tokenizer.fingerprint() == load.load_tokenizer(code_base).fingerprint()
    parallel.start()
    model = load.load_solver(str(tmp_path / "two"))
    assert model.config.chat_template == "code"
    assert model.config.vocab_size == tokenizer.vocab_size


def test_tokens_that_are_there_are_not_added_again(tmp_path: Path, code_base: str) -> None:
    with pytest.raises(UserError, match=r"the tokenizer has '<\|user\|>' already"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(
                ckpt_file=code_base, save_path=str(tmp_path / "again"), n=1, code_tokens=True
            )
        )
    files = [path for path in Path(code_base).iterdir() if path.name.startswith("tokenizer")]
    with pytest.raises(UserError, match="already"):
        add_control_tokens(Path(code_base), [Marker.CODE], files[0].parent)


@pytest.mark.parametrize("flags", [{"code_tokens": True}, {"verifier_form": "rlhflow"}])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(tmp_path: Path, flags: dict[str, object]) -> None:
    shutil.copytree(TOY_BASE, tmp_path / "base")
    write_json(tmp_path / "base/added_tokens.json", {"<pad>": 640})
    config = checkpoint_split.SplitConfig(ckpt_file=str(tmp_path / "base"), save_path=str(tmp_path / "out"), **flags)
    with pytest.raises(UserError, match="tokenizer.model has 641 pieces but .*base embeds 640; give the tokenizer"):
        checkpoint_split.main(config)


SENTENCEPIECE = {
    "as Llama 2's": {"user_defined_symbols": []},
    "as Gemma's": {"add_dummy_prefix": False},
    "with pieces that are cut out": {"user_defined_symbols": ["\n\n", "####", " ="]},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


@pytest.mark.parametrize("kind", [*SENTENCEPIECE, "the toy's", "as Llama 3's"])
def test_transformers_has_our_ids_where_nothing_names_a_class(tmp_path: Path, kind: str) -> None:
    if kind in SENTENCEPIECE:
        write_sentencepiece(tmp_path, **SENTENCEPIECE[kind])
    elif kind == "the toy's":
        (tmp_path / "tokenizer.model").write_bytes((TOY_BASE / "tokenizer.model").read_bytes())
    else:
        write_ranks(tmp_path / "tokenizer.model")
    add_control_tokens(tmp_path, list(Marker), tmp_path)
    say_ends(tmp_path, CODE_FORM, {})
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    tokenizer, theirs = Tokenizer(tmp_path, CODE_FORM), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, *CORPUS, "two\n\nthree", " = 5", "a####  =b\n\n\n c", "a       b    c"):
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == [tokenizer.bos_id, *ids], text
        assert theirs.decode(ids) == tokenizer.decode(ids)
    parts = [*answer_pieces("So\n\n#### 6 x 7."), Marker.CODE, "\n print(6 * 7)\n\n", Marker.END_OF_BLOCK]
    ids = [index for piece in tokenizer.encode_pieces(parts) for index in piece]
    assert theirs.encode(text_form(parts), add_special_tokens=False) == ids


@pytest.mark.parametrize("kind", ["llama2", "mistral"])
def test_transformers_has_our_ids_of_released_files(tmp_path: Path, kind: str) -> None:
    folder = reference.shared("tokenizers")
    shutil.copy(folder / kind / "tokenizer.model", tmp_path)
    say_ends(tmp_path, "", {})
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    tokenizer, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    spaces = [f"1.{' ' * n}2" for n in range(40)]  # whose pieces merge in more than one way
    for text in [*(folder / "cases.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n"), *spaces]:
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)], text
