"""Every reader of checkpoints, fed 2,700 damaged files: each opens or is refused in our words, and none crashes."""

import multiprocessing
import random
import resource
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from src import parallel
from src.checkpoint import export, storage
from src.checkpoint.sources import open_adapter, open_source
from src.checkpoint.split import split
from src.errors import UserError
from src.load import load_solver
from src.text.gguf_tokenizer import tokenizer_metadata
from tests import tiny
from tests.checkpoint.weights import CONFIG, HF, META, as_hf, random_weights, write_json

ROUNDS = 300  # a kind of file
MEMORY = (
    2**30
)  # bytes that a reader may ask for besides what the test holds: what a forged header claims is more


def shards(folder: Path) -> str:
    """Two of our shards; the damaged file is one of them, or one of the documents beside them."""
    torch.save(random_weights(), folder / "source.pth")
    write_json(folder / "params.json", META)
    split(open_source(str(folder / "source.pth")), folder / "ours", 2, "random")
    return str(folder / "ours")


def torch_file(folder: Path, zipped: bool = True) -> str:
    torch.save(random_weights(), folder / "weights.pth", _use_new_zipfile_serialization=zipped)
    write_json(folder / "params.json", META)
    return str(folder / "weights.pth")


def hf_folder(folder: Path) -> str:
    weights = as_hf(random_weights())
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    write_json(folder / export.INDEX, index)
    write_json(folder / "config.json", HF)
    return str(folder)


def adapter(folder: Path) -> str:
    """An adapter of ours, and PEFT's form of it, with the base that both name."""
    base = shards(folder)
    lora = {
        f"layers.{layer}.attention.wq.lora_{factor}.weight": torch.randn(shape)
        for layer in range(CONFIG.n_layers)
        for factor, shape in (("a", (2, CONFIG.dim)), ("b", (CONFIG.dim, 2)))
    }
    with storage.writing(folder / "lora"):
        storage.write_shard(folder / "lora", storage.ADAPTER, 0, lora)
        values = {
            "base": base,
            "base_fingerprint": storage.fingerprint(Path(base)),
            "rank": 2,
            "alpha": 4.0,
            "targets": ["wq"],
        }
        documents = {"adapter.json": values, "params.json": CONFIG.to_dict()}
        storage.finish(folder / "lora", 1, documents, [], {})
    return str(folder / "lora")


def peft_adapter(folder: Path) -> str:
    export.export_peft(open_adapter(Path(adapter(folder))), folder / "peft", "lora")
    return str(folder / "peft")


def gguf_file(folder: Path) -> str:
    torch.save(random_weights(), folder / "weights.pth")
    write_json(folder / "params.json", META)
    source = open_source(str(folder / "weights.pth"))
    metadata = tokenizer_metadata(tiny.write_tokenizer(folder).path.parent, source.config.vocab_size)
    export.export_gguf(source, folder / "gguf", "random", metadata, dtype="q8_0")
    (folder / "gguf" / "manifest.json").unlink()
    return str(folder / "gguf" / "model.gguf")


# What is damaged, how it is made, and the file in it.
KINDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "shard": (shards, "consolidated.01.pth"),
    "params.json": (shards, "params.json"),
    "manifest.json": (shards, "manifest.json"),
    "torch file": (torch_file, "weights.pth"),
    "torch file before 1.6": (lambda folder: torch_file(folder, zipped=False), "weights.pth"),
    "safetensors": (hf_folder, "model-00001-of-00001.safetensors"),
    "config.json and index": (hf_folder, "config.json"),
    "peft": (peft_adapter, "adapter_config.json"),
    "gguf": (gguf_file, "gguf/model.gguf"),
}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A copy with bits flipped, bytes replaced, cut out or repeated; early bytes more often than late ones."""
    damage = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        reach = chance.choice((64, 2048, len(damage)))
        place = chance.randrange(max(1, min(reach, len(damage))))
        if chance.random() < 0.3:  # the directory of a zip archive is at its end
            place = max(0, len(damage) - 1 - place)
        kind = chance.randrange(6)
        if kind == 0 and damage:
            damage[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and damage:
            damage[place] = chance.choice(b"\x00\xff-0919{}[]\"'.:eN")
        elif kind == 2:
            del damage[place : place + chance.choice((1, 4, 100))]
        elif kind == 3:
            damage[place:place] = damage[place : place + chance.choice((1, 8, 200))]
        elif kind == 4:
            del damage[place:]
        else:
            damage[place:place] = chance.randbytes(chance.choice((1, 8)))
    return bytes(damage)


def read_all(path: str) -> None:
    """Open a checkpoint in every way there is, and read every tensor."""
    for stored in open_source(path).tensors.values():
        stored.load()
    if Path(path).is_dir() and (Path(path) / "params.json").is_file():
        storage.verify_hashes(Path(path))
        load_solver(path)


def feed(kind: str, folder: Path, failures: Path) -> None:
    """Damage one file ROUNDS times and read it each time; what is raised besides UserError goes into a file."""
    parallel.start()
    make, name = KINDS[kind]
    path = make(folder)
    target = (Path(path) if Path(path).is_dir() else folder) / name
    sound = target.read_bytes()
    read_all(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    refused = 0
    for number in range(ROUNDS):
        target.write_bytes(damaged(sound, random.Random(f"{kind} {number}")))
        try:
            read_all(path)
        except UserError:
            refused += 1
        except BaseException:
            with failures.open("a") as file:
                file.write(f"{kind} {number}\n{traceback.format_exc()}\n")
    if refused < ROUNDS // 4:
        failures.write_text(f"{kind}: only {refused} of {ROUNDS} were refused; the damage misses")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_opened_or_refused_but_never_crash(tmp_path: Path, kind: str) -> None:
    failures = tmp_path / "failures"
    (tmp_path / "files").mkdir()
    process = multiprocessing.get_context("fork").Process(
        target=feed, args=(kind, tmp_path / "files", failures)
    )
    process.start()
    process.join()
    shutil.rmtree(tmp_path / "files")
    assert process.exitcode == 0, f"the reader died with {process.exitcode}"
    assert not failures.exists(), failures.read_text()[:4000]
