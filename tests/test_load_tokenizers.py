"""src/load.py: tokenizers of every kind travel with checkpoints, and so does the chat template of training."""

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoint_split
import solver_evaluate
import solver_train
from src import load, parallel
from src.checkpoint import storage
from src.checkpoint.export import export_hf
from src.checkpoint.sources import open_source
from src.data.examples import read_samples
from src.errors import UserError
from src.jsonfile import read_json
from src.text.tokenizer import Tokenizer
from tests import tiny
from tests.text.files import TEXTS, WRITERS, write_json, write_merges, write_sentencepiece

ROWS = [{"instruction": f"{a}+1=", "output": f"#### {a + 1}", "label": str(a + 1)} for a in range(6)]


@pytest.fixture(autouse=True)
def one_process() -> None:
    parallel.start()


def write_model(folder: Path, kind: str) -> Path:
    """A tiny Llama in Hugging Face's form with a tokenizer of this kind. Returns the directory."""
    folder.mkdir()
    WRITERS[kind](folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=Tokenizer(folder).vocab_size,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def names(folder: Path) -> set[str]:
    """The tokenizer's files in a directory; transformers writes a generation_config.json of its own."""
    return {path.name for path in storage.tokenizer_files(folder)} - {"generation_config.json"}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The framework's warnings."""
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("kind", WRITERS)
def test_tokenizers_travel_through_split_train_save_and_export(tmp_path: Path, kind: str) -> None:
    hf = write_model(tmp_path / "hf", kind)
    expected, files = Tokenizer(hf), names(hf)
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(tmp_path / "split"), n=1)
    )
    rows = str(write_json(tmp_path / "train.json", ROWS))
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=str(tmp_path / "split"),
            save_dir=str(tmp_path / "trained"),
            train_file=rows,
            max_batch_size=3,
        )
    )
    trained = str(tmp_path / "trained")
    export_hf(open_source(trained), tmp_path / "exported", trained)
    for folder in ("split", "trained/epoch-1", "trained", "exported"):
        assert names(tmp_path / folder) == files
        found = Tokenizer(tmp_path / folder)
        assert found.fingerprint() == expected.fingerprint()
        assert found.control == expected.control and found.stop_ids == expected.stop_ids
        assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    load.check_tokenizer(expected, str(tmp_path / "trained"), "")


def test_a_named_tokenizer_comes_with_its_own_files_and_replaces_the_old_one(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "sentencepiece")
    out = tmp_path / "out"
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(out), n=1))
    other = tmp_path / "other"
    other.mkdir()
    write_sentencepiece(other)  # lies beside vocab.json, and is another tokenizer
    write_merges(other)
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(hf), save_path=str(out), n=1, tokenizer_file=str(other / "vocab.json")
        )
    )
    assert names(out) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert Tokenizer(out).fingerprint() == Tokenizer(other / "vocab.json").fingerprint()
    (other / "tokenizer.model").rename(other / "own.tiktoken")
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(hf), save_path=str(out), n=1, tokenizer_file=str(other / "own.tiktoken")
        )
    )
    assert names(out) == {"qwen.tiktoken", "tokenizer_config.json"}


@pytest.mark.parametrize("adds_bos", [False, True, None])
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json and merges.txt"])
def test_files_that_differ_on_bos_are_told_with_the_one_that_is_followed(
    tmp_path: Path, warned: pytest.LogCaptureFixture, kind: str, adds_bos: bool | None
) -> None:
    folder = Path(tiny.split(write_model(tmp_path / "model", kind), tmp_path / "ours"))
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", config | {"bos_token": "<s>", "add_bos_token": adds_bos})
    tokenizer = load.load_tokenizer(str(folder))
    assert (tokenizer.bos_id is not None) == (kind == "tokenizer.json" if adds_bos is None else adds_bos)
    differ = kind == "tokenizer.json" and adds_bos is False
    told = "puts a BOS token before a sequence, but .* is followed: sequences begin without one"
    assert bool(re.search(told, warned.text)) == differ == ("BOS" in warned.text)
    if kind == "tokenizer.json" and adds_bos:
        document = read_json(folder / kind)
        write_json(folder / kind, document | {"post_processor": None})
        assert load.load_tokenizer(str(folder)).bos_id is not None
        assert re.search("puts no BOS token before .* is followed: sequences begin with one", warned.text)


def test_ids_beyond_the_model_s_rows_are_refused(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", "vocab.json and merges.txt")
    write_json(hf / "added_tokens.json", {"<more>": Tokenizer(hf).vocab_size})
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(tmp_path / "out"), n=1)
    )
    with pytest.raises(UserError, match=r"vocab.json has \d+ pieces but .*out embeds \d+"):
        load.load_tokenizer(str(tmp_path / "out"))


def test_later_commands_follow_the_chat_template_of_training(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    hf = write_model(tmp_path / "hf", "sentencepiece")
    out, log, rows = (
        str(tmp_path / "out"),
        str(tmp_path / "log"),
        str(write_json(tmp_path / "rows.json", ROWS)),
    )
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(tmp_path / "base"), n=1)
    )
    assert load.load_tokenizer(str(tmp_path / "base")).chat is None
    for rank in (-1, 2):
        solver_train.main(
            solver_train.SolverTrainConfig(
                ckpt_dir=str(tmp_path / "base"),
                save_dir=out,
                train_file=rows,
                chat_template="gemma",
                lora_rank=rank,
            )
        )
        assert load.load_config(out).chat_template == "gemma"
        assert load.load_tokenizer(out).chat_template == "gemma"
    # not given again, it is kept
    solver_train.main(
        solver_train.SolverTrainConfig(ckpt_dir=out, save_dir=str(tmp_path / "more"), train_file=rows)
    )
    assert load.load_config(str(tmp_path / "more")).chat_template == "gemma"
    solver_evaluate.main(
        solver_evaluate.SolverEvaluateConfig(
            task="none", label_file=rows, log_dir=log, ckpt_dir=out, max_new_tokens=40
        )
    )
    assert len(read_samples(f"{log}/samples.jsonl")) == len(ROWS)
    assert not warned.records
    with pytest.raises(UserError, match="holds samples with chat_template=gemma, but this run has none"):
        solver_evaluate.main(
            solver_evaluate.SolverEvaluateConfig(
                task="none",
                label_file=rows,
                log_dir=log,
                ckpt_dir=out,
                chat_template="none",
                max_new_tokens=40,
            )
        )
    assert "was trained with chat template gemma, but reads texts in the form of none here" in warned.text
    warned.clear()
    load.check_tokenizer(load.load_tokenizer(str(tmp_path / "base")), out)
    assert "was trained with chat template gemma, but reads texts in the form of none here" in warned.text


def test_a_dry_run_shows_the_chat_with_its_answer_in_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = write_model(tmp_path / "hf", "sentencepiece")
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(hf), save_path=str(tmp_path / "base"), n=1)
    )
    rows = str(write_json(tmp_path / "rows.json", ROWS))
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=str(tmp_path / "base"),
            save_dir=str(tmp_path / "out"),
            train_file=rows,
            chat_template="gemma",
            dry_run=True,
        )
    )
    shown = capsys.readouterr().out
    assert "<s><start_of_turn>user\n0+1=<end_of_turn>\n<start_of_turn>model\n[[#### 1<end_of_turn>]]" in shown
