"""Tiny checkpoints and their tokenizer, written to disk: what the tests of trainers and scripts run on."""

import importlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch

import checkpoint_split
import data_build
from src import load
from src.checkpoint import saving, storage
from src.command.flags import config_of, flags_of
from src.text.tokenizer import Tokenizer

ALPHABET = "0123456789+-=# \nabcdefgh"


def write_tokenizer(folder: Path, alphabet: str = ALPHABET) -> Tokenizer:
    """A sentencepiece model with a piece for each character: fewer than the models' 64 rows."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([alphabet] * 20),
        model_writer=model,
        model_type="char",
        vocab_size=64,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def write_hf_llama(folder: Path) -> Path:
    """A random grouped-query Llama of transformers that often says EOS, and the tokenizer. Returns the directory."""
    from tests.reference import hf_model, make_llama  # transformers costs seconds, and ranks need none of it

    model = hf_model(make_llama(folder, "gqa"))
    model.lm_head.weight.data[2] *= (
        4  # a logit of high variance: EOS is near certain in some places, out in others
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def split(source: Path, folder: Path, n: int = 1) -> str:
    """Cut a directory into n shards with checkpoint_split.py's main. Returns the directory of the shards."""
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(source), save_path=str(folder), n=n))
    return str(folder)


def make_verifier(ckpt_dir: str, folder: Path, *, mean: float = 0.0, std: float = 1.0,
                  objective: str = "pairwise") -> str:
    """Save a one-shard solver as a verifier with a random value head. Returns the directory."""
    verifier = load.load_verifier(ckpt_dir, from_solver=True)
    with torch.no_grad():
        verifier.v_head.weight.normal_(generator=torch.Generator().manual_seed(5))
    saving.record(verifier, score_mean=mean, score_std=std, objective=objective)
    saving.begin_save(verifier, str(folder), ckpt_dir).complete()
    return str(folder)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a one-shard directory."""
    return storage.read_shard(Path(folder) / "consolidated.00.pth")


def main_of(name: str, *first: str) -> Callable[..., None]:
    """A script's main as a function of its flags; `first` names those that may be given by position."""
    return _by_flags(importlib.import_module(name).main, first)


def _by_flags(main: Callable[..., None], first: Sequence[str]) -> Callable[..., None]:
    config = config_of(main)

    def run(*values: object, **flags: object) -> None:
        main(config(**dict(zip(first, values, strict=False)), **flags))

    return run


def _command_of(name: str) -> Callable[..., None]:
    flags = flags_of(data_build.COMMANDS[name])
    required = [flag.name for flag in flags.values() if flag.required]
    optional = [name for name in ("ckpt_dir", "control_file") if name in flags]
    return _by_flags(data_build.COMMANDS[name], required + optional)


# The commands of data_build.py as functions of their flags, the required ones by position.
build = SimpleNamespace(**{name: _command_of(name) for name in data_build.COMMANDS})
