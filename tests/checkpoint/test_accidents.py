"""What can go wrong between a checkpoint and a disk: kills, full disks, two writers, forged and damaged files.

Each ends in one clear line, and nothing that was there before is lost.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint_split
from src.checkpoint import storage
from src.checkpoint.sources import open_source, read_config
from src.checkpoint.split import split
from src.errors import UserError
from src.models.config import ModelConfig
from tests.checkpoint.weights import CONFIG, HF, META, Tensors, as_hf, random_weights, write_json

# 21 MB, so that a kill has something to land in
BIG = ModelConfig(
    dim=256, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=1024, vocab_size=4096, max_seq_len=64
)
fork = multiprocessing.get_context("fork")  # a child starts in milliseconds, torch already imported


def directory(weights: Tensors, folder: Path, n: int, config: ModelConfig = CONFIG) -> Path:
    """Whole weights as n shards of ours."""
    whole = folder.with_name(folder.name + "-whole")
    with storage.writing(whole):
        storage.write_shard(whole, storage.WEIGHTS, 0, weights)
        storage.finish(whole, 1, {"params.json": config.to_dict()}, [], {})
    split(open_source(str(whole)), folder, n, "random weights")
    return folder


def holds(folder: Path, weights: Tensors) -> bool:
    """Whether a directory is a complete checkpoint of these weights, every byte as its manifest says."""
    storage.check_complete(folder)
    storage.verify_hashes(folder)
    tensors = open_source(str(folder)).tensors
    return all(torch.equal(tensors[name].load(), weight) for name, weight in weights.items())


def run_split(source: Path, target: Path, n: int) -> None:
    split(open_source(str(source)), target, n, str(source))


def processor_seconds(pid: int) -> float:
    """The processor time that a process has used, in steps of 1/100 s; unlike the clock's it knows no busy machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work_of_a_split(source: Path, target: Path) -> float:
    """Processor seconds of a split that nothing disturbs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = fork.Process(target=run_split, args=(source, target, 4))
    process.start()
    process.join()
    assert process.exitcode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def kill_after(process: multiprocessing.process.BaseProcess, work: float) -> None:
    """Kill a process once it has used so much processor time, or when it has ended."""
    while process.is_alive() and processor_seconds(process.pid) < work:
        time.sleep(0.0005)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_ten_random_moments_leaves_all_or_nothing(tmp_path: Path, replaces: bool) -> None:
    new, old = random_weights(BIG), {name: -w for name, w in random_weights(BIG).items()}
    source = directory(new, tmp_path / "source", 2, BIG)
    before = directory(old, tmp_path / "before", 3, BIG) if replaces else None
    work = work_of_a_split(source, tmp_path / "undisturbed")
    chance, found = random.Random(7), []
    for moment in range(10):
        target = tmp_path / f"target-{moment}"
        if before:
            storage.publish(before, target)
        process = fork.Process(target=run_split, args=(source, target, 4))
        process.start()
        kill_after(
            process, (moment + chance.random()) / 10 * 1.6 * work
        )  # spread evenly, some behind the end
        try:
            found.append("new" if holds(target, new) else "old" if before and holds(target, old) else "mixed")
        except UserError as error:
            assert "interrupted" in str(error) or "is not a directory" in str(error)
            found.append("none")
        run_split(source, target, 4)  # what the kill left is in nobody's way
        assert holds(target, new)
        assert not list(target.glob(".*"))
    assert "mixed" not in found
    assert len(set(found)) > 1  # the moments were spread over the work


def test_two_processes_never_write_to_one_place(tmp_path: Path) -> None:
    source = directory(random_weights(), tmp_path / "source", 2)
    held, free = fork.Event(), fork.Event()

    def hold() -> None:
        with storage.writing(tmp_path / "target"):
            held.set()
            free.wait(60)

    process = fork.Process(target=hold)
    process.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=rf"is being written by process {process.pid}; wait for it"):
        run_split(source, tmp_path / "target", 2)
    free.set()
    process.join()
    run_split(source, tmp_path / "target", 2)
    assert holds(tmp_path / "target", random_weights())


def test_file_size_limit_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = directory(random_weights(), tmp_path / "target", 2)
    source = directory(random_weights(BIG), tmp_path / "source", 1, BIG)

    def limited(report: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        try:
            run_split(source, old, 2)
        except UserError as error:
            report.write_text(str(error))

    process = fork.Process(target=limited, args=(tmp_path / "report",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "what was there before is untouched" in (tmp_path / "report").read_text()
    assert holds(old, random_weights())
    assert not list(old.glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 8 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    old = directory(random_weights(), small_disk / "target", 2)
    big = directory(random_weights(BIG), tmp_path / "big", 1, BIG)
    with pytest.raises(UserError, match=r"bytes are needed but [\d,]+ are free"):
        run_split(big, old, 2)

    def check_nothing(folder: Path, needed: int) -> None:
        """The disk had room when it was looked at, and another process filled it since."""

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="no space left on device in the middle"),
    ):
        patch.setattr(storage, "check_space", check_nothing)
        run_split(big, old, 2)
    assert holds(old, random_weights())
    assert not list(old.glob(".*"))


def test_flipped_bit_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folder = directory(random_weights(), tmp_path / "ours", 2)
    path = folder / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    storage.check_complete(folder)  # the size is right
    with pytest.raises(UserError, match=r"consolidated\.01\.pth has the right size but other contents"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=str(folder), save_path=str(tmp_path / "out"), n=1)
        )
    assert not (tmp_path / "out").exists()


def test_not_a_number_is_carried_over_and_reported(tmp_path: Path) -> None:
    weights = random_weights()
    weights["layers.1.feed_forward.w2.weight"][3, 5] = float("nan")
    weights["norm.weight"][0] = float("inf")
    source = open_source(str(directory(weights, tmp_path / "ours", 2)))
    reported = split(source, tmp_path / "out", 3, "ours")
    assert sorted(reported) == ["layers.1.feed_forward.w2.weight", "norm.weight"]


def forge_stride(folder: Path) -> None:
    """A tensor of a billion entries in four bytes."""
    shard = random_weights() | {"norm.weight": torch.zeros(1).expand(32, 2**30)}
    torch.save(shard, folder / "consolidated.00.pth")


def forge_meta(folder: Path) -> None:
    shard = random_weights() | {"norm.weight": torch.empty(32, device="meta")}
    torch.save(shard, folder / "consolidated.00.pth")


def forge_second_shard(folder: Path) -> None:
    torch.save(random_weights(), folder / "consolidated.0.pth")


def forge_link(folder: Path) -> None:
    outside = folder.parent / "secret.pth"
    torch.save(random_weights(), outside)
    (folder / "consolidated.00.pth").unlink()
    (folder / "consolidated.00.pth").symlink_to(outside)


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "claims more than it holds": (forge_stride, r"'norm\.weight' claims \d+ bytes of which the file holds 4"),
    "has no data": (
        forge_meta,
        r"'norm\.weight' is a torch\.strided tensor on meta; expected a plain dense one",
    ),
    "shard under two names": (forge_second_shard, "are both shard 0; remove one"),
    "link to the outside": (forge_link, "is a link to .*, outside its directory"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_shard_is_refused(tmp_path: Path, case: str) -> None:
    forge, message = FORGERIES[case]
    folder = tmp_path / "meta"
    folder.mkdir()
    torch.save(random_weights(), folder / "consolidated.00.pth")
    write_json(folder / "params.json", META)
    open_source(str(folder))
    forge(folder)
    with pytest.raises(UserError, match=message):
        open_source(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 2**40]},
        {"shape": [2**31, 2**31]},
        {"dtype": "F8_E5M2"},
        {"data_offsets": [64, 0]},
    ],
)
def test_safetensors_header_that_lies_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(as_hf(random_weights()), path)
    write_json(tmp_path / "config.json", HF)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_source(str(tmp_path))


def test_huggingface_cache_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1f2e", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(as_hf(random_weights()), blobs / "77ab")
    (snapshot / "model.safetensors").symlink_to("../../blobs/77ab")
    write_json(snapshot / "config.json", HF)
    assert torch.equal(
        open_source(str(snapshot)).tensors["norm.weight"].load(), random_weights()["norm.weight"]
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"../elsewhere.pth": {"bytes": 1, "blake3": ""}},
            "entry '../elsewhere.pth' is not a file of this directory",
        ),
        ({"consolidated.00.pth": {"bytes": 1}}, "is not a file of this directory with its bytes and blake3"),
        ({"consolidated.00.pth": 7}, "is not a file of this directory"),
        ([], r"files=\[\]; expected an object"),
    ],
)
def test_manifest_that_names_other_places_is_refused(tmp_path: Path, files: object, message: str) -> None:
    folder = directory(random_weights(), tmp_path / "ours", 1)
    write_json(folder / "manifest.json", {"shards": 1, "files": files})
    with pytest.raises(UserError, match=message):
        read_config(folder)


def test_parameter_missing_from_one_shard_is_named(tmp_path: Path) -> None:
    folder = directory(random_weights(), tmp_path / "ours", 2)
    (folder / "manifest.json").unlink()
    shard = {name: t.clone() for name, t in storage.read_shard(folder / "consolidated.01.pth").items()}
    del shard["layers.0.attention.wq.weight"]
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(
        UserError, match="is in an earlier file too; expected parts of one checkpoint, or all its"
    ):
        open_source(str(folder))
