"""A checkpoint directory on disk: its files, the manifest, how it is written and when it counts as complete.

A directory holds `consolidated.NN.pth` (an adapter directory `adapter.NN.pth` and adapter.json), the tokenizer's
files, params.json and manifest.json. All of it is written to a staging directory inside, flushed and hashed, and
then moved into place, the manifest last: a save that is killed leaves the old checkpoint, or none that counts. What is
written is locked, one process at a time; the kernel frees a lock when its holder dies, however it dies.
"""

import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from src import parallel
from src.checkpoint.tensor_files import (
    TensorSpec,
    as_stored,
    digest_path,
    file_hash,
    open_tensor_file,
    read_torch,
)
from src.errors import UserError
from src.jsonfile import check_file, flush, read_json, telling_full_disk, write_json, write_whole
from src.text.extend import GENERATION
from src.text.tokenizer import VOCABULARY_FILES

WEIGHTS, ADAPTER, OPTIMIZER = "consolidated", "adapter", "optimizer"  # kinds of shards
# What would be taken for weights next to ours. Shards of an earlier save make way; these are not ours to remove.
FOREIGN_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*.safetensors", "*.gguf")
DOCUMENTS = (
    "manifest.json", "params.json", "adapter.json", "state.json", "config.json", "adapter_config.json",
    "model.safetensors.index.json",
)
OF_OTHERS = ("config.json", "state.json")  # without a manifest these may be anybody's
MANIFEST_FORMAT = 3  # 2 added the rotary layout, the tie and the cut of each parameter, 3 hashes by BLAKE3
# A tokenizer is a vocabulary, one or two files, and files about special tokens and chats.
_VOCABULARY = (*VOCABULARY_FILES, "merges.txt")
TOKENIZER_FILES = (
    *_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", GENERATION,
    "chat_template.jinja", "chat_template.json",
)
LOCK = ".lock"
_HELD: dict[Path, AbstractContextManager[None]] = {}  # what hold() keeps
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NAMES_BY_SUFFIX = {".model": "tokenizer.model", ".tiktoken": "qwen.tiktoken"}


def shard_name(kind: str, index: int) -> str:
    """File name of one shard; two digits, so that names sort by rank."""
    return f"{kind}.{index:02d}.pth"


def shard_paths(folder: Path, kind: str = WEIGHTS) -> list[Path]:
    """The shards of a directory by rank. Raises UserError when the numbering has a hole."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{kind}.*.pth")):
        number = path.name.removeprefix(f"{kind}.").removesuffix(".pth")
        if not (number.isascii() and number.isdigit()):
            continue
        if int(number) in found:
            raise UserError(f"{folder}: {found[int(number)].name} and {path.name} are both shard {int(number)}; remove "
                            "one")
        found[int(number)] = inside(folder, path)
    if sorted(found) != list(range(len(found))):
        hole = next(i for i in range(len(found)) if i not in found)
        raise UserError(f"{folder} has {len(found)} {kind} shards but {shard_name(kind, hole)} is missing; restore it "
                        "or split the checkpoint again")
    return [found[i] for i in range(len(found))]


def inside(folder: Path, path: Path) -> Path:
    """A file of a directory, proven to lie in it: a link must not lead out, except into the same hub cache.
    huggingface_hub keeps a model as snapshots/REVISION/NAME -> ../../blobs/HASH. Raises UserError."""
    real, home = path.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and real.is_relative_to(home.parents[1] / "blobs")
    if not (real.is_relative_to(home) or in_cache):
        raise UserError(f"{path} is a link to {real}, outside its directory; name that file itself, or copy it here")
    return path


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors [...] of one of our shards, memory-mapped. Raises UserError unless it holds tensors alone."""
    values = read_torch(path)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}; expected tensors only")
        as_stored(path, name, value)
    return values


def staging(folder: Path) -> Path:
    """Where the files of a save lie until finish() moves them into the directory."""
    return folder / ".partial"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a directory for one save: no other process can write there. What finish() has not moved is discarded. Raises
    UserError when another process is writing, or the disk is full; the directory is then as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not staging(folder).exists():  # else a killed save may have moved some of its own already
            found = {path.name for pattern in FOREIGN_WEIGHTS for path in folder.glob(pattern)}
            if foreign := sorted(found - manifest_files(folder).keys()):
                raise UserError(f"{folder} holds {foreign[0]}, weights that were not written here; choose an empty "
                                "directory")
        shutil.rmtree(staging(folder), ignore_errors=True)  # left by a save that was killed
        staging(folder).mkdir()
        advice = "what was there before is untouched. Free some space and run the same command again"
        try:
            with telling_full_disk(folder, advice):
                yield
        finally:
            shutil.rmtree(staging(folder), ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a checkpoint directory; from the first moment on it does not count as one."""
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "params.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_shard(
    folder: Path, kind: str, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write one shard of the save that is under way, a tensor [...] at a time. dtype None keeps every tensor's.

    Data-parallel rank 0 calls this while the others send their parts.
    """
    layout = {name: TensorSpec(tuple(t.shape), dtype or t.dtype) for name, t in tensors.items()}
    with open_tensor_file(staging(folder) / shard_name(kind, index), layout) as file:
        for name, tensor in tensors.items():
            file.write(name, parallel.gather_on_first(tensor))


def finish(
    folder: Path, n: int, documents: Mapping[str, Mapping[str, object]], tokenizer_files: Sequence[Path],
    facts: Mapping[str, object],
) -> None:
    """Complete the save whose n shards (tensor files of each kind) are written, and move it into place.

    documents: json files by name, such as params.json; they follow the tensors, and manifest.json comes last.
    facts: what the manifest says besides the number, size and hash of the tensor files.
    """
    place = staging(folder)
    copy_tokenizer(tokenizer_files, place)
    tensor_files = sorted(path for path in place.iterdir() if path.suffix in (".pth", ".safetensors", ".gguf"))
    assert tensor_files and len(tensor_files) % n == 0, tensor_files  # a resumable checkpoint has two kinds
    files = {}
    for path in tensor_files:
        digest = digest_path(path)  # its writer left it there
        files[path.name] = {"bytes": path.stat().st_size, "blake3": digest.read_text()}
        digest.unlink()
    manifest = {"format": MANIFEST_FORMAT, "shards": n, "files": files, **facts}
    documents = {**documents, "manifest.json": manifest}
    for name, values in documents.items():
        write_json(place / name, values)
    _install(folder, list(documents))


def _install(folder: Path, documents: Sequence[str]) -> None:
    """Move a complete staging directory into place, documents last; the checkpoint that was there ends first."""
    old, ours = [folder / name for name in manifest_files(folder)], (folder / "manifest.json").is_file()
    for name in DOCUMENTS:
        if ours or name not in OF_OTHERS:
            (folder / name).unlink(missing_ok=True)
    flush(folder)
    for path in (*old, *folder.glob(f"{WEIGHTS}.*.pth"), *folder.glob(f"{ADAPTER}.*.pth")):
        path.unlink(missing_ok=True)
    if tokenizer_files(staging(folder)):  # no file of an earlier tokenizer must mingle with it
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    for path in staging(folder).iterdir():
        if path.name not in documents:
            os.replace(path, folder / path.name)
    flush(folder)
    for name in documents:
        os.replace(staging(folder) / name, folder / name)
    flush(folder)


def copy_tokenizer(files: Sequence[Path], folder: Path) -> None:
    """Put a tokenizer's files into a directory, where a vocabulary has the name by which it is found."""
    for source in files:
        check_file(source)
        target = folder / _NAMES_BY_SUFFIX.get(source.suffix, source.name)
        if source.resolve() != target.resolve():
            write_whole(target, lambda temporary, source=source: shutil.copyfile(source, temporary))


def publish(source: Path, target: Path) -> None:
    """Make `target` a checkpoint of the same weights as the complete directory `source`, without its training state.
    Shards are hard links where the file system has them, so nothing is stored twice."""
    manifest = read_manifest(source)
    state = {"state.json", *(name for name in manifest["files"] if name.startswith(f"{OPTIMIZER}."))}
    manifest["files"] = {name: facts for name, facts in manifest["files"].items() if name not in state}
    with writing(target):
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name not in state:
                try:
                    os.link(path, staging(target) / path.name)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(path, staging(target) / path.name)
        write_json(staging(target) / "manifest.json", manifest)
        _install(target, ["params.json", "manifest.json"])


def check_complete(folder: Path) -> None:
    """Raise UserError unless every file that the manifest names is there with its size. Directories without a manifest
    (Meta's, Llama-RLHF's) only need params.json."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory; expected a checkpoint made by checkpoint_split.py")
    if not (folder / "params.json").is_file():
        foreign = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
        foreign += sorted(path.name for path in folder.glob("*.gguf"))
        raise UserError(f"{folder} has no params.json: it is no checkpoint" + (
            f" of ours but what {foreign[0]} describes; bring it here with checkpoint_split.py --ckpt_file {folder} "
            "--save_path NEW" if foreign else
            ", or its save was interrupted; make it again with checkpoint_split.py or the trainer"))
    known = manifest_files(folder)
    for name, facts in known.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its manifest names; restore it or split the checkpoint "
                            "again")
        size = inside(folder, folder / name).stat().st_size
        if size != facts["bytes"]:
            raise UserError(f"{folder / name} has {size} bytes but the manifest says {facts['bytes']}: it was "
                            "truncated or changed; restore it or split the checkpoint again")
    for path in (*shard_paths(folder), *shard_paths(folder, ADAPTER)):
        if known and path.name not in known:
            raise UserError(f"{path} is not in the manifest beside it: it is of another checkpoint; remove it")


def read_manifest(folder: Path) -> dict[str, object]:
    """The manifest of a directory, empty without one. Raises UserError if it is malformed or names no file."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    manifest = read_json(path)
    for key, kind in (("shards", int), ("files", dict), ("split", dict)):
        if key not in manifest and key != "split":
            raise UserError(f"{path}: key {key!r} is missing; split the checkpoint again")
        if type(manifest.get(key, kind())) is not kind:
            expected = "a number" if kind is int else "an object by name"
            raise UserError(f"{path}: {key}={str(manifest[key])[:100]}; expected {expected}")
    if manifest.get("format", MANIFEST_FORMAT) not in range(1, MANIFEST_FORMAT + 1):
        raise UserError(f"{path}: format={str(manifest['format'])[:100]}; a newer version of SplitRL may have written "
                        "it")
    if not manifest["files"]:
        raise UserError(f"{path} names no files, so nothing shows that the weights are whole; split the checkpoint "
                        "again")
    for name, facts in manifest["files"].items():
        if Path(name).name != name or not isinstance(facts, dict) or not {"bytes", "blake3"} <= facts.keys():
            raise UserError(f"{path}: entry {name!r} is not a file of this directory with its bytes and blake3")
    return manifest


def manifest_files(folder: Path) -> dict[str, dict[str, object]]:
    """Size and hash of each tensor file by the manifest; empty without one. Raises UserError if it is malformed."""
    return read_manifest(folder).get("files", {})


def verify_hashes(folder: Path, prefix: str = "", index: int = 0, n: int = 1) -> None:
    """Read the tensor files of a directory and compare them with the manifest. Raises UserError that names the file.
    prefix: only files whose names begin so. Of n processes that share the work, this is number `index`."""
    files = [each for each in sorted(manifest_files(folder).items()) if each[0].startswith(prefix)]
    for name, facts in files[index::n]:
        if file_hash(folder / name) != facts["blake3"]:
            raise UserError(f"{folder / name} has the right size but other contents than were written: bits were "
                            "flipped or it was edited; restore it or split the checkpoint again")


def fingerprint(folder: Path) -> str:
    """One hash for a checkpoint's weights: of the manifest's file hashes, or of the shards without one."""
    files = manifest_files(folder)
    hashes = [str(files[name]["blake3"]) for name in sorted(files) if name.startswith((WEIGHTS, ADAPTER))]
    hashes = hashes or [file_hash(path) for path in shard_paths(folder)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer files that lie in a directory, or a vocabulary file with those that go with it. Other vocabularies
    in the directory of a named one are left out: they are other tokenizers."""
    if path.is_dir():
        return [inside(path, path / name) for name in TOKENIZER_FILES if (path / name).is_file()]
    with_it = {"vocab.json": ("merges.txt",)}.get(path.name, ())
    names = [name for name in TOKENIZER_FILES if name in with_it or name not in _VOCABULARY]
    return [path, *(path.with_name(name) for name in names if path.with_name(name).is_file())]


def with_ends_of(model_files: Sequence[Path], tokenizer: list[Path]) -> list[Path]:
    """A tokenizer's files and, unless one of its own is among them, the generation_config.json of a model's files: it
    says what ends the model's responses."""
    known = {file.name for file in tokenizer}
    return tokenizer + [file for file in model_files if file.name == GENERATION and file.name not in known]


def temporary_folder() -> Path:
    """An empty directory, which is gone when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def has_vocabulary(files: Sequence[Path]) -> bool:
    """Whether these files of tokenizer_files() make a tokenizer: files about special tokens alone do not."""
    return any(_NAMES_BY_SUFFIX.get(file.suffix, file.name) in _VOCABULARY for file in files)


def claim(folder: Path) -> None:
    """check_writable(), and keep the directory for this run until its process ends, be it killed; all ranks call this.
    Raises UserError, too, if a process of another run holds it."""
    check_writable(folder)
    if parallel.rank() == 0:
        hold(folder)


def check_writable(folder: Path) -> None:
    """Make the directory and prove that a file can be written there, before any work. Raises UserError."""
    probe = folder / f".write-probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        raise UserError(f"cannot write to {folder} ({problem.strerror}); choose another directory") from None


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of a directory has room for `needed` bytes more."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {needed:,} bytes are needed but {free:,} are free; free some space or choose "
                        "another disk")


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold a directory, which exists, or a file. Raises UserError that names the process if another one does. What this
    process keeps by hold() it has. Where the file system has no locks this holds nothing."""
    if place.resolve() in _HELD:
        yield
        return
    path = place / LOCK if place.is_dir() else place.with_name(f".{place.name}{LOCK}")
    file = _lock(path, place)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(path: Path, place: Path) -> int:
    """The lock file of a place, open and locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process, _, host = os.read(file, 300).decode(errors="replace").partition(" ")
            os.close(file)
            where = f" on {host}" if host not in ("", socket.gethostname()) else ""
            raise UserError(f"{place} is being written by process {process or '?'}{where}; wait for it, or choose "
                            "another place") from None
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # its last holder removed it between our open and our lock


def hold(folder: Path) -> None:
    """Keep a directory for this process until it ends. Raises UserError if another process holds it."""
    if folder.resolve() not in _HELD:
        lock = alone(folder)
        lock.__enter__()
        _HELD[folder.resolve()] = lock
        atexit.register(lock.__exit__, None, None, None)
