"""checkpoint_split.py and src/checkpoint/split.py: nothing is lost, and a killed run leaves no half checkpoint."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoint_split
import solver_train
from src.checkpoint import storage
from src.checkpoint.sources import Source, open_source, read_config
from src.checkpoint.split import split, with_tokenizer
from src.checkpoint.tensor_files import file_hash
from src.errors import UserError
from tests import reference, zoo
from tests.conftest import Folders
from tests.ranks import ROOT, command, succeed


@pytest.fixture(scope="module", params=reference.MODELS)
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model with a tokenizer beside it."""
    folder = reference.make_llama(tmp_path_factory.mktemp(request.param), request.param)
    reference.make_tokenizer(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_llama(tmp_path_factory.mktemp("gqa"), "gqa")


def cut(source: Path, folder: Path, n: int, dtype: str = "", tokenizer_file: str = "") -> Path:
    split(with_tokenizer(open_source(str(source)), tokenizer_file), folder, n, str(source), dtype)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: stored.load() for name, stored in open_source(str(folder)).tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_split_and_merge_are_bit_exact(tmp_path: Path, hf_folder: Path, n: int) -> None:
    cut(hf_folder, tmp_path, n)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == n
    assert_equal(tensors(tmp_path), tensors(hf_folder))
    assert open_source(str(tmp_path)).config == open_source(str(hf_folder)).config


def test_resharding_is_bit_exact(tmp_path: Path, hf_folder: Path) -> None:
    two = cut(hf_folder, tmp_path / "2", 2)
    four = cut(two, tmp_path / "4", 4)
    one = cut(four, tmp_path / "1", 1)
    assert_equal(tensors(one), tensors(hf_folder))
    assert storage.fingerprint(one) == storage.fingerprint(cut(hf_folder, tmp_path / "direct", 1))


def test_shards_share_out_the_weights_evenly(tmp_path: Path, gqa: Path) -> None:
    whole = storage.read_shard(cut(gqa, tmp_path / "1", 1) / "consolidated.00.pth")
    for path in storage.shard_paths(cut(gqa, tmp_path / "4", 4)):
        shard = storage.read_shard(path)
        assert list(shard) == list(whole)
        assert all(
            shard[name].numel() * (1 if "norm" in name else 4) == tensor.numel()
            for name, tensor in whole.items()
        )


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16"])
def test_stored_dtype_is_the_one_asked_for_or_the_source_s(tmp_path: Path, gqa: Path, dtype: str) -> None:
    cut(gqa, tmp_path, 2, dtype)
    expected = getattr(torch, dtype or "float32")
    assert read_config(tmp_path).dtype == (dtype or "float32")
    original = tensors(gqa)
    for name, tensor in tensors(tmp_path).items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, original[name].to(expected))


def test_tokenizer_travels_under_one_name(tmp_path: Path, hf_folder: Path, gqa: Path) -> None:
    cut(hf_folder, tmp_path / "beside", 1)
    vocabulary = (hf_folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "beside" / "tokenizer.model").read_bytes() == vocabulary
    named = tmp_path / "tok64.model"
    named.write_bytes(vocabulary)
    cut(gqa, tmp_path / "named", 1, tokenizer_file=str(named))
    assert (tmp_path / "named" / "tokenizer.model").read_bytes() == vocabulary
    cut(tmp_path / "named", tmp_path / "again", 2)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == vocabulary


def test_manifest_says_where_the_weights_come_from_and_how_they_are_cut(tmp_path: Path, gqa: Path) -> None:
    manifest = json.loads((cut(gqa, tmp_path, 2) / "manifest.json").read_text())
    assert manifest["shards"] == 2
    assert manifest["source"] == str(gqa)
    assert manifest["split"]["layers.0.attention.wo.weight"] == 1
    assert manifest["split"]["norm.weight"] is None
    for name, facts in manifest["files"].items():
        assert facts == {
            "bytes": (tmp_path / name).stat().st_size,
            "blake3": file_hash(tmp_path / name),
        }


def test_fewer_shards_replace_more(tmp_path: Path, gqa: Path) -> None:
    cut(gqa, tmp_path, 4)
    cut(gqa, tmp_path, 2)
    assert len(list(tmp_path.glob("consolidated*"))) == 2
    assert_equal(tensors(tmp_path), tensors(gqa))


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (9, "n_heads=8 leaves nothing to do for shard .* of 9; choose at most 8"),
        (0, "cannot be cut into 0 shards"),
        (-2, "cannot be cut into -2 shards"),
    ],
)
def test_number_that_the_model_cannot_be_cut_into_is_refused(
    tmp_path: Path, gqa: Path, n: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cut(gqa, tmp_path / "out", n)
    assert not (tmp_path / "out").exists()


def test_source_is_never_its_own_target(tmp_path: Path, gqa: Path) -> None:
    cut(gqa, tmp_path, 2)
    with pytest.raises(UserError, match="is the source itself; choose another directory"):
        cut(tmp_path, tmp_path / "." / "", 4)
    assert_equal(tensors(tmp_path), tensors(gqa))


def test_missing_tokenizer_file_is_refused_before_anything_is_written(tmp_path: Path, gqa: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer_file gone\.model does not exist"):
        cut(gqa, tmp_path / "out", 1, tokenizer_file="gone.model")
    for none in (tmp_path, gqa / "config.json"):
        with pytest.raises(UserError, match="--tokenizer_file .* is no tokenizer; expected a directory with one"):
            cut(gqa, tmp_path / "out", 1, tokenizer_file=str(none))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora_rank", [-1, 4])
def test_training_checkpoint_is_split_without_its_optimizer_aloud(
    tmp_path: Path, folders: Folders, capsys: pytest.CaptureFixture[str], lora_rank: int
) -> None:
    """What is written starts training anew; nothing of the optimizer travels, and a line says so."""
    rows = [{"instruction": f"{i}+1=", "output": f"{i + 1}"} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=folders.one,
            save_dir=str(tmp_path / "run"),
            train_file=str(tmp_path / "train.json"),
            save_every=1,
            max_batch_size=2,
            epochs=1,
            lora_rank=lora_rank,
        )
    )
    step = str(tmp_path / "run" / "step-2")
    for format in ("shards", "hf"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=step, save_path=str(tmp_path / format), format=format)
        )
        told = capsys.readouterr().err
        assert (
            f"{step} is a training checkpoint: its weights are written, and its optimizer and place in"
            in told
        )
        assert not [
            path for path in (tmp_path / format).iterdir() if path.name.startswith(("optimizer", "state"))
        ]
    checkpoint_split.main(checkpoint_split.SplitConfig(inspect=step))
    assert re.search(
        r"(shards|and its base): [12]\b", capsys.readouterr().out
    )  # the optimizer's file is no shard
    checkpoint_split.main(
        checkpoint_split.SplitConfig(ckpt_file=str(tmp_path / "run"), save_path=str(tmp_path / "top"), n=2)
    )
    assert "training checkpoint" not in capsys.readouterr().err


def test_command_works_under_torchrun_too(tmp_path: Path, gqa: Path) -> None:
    out = tmp_path / "out"
    done = succeed("checkpoint_split.py", "--ckpt_file", gqa, "--save_path", out, "--n", 2, n=2)
    assert_equal(tensors(out), tensors(gqa))
    assert done.stderr.count("wrote 2 shards") + done.stdout.count("wrote 2 shards") == 1


def test_command_ends_in_one_line_for_a_user_s_mistake(tmp_path: Path, gqa: Path) -> None:
    done = command("checkpoint_split.py", "--ckpt_file", gqa, "--save_path", tmp_path, "--n", 9)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "n_heads=8 leaves nothing to do for shard" in done.stderr


@pytest.mark.parametrize(
    "moment",
    [".partial/consolidated.00.pth", ".partial/manifest.json", "consolidated.00.pth", "params.json"],
)
def test_killed_command_leaves_no_half_checkpoint(tmp_path: Path, moment: str) -> None:
    # large enough that writing takes a while; whenever the kill lands, what is left is refused or whole
    source, out = tmp_path / "source.pth", tmp_path / "out"
    weights = {
        "tok_embeddings.weight": torch.ones(8192, 512),
        "layers.0.feed_forward.w1.weight": torch.ones(8192, 512),
        "layers.0.feed_forward.w2.weight": torch.ones(512, 8192),
        "layers.0.feed_forward.w3.weight": torch.ones(8192, 512),
        "norm.weight": torch.ones(512),
        "output.weight": torch.full((8192, 512), 2.0),
    }
    weights |= {f"layers.0.attention.w{letter}.weight": torch.ones(512, 512) for letter in "qkvo"}
    weights |= {f"layers.0.{name}_norm.weight": torch.ones(512) for name in ("attention", "ffn")}
    torch.save(weights, source)
    (tmp_path / "params.json").write_text('{"dim": 512, "n_layers": 1, "n_heads": 8}')
    process = subprocess.Popen(
        [sys.executable, "checkpoint_split.py", "--ckpt_file", source, "--save_path", out, "--n", "4"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob(moment)) and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        read_config(out)
    except UserError as error:
        assert "its save was interrupted" in str(error)
        with pytest.raises(UserError):
            open_source(str(out))
    else:  # the kill came when every file was in place
        assert_equal(tensors(out), weights)


@pytest.mark.parametrize("name", ["llama-1", "qwen-3"])  # with an output layer, and tied
def test_scdpo_02_added_tokens_are_the_mean_of_the_old(tmp_path: Path, name: str) -> None:
    source = zoo.make(tmp_path / "hf", name)
    done = succeed(
        "checkpoint_split.py",
        "--ckpt_file",
        source,
        "--save_path",
        tmp_path / "two",
        "--n",
        2,
        "--num_added_tokens",
        3,
    )
    assert "wrote 2 shards" in done.stderr
    before, after = open_source(str(source)), open_source(str(tmp_path / "two"))
    assert (after.config.vocab_size, after.config.n_added_tokens) == (before.config.vocab_size + 3, 3)
    for key, stored in before.tensors.items():
        old, new = stored.load(), after.tensors[key].load()
        assert torch.equal(new[: len(old)], old), key
        if key in ("tok_embeddings.weight", "output.weight"):
            torch.testing.assert_close(new[len(old) :], old.mean(0).expand(3, -1))
        else:
            assert new.shape == old.shape


@pytest.mark.parametrize("dtype", ["", "float16", "bfloat16"])
def test_verify_takes_what_rounding_makes_and_no_more(
    gqa: Path, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(name: str) -> None:
        checkpoint_split.main(checkpoint_split.SplitConfig(
            ckpt_file=str(gqa), save_path=str(tmp_path / name), dtype=dtype, verify=True))

    def write_wrongly(source: Source, *rest: object) -> list[str]:
        name = "layers.0.attention_norm.weight"
        halved = source.tensors[name].load() / 2
        wrong = source.tensors[name]._replace(load=lambda: halved)
        return split(source._replace(tensors=source.tensors | {name: wrong}), *rest)

    convert("right")
    monkeypatch.setattr(checkpoint_split, "split", write_wrongly)
    limit = {"": "0.001", "float16": "0.02", "bfloat16": "0.1"}[dtype]
    with pytest.raises(UserError, match=rf"wrong: largest difference .*; expected at most {limit} of the largest"):
        convert("wrong")


def test_a_list_of_no_files_is_said_to_be_none(tmp_path: Path) -> None:  # as --config may have it
    with pytest.raises(UserError, match="--ckpt_file and --save_path are needed"):
        checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=[], save_path=str(tmp_path)))
