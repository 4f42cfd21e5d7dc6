"""src/checkpoint/storage.py: when a directory counts as a checkpoint, and what is said when it does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.checkpoint import storage
from src.checkpoint.sources import read_config
from src.errors import UserError
from src.jsonfile import write_json
from src.models.config import ModelConfig

CONFIG = ModelConfig(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4, ffn_dim=8, vocab_size=8, max_seq_len=8
)


def save(folder: Path, n: int = 2, kind: str = storage.WEIGHTS) -> Path:
    """A complete directory of n small shards. Returns the directory."""
    with storage.writing(folder):
        for index in range(n):
            norms = {
                name: torch.full((8,), float(index)) for name in ("norm.weight", "layers.0.ffn_norm.weight")
            }
            storage.write_shard(folder, kind, index, norms)
        storage.finish(folder, n, {"params.json": CONFIG.to_dict()}, [], {"source": "test"})
    return folder


def test_complete_directory_is_accepted_and_read_back(tmp_path: Path) -> None:
    save(tmp_path)
    storage.check_complete(tmp_path)
    assert read_config(tmp_path) == CONFIG
    assert storage.read_shard(tmp_path / "consolidated.01.pth")["norm.weight"].tolist() == [1.0] * 8


def test_shards_are_ordered_by_number(tmp_path: Path) -> None:
    paths = storage.shard_paths(save(tmp_path, n=12))
    assert [storage.read_shard(path)["norm.weight"][0].item() for path in paths] == list(range(12))


def test_shards_written_by_hand_are_ordered_by_number_too(tmp_path: Path) -> None:
    for index in range(12):
        torch.save({}, tmp_path / f"consolidated.{index}.pth")  # one digit, then two: names do not sort
    assert [path.name for path in storage.shard_paths(tmp_path)][-2:] == [
        "consolidated.10.pth",
        "consolidated.11.pth",
    ]


def test_hole_in_the_numbering_is_named(tmp_path: Path) -> None:
    (save(tmp_path, n=4) / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"3 consolidated shards but consolidated\.01\.pth is missing"):
        storage.shard_paths(tmp_path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard of another checkpoint": (
        lambda folder: torch.save({"norm.weight": torch.ones(8)}, folder / "consolidated.02.pth"),
        r"consolidated\.02\.pth is not in the manifest",
    ),
    "manifest without files": (
        lambda folder: (folder / "manifest.json").write_text('{"shards": 2, "files": {}}'),
        r"manifest\.json names no files",
    ),
    "manifest of a newer version": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 99, "shards": 2, "files": {"a": {}}}'),
        r"manifest\.json: format=99; a newer version of SplitRL may have written it",
    ),
    "manifest of an odd version": (
        lambda folder: (folder / "manifest.json").write_text('{"format": [3], "shards": 2, "files": {"a": {}}}'),
        r"manifest\.json: format=\[3\]; a newer version of SplitRL may have written it",
    ),
    "no context": (
        lambda folder: (folder / "params.json").write_text(json.dumps(CONFIG.to_dict() | {"max_seq_len": 0})),
        r"params\.json: max_seq_len=0: expected a number above 0",
    ),
    "scores without deviation": (
        lambda folder: (folder / "params.json").write_text(json.dumps(CONFIG.to_dict() | {"score_std": 0.0})),
        r"params\.json: score_std=0.0: expected a number above 0",
    ),
    "params.json missing": (
        lambda folder: (folder / "params.json").unlink(),
        r"has no params\.json: it is no checkpoint, or its save was interrupted",
    ),
    "last shard missing": (
        lambda folder: (folder / "consolidated.01.pth").unlink(),
        r"lacks consolidated\.01\.pth, which its manifest names",
    ),
    "shard truncated": (
        lambda folder: (folder / "consolidated.00.pth").write_bytes(b"PK"),
        r"consolidated\.00\.pth has 2 bytes but the manifest says \d+: it was truncated or changed",
    ),
    "params.json cut": (
        lambda folder: (folder / "params.json").write_text('{"dim": 8'),
        r"params\.json: not valid json",
    ),
    "params.json of a newer version": (
        lambda folder: (folder / "params.json").write_text(json.dumps(CONFIG.to_dict() | {"experts": 8})),
        r"params\.json: unknown key 'experts'; a newer version",
    ),
    "params.json without a key": (
        lambda folder: (folder / "params.json").write_text('{"ffn_dim": 8}'),
        r"params\.json: key 'dim' is missing",
    ),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not valid json"),
    "manifest of something else": (
        lambda folder: (folder / "manifest.json").write_text("{}"),
        r"manifest\.json: key 'shards' is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_directory_is_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    damage(save(tmp_path))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory; expected a checkpoint made by"):
        read_config(tmp_path / "nowhere")


def test_old_checkpoint_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    old = storage.fingerprint(save(tmp_path))
    with pytest.raises(KeyboardInterrupt), storage.writing(tmp_path):
        storage.write_shard(tmp_path, storage.WEIGHTS, 0, {"norm.weight": torch.ones(8)})
        raise KeyboardInterrupt
    storage.check_complete(tmp_path)
    assert storage.fingerprint(tmp_path) == old
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_save_left_is_no_checkpoint_and_makes_way(tmp_path: Path) -> None:
    storage.staging(tmp_path).mkdir()
    (storage.staging(tmp_path) / "consolidated.07.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="its save was interrupted"):
        read_config(tmp_path)
    storage.check_complete(save(tmp_path))
    assert len(storage.shard_paths(tmp_path)) == 2


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_json(tmp_path / "params.json", {"dim": 8})
    with pytest.raises(TypeError):
        write_json(tmp_path / "params.json", {"dim": object()})
    assert storage.read_json(tmp_path / "params.json") == {"dim": 8}
    assert len(list(tmp_path.iterdir())) == 1


def test_shard_with_anything_but_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.ones(8), "step": 3}, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"consolidated\.00\.pth: 'step' is a int; expected tensors only"):
        storage.read_shard(tmp_path / "consolidated.00.pth")


def test_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    assert storage.fingerprint(first) == storage.fingerprint(second)
    (first / "manifest.json").unlink()
    assert storage.fingerprint(first) == storage.fingerprint(second)
    assert storage.fingerprint(save(first, n=3)) != storage.fingerprint(second)


def test_publish_makes_the_same_checkpoint_and_survives_the_source(tmp_path: Path) -> None:
    source, target = save(tmp_path / "epoch-1"), save(tmp_path / "out", n=4)
    fingerprint = storage.fingerprint(source)
    storage.publish(source, target)
    storage.check_complete(target)
    assert storage.fingerprint(target) == fingerprint
    save(source, n=1)  # another epoch takes its place
    storage.check_complete(target)
    assert storage.fingerprint(target) == fingerprint


def test_files_of_others_beside_a_checkpoint_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")  # of flags, say
    save(tmp_path)
    save(tmp_path / "two", n=2)
    assert (tmp_path / "config.json").read_text() == "{}"
    (tmp_path / "adapter.json").write_text("{}")  # of a save that was killed while it took an adapter's place
    (tmp_path / "manifest.json").unlink()
    save(tmp_path)
    assert not (tmp_path / "adapter.json").exists()


def test_unwritable_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*; choose another directory"):
        storage.check_writable(tmp_path / "file" / "out")
