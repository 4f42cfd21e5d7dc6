"""Files of tensors, torch's and safetensors': read through memory maps, written one tensor at a time.

The only door to safetensors, to torch.save and torch.load, and to BLAKE3. Reading executes nothing, and writing never
holds more than the tensor at hand: a file is laid out first, with room for every tensor, then filled in place.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from blake3 import blake3
from torch import Tensor
from torch.serialization import skip_data

from src.errors import UserError
from src.jsonfile import check_file

# What torch.load raises on bytes that are no checkpoint: its unpickler checks little before it acts on them.
_UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, NotImplementedError, MemoryError, struct.error,
)
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)")
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FLUSH_BYTES = 32 * 2**20  # enough for a disk to work at its full speed
PIECE_BYTES = 2**18
_ZIP_MAGIC = b"PK\x03\x04"


class TensorSpec(NamedTuple):
    """What a tensor file's layout says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor that is still on disk: its shape, a call that reads it, and the type it is stored in."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    dtype: torch.dtype

    def then(self, compute: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "StoredTensor":
        """What `compute` makes of the tensor [*self.shape], when it is read; shape where that is another one."""
        return self._replace(shape=shape or self.shape, load=lambda: compute(self.load()))


def read_torch(path: Path) -> dict[str, object]:
    """The dictionary in a torch file, tensors memory-mapped where the format allows it; nothing is executed. Raises
    UserError when the file is truncated, corrupt or holds more than tensors and plain values."""
    check_file(path)
    with path.open("rb") as file:
        mappable = file.read(4) == _ZIP_MAGIC  # the format before torch 1.6 is read into memory
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except _UNREADABLE as problem:
        if "Cannot allocate memory" in str(problem):  # torch maps a file privately, which the kernel may refuse
            raise UserError(f"{path} is larger than the memory that this machine lets a process map; read it "
                            "elsewhere, or set vm.overcommit_memory=1") from None
        # torch's own words advise to run the code that such a file holds: only the name of it is repeated
        found = _PICKLED_CODE.search(str(problem))
        code = f" ({found[1][:100]})" if found else ""
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: it is truncated, corrupt, or holds pickled "
                        f"code{code}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a dictionary of tensors")
    return values


def as_stored(path: Path, name: str, tensor: Tensor) -> StoredTensor:
    """A tensor [...] of a torch file that is what it claims to be. Raises UserError otherwise."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UserError(f"{path}: {name!r} is a {tensor.layout} tensor on {tensor.device}; expected a plain dense one "
                        "with data")
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        raise UserError(f"{path}: {name!r} claims {claimed} bytes of which the file holds {held}; the file is corrupt "
                        "or forged")
    return StoredTensor(tuple(tensor.shape), lambda: tensor, tensor.dtype)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, each mapped when asked for. Raises UserError on a bad file."""
    check_file(path)
    try:
        file = safetensors.safe_open(path, framework="pt")
        return {name: _stored_safetensor(path, file, name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as problem:
        raise UserError(f"{path} is not a readable safetensors file ({problem})") from None


def _stored_safetensor(path: Path, file: safetensors.safe_open, name: str) -> StoredTensor:
    piece = file.get_slice(name)
    if piece.get_dtype() not in SAFETENSORS_DTYPES:
        raise UserError(f"{path}: {name!r} is stored as {piece.get_dtype()}; expected one of "
                        f"{', '.join(SAFETENSORS_DTYPES)}")
    return StoredTensor(tuple(piece.get_shape()), lambda: file.get_tensor(name), SAFETENSORS_DTYPES[piece.get_dtype()])


def check_range(name: str, tensor: Tensor, dtype: torch.dtype, codes: int = 1) -> None:
    """Raise UserError where a finite value of a tensor [...] would be infinite in dtype, or as so many times one of its
    numbers. Only float16 ends where weights may lie."""
    if dtype != torch.float16 or tensor.dtype == dtype or not tensor.numel():
        return
    ends = torch.stack(torch.aminmax(tensor.detach()))
    if (ends.isfinite() & (ends / codes).to(dtype).isinf()).any():
        most = f"{codes * torch.finfo(dtype).max:.6g}{' here' if codes > 1 else ''}"
        raise UserError(f"{name} holds {ends.abs().max():.6g}, but float16 ends at {most}; store it as bfloat16 or "
                        "float32")


class TensorFile:
    """A laid-out file that is filled one tensor at a time, in the order of `names`; open_tensor_file() makes one.

    A thread of its own hashes (BLAKE3) and writes each tensor: nothing is read twice, and files that are filled side
    by side share the processors.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, TensorSpec], offsets: Mapping[str, int],
        checksums: Mapping[str, Sequence[int]],
    ) -> None:
        """offsets: where a tensor's bytes begin; checksums: where their CRC-32 is written, after them."""
        self.names = sorted(layout, key=lambda name: offsets[name])
        self._path, self._layout, self._offsets, self._checksums = path, layout, offsets, checksums
        self._file = os.open(path, os.O_RDWR)
        self._taken = 0  # tensors
        self._hash, self._hashed = blake3(), 0  # bytes
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._flushing = 0  # bytes that the disk has been asked to take

    def write(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor [...], in the layout's type, once the one before it is written. It must not change then.
        Raises UserError for values beyond that type, and OSError when the disk is full, of this tensor at the next
        call."""
        shape, dtype = self._layout[name]
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} into room for {shape}"
        assert name == self.names[self._taken], f"{name} is written before {self.names[self._taken]}"
        check_range(name, tensor, dtype)
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        self._wait()  # so that one tensor a file is in memory
        self._writing = self._writer.submit(self._put, name, memoryview(flat.view(torch.uint8).numpy()))
        self._taken += 1

    def _put(self, name: str, data: memoryview) -> None:
        """Hash, sum up and write a tensor's bytes, a piece that stays in the processor's cache at a time."""
        checksum = 0
        self._hash_until(self._offsets[name])
        while data:
            piece = data[:PIECE_BYTES]
            self._hash.update(piece)
            if self._checksums:
                checksum = zlib.crc32(piece, checksum)
            while piece:
                written = os.pwrite(self._file, piece, self._hashed)
                data, piece, self._hashed = data[written:], piece[written:], self._hashed + written
        for place in self._checksums.get(name, ()):
            os.pwrite(self._file, struct.pack("<I", checksum), place)
        if self._hashed - self._flushing > FLUSH_BYTES and sys.platform == "linux":
            # starts writing without waiting for it, so that the fsync at the end is short
            size = self._hashed - self._flushing
            os.posix_fadvise(self._file, self._flushing, size, os.POSIX_FADV_DONTNEED)
            self._flushing = self._hashed

    def _hash_until(self, offset: int) -> None:
        """Hash what lies between the bytes hashed so far and this place."""
        self._hash.update(os.pread(self._file, offset - self._hashed, self._hashed))
        self._hashed = offset

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def complete(self) -> None:
        """Put the file on the disk, and its hash next to it. Raises OSError when the disk is full."""
        assert self._taken == len(self.names), f"{self._path}: nothing was written for {self.names[self._taken]}"
        self._wait()
        self._hash_until(os.fstat(self._file).st_size)
        os.fsync(self._file)
        digest_path(self._path).write_text(self._hash.hexdigest())

    def close(self) -> None:
        """End the writer's thread and close the file; what was not finished is nothing that counts."""
        self._writer.shutdown()
        os.close(self._file)


def file_hash(path: Path) -> str:
    """Hex BLAKE3 of a file's bytes; a processor does several GB a second, three times what SHA-256 instructions do.
    Raises UserError for what is no regular file."""
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake3).hexdigest()


def digest_path(path: Path) -> Path:
    """Where the hash of a file lies until the manifest takes it."""
    return path.with_name(path.name + ".blake3")


@contextmanager
def open_tensor_file(path: Path, layout: Mapping[str, TensorSpec]) -> Iterator[TensorFile]:
    """Create a file of these tensors, to be filled: safetensors' where its name says so, else one that
    torch.load(weights_only=True, mmap=True) opens as a dictionary. It is complete unless its user fails."""
    lay_out = _lay_out_safetensors if path.suffix == ".safetensors" else _lay_out_torch
    file = TensorFile(path, layout, *lay_out(path, layout))
    try:
        yield file
        file.complete()
    finally:
        file.close()


Places = tuple[dict[str, int], dict[str, tuple[int, int]]]  # of each tensor: its first byte, its CRC-32s if it has any


def _lay_out_torch(path: Path, layout: Mapping[str, TensorSpec]) -> Places:
    """Have torch.save write a file with room for the tensors, which numbers storages as they come. A CRC-32 follows the
    bytes (in the data descriptor) and in the archive's directory (APPNOTE.TXT, 4.3)."""
    try:
        with skip_data():  # the memory of torch.empty is never touched, so none is used
            torch.save({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}, path)
    except RuntimeError:  # of torch's writer, which tells no errno
        raise OSError(errno.EFBIG, "The disk or a limit on files is full", str(path)) from None
    starts, checksums = {}, {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.start_dir
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            folder, _, number = record.filename.rpartition("/")
            if folder.endswith("/data"):
                begin = record.header_offset + 30 + name_length + extra_length
                starts[int(number)] = begin
                checksums[int(number)] = begin + record.file_size + 4, entry + 16
            file.seek(entry + 28)
            entry += 46 + sum(struct.unpack("<HHH", file.read(6)))  # its name, extra field and comment
    return tuple({name: of[index] for index, name in enumerate(layout)} for of in (starts, checksums))


def _lay_out_safetensors(path: Path, layout: Mapping[str, TensorSpec]) -> Places:
    """Write the header, and make room for the tensors (https://huggingface.co/docs/safetensors, Format)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    # wide types first: every tensor then starts at a multiple of its element
    for name, spec in sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name] = offset
        header[name] = {"dtype": _SAFETENSORS_NAMES[spec.dtype], "shape": list(spec.shape),
                        "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}, {}
