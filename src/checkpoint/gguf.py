"""GGUF, llama.cpp's file format: metadata and quantised tensors in one file. The only door to the gguf package.

The header is read here, not by the package's reader: that one believes the counts of a forged file, and takes seconds
for a vocabulary. What a header claims is compared with the size of the file before memory is taken for it.
"""

import errno
import functools
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor

from src.checkpoint import storage
from src.checkpoint.tensor_files import StoredTensor, check_range, digest_path, file_hash
from src.errors import UserError
from src.jsonfile import check_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits; no writer has made it since August 2023
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES = {dtype: name for name, dtype in _PLAIN.items()} | {"q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}  # general.file_type, which llama.cpp prints
_MAX_DIMS = 4
_Q8_BLOCK, _Q8_LARGEST = 32, 127  # values that share a scale, and the largest code
_CHUNK = 2**20  # values packed or unpacked at a time: the package needs some ten times their memory
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
T = TypeVar("T")


class Entry(NamedTuple):
    """What the header says of a tensor: its shape in torch's order, how it is stored, where in the data section."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class GgufFile(NamedTuple):
    """An opened file, or the parts of a split one: metadata by key, and tensors by their names in the file."""

    files: list[Path]
    metadata: dict[str, object]
    tensors: dict[str, StoredTensor]


def gguf_file(paths: list[Path]) -> Path | None:
    """The GGUF file that is meant by what a user names: one, or a directory of weights in one. Raises UserError."""
    if len(paths) == 1 and paths[0].is_dir():
        found = sorted(paths[0].glob("*.gguf"))
        others = [path for path in paths[0].iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
        if not found or others:  # other weights are what a directory means
            return None
        if len([path for path in found if (_part(path) or (0,))[0] == 0]) > 1:
            raise UserError(f"{paths[0]} holds {len(found)} GGUF files, of several checkpoints or precisions; name the "
                            "one to read")
        return storage.inside(paths[0], found[0])
    named = [path for path in paths if path.suffix == ".gguf" or _begins_as_gguf(path)]
    if named and len(paths) > 1:
        raise UserError(f"{named[0]} is a GGUF file, which is read alone; of a split one name the first part")
    return named[0] if named else None


def _begins_as_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _part(path: Path) -> tuple[int, int] | None:
    """Which part of how many a file's name says it is, from 0."""
    found = _PART.fullmatch(path.name)
    return (int(found[2]) - 1, int(found[3])) if found else None


def open_gguf(path: Path) -> GgufFile:
    """Open a file, or all parts of a split one by its first. Raises UserError that names the file and what is wrong.
    Quantised tensors are float32 when they are loaded."""
    file = _open_one(path)
    count = file.metadata.get("split.count", 0)
    index, n = _part(path) or (0, 1)
    if count not in (0, 1, n) or index:
        raise UserError(f"{path} is part {file.metadata.get('split.no', index)} of {count or n} of a split file; name "
                        f"the first, ...-00001-of-{count or n:05d}.gguf, with the others beside it")
    files, tensors = list(file.files), dict(file.tensors)
    for number in range(1, n if count == n else 1):
        part = _open_one(path.with_name(f"{_PART.fullmatch(path.name)[1]}-{number + 1:05d}-of-{n:05d}.gguf"))
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, n):
            raise UserError(f"{part.files[0]} does not say that it is part {number} of {n}; it is of another file")
        if twice := tensors.keys() & part.tensors.keys():
            raise UserError(f"{part.files[0]}: tensor {min(twice)!r} is in an earlier part too")
        files += part.files
        tensors |= part.tensors
    if file.metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise UserError(f"{path}: split.tensors.count={file.metadata['split.tensors.count']}; found {len(tensors)}")
    return GgufFile(files, file.metadata, tensors)


def _open_one(path: Path) -> GgufFile:
    check_file(path)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24 or file.read(4) != MAGIC:
            raise UserError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()} and its counts")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(path, data)
    except struct.error:
        raise UserError(f"{path} is truncated: its header goes on beyond the {len(data):,} bytes of it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: a text in its header is not UTF-8") from None


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    """Header and lazy tensors. Raises struct.error or UnicodeDecodeError where the header makes no sense."""
    header = _Header(path, data)
    version = header.take("I")
    if version not in _VERSIONS:
        big = " (its bytes may be in big-endian order)" if version & 0xFFFF == 0 else ""
        raise UserError(f"{path} is GGUF of version {version}{big}; expected version 2 or 3")
    n_tensors, n_keys = header.take("Q"), header.take("Q")
    metadata = header.table("key", n_keys, lambda key: header.value(header.take("I")))
    entries = header.table("tensor", n_tensors, header.entry)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"{path}: general.alignment={alignment!r}; expected a power of two")
    start = -(-header.at // alignment) * alignment
    for name, entry in entries.items():
        if start + entry.offset + entry.nbytes > len(data):
            raise UserError(f"{path} is truncated: {name!r} lies at bytes {start + entry.offset:,} to "
                            f"{start + entry.offset + entry.nbytes:,} of a file of {len(data):,}")
    if start + sum(entry.nbytes for entry in entries.values()) > max(len(data), start):
        raise UserError(f"{path}: its tensors claim more bytes than the file has; the file is corrupt or forged")
    tensors = {name: StoredTensor(entry.shape, functools.partial(_load, data, start + entry.offset, entry),
                                  _PLAIN.get(entry.kind.name, torch.float32))
               for name, entry in entries.items()}
    return GgufFile([path], metadata, tensors)


class _Header:
    """A place in a header, and what is read from there on. Methods raise struct.error at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def take(self, kind: str) -> int | float | bool:
        """A number of one of struct's kinds."""
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def check(self, nbytes: int) -> None:
        """Raise struct.error unless the file has so many bytes more."""
        if nbytes > len(self.data) - self.at:
            raise struct.error

    def text(self) -> str:
        """A length and as many bytes of UTF-8."""
        length = self.take("Q")
        self.check(length)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def table(self, what: str, count: int, read: Callable[[str], T]) -> dict[str, T]:
        """So many names, each with what `read` finds after it. Raises UserError for a name that stands twice."""
        found: dict[str, T] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise UserError(f"{self.path}: {what} {name!r} stands twice")
            found[name] = read(name)
        return found

    def value(self, kind: int) -> object:
        """A value of one of GGUF's kinds; an array is a list of numbers or of texts."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise UserError(f"{self.path}: a value of kind {kind}, which GGUF does not know, ends at byte {self.at}")
        inner, count = self.take("I"), self.take("Q")
        if inner == _STRING:
            self.check(8 * count)
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise UserError(f"{self.path}: an array of kind {inner} is not implemented; expected numbers or texts")
        self.check(count * struct.calcsize(_SCALARS[inner]))
        values = struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, self.at)
        self.at += count * struct.calcsize(_SCALARS[inner])
        return list(values)

    def entry(self, name: str) -> Entry:
        """What stands of a tensor after its name. Raises UserError for a type that is not dequantised."""
        n_dims = self.take("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise UserError(f"{self.path}: {name!r} has {n_dims} dimensions; expected 1 to {_MAX_DIMS}")
        shape = tuple(reversed([self.take("Q") for _ in range(n_dims)]))  # a file's first is the fastest
        number, offset = self.take("I"), self.take("Q")
        kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
        kind = kinds.get(number)
        if kind is None or not _can_dequantize(kind):
            raise UserError(f"{self.path}: {name!r} is stored as {kind.name if kind else f'type {number}'}, which is "
                            "not implemented; expected "
                            f"{', '.join(known.name for known in kinds.values() if _can_dequantize(known))}")
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise UserError(f"{self.path}: a row of {name!r} has {shape[-1]} values; {kind.name} packs {block} in one")
        return Entry(shape, kind, offset, _nbytes(shape, kind))


@functools.cache
def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the package turns a tensor of this type into floats."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _load(data: mmap.mmap, start: int, entry: Entry) -> Tensor:
    """A tensor's values [*entry.shape], in the type of the file, or float32 where that packs them."""
    stored = np.frombuffer(data, np.uint8, entry.nbytes, start)
    if entry.kind.name in _PLAIN:
        return torch.from_numpy(stored.copy()).view(_PLAIN[entry.kind.name]).view(entry.shape)
    block, nbytes = gguf.GGML_QUANT_SIZES[entry.kind]
    values = torch.empty(math.prod(entry.shape))
    step = _CHUNK // block
    with np.errstate(all="ignore"):  # damaged scales are infinite; who reads them is warned of it by name
        for first in range(0, len(values) // block, step):
            # one long row: the package works on 16 rows at a time, however short
            part = gguf.dequantize(stored[first * nbytes : (first + step) * nbytes].reshape(1, -1), entry.kind)
            values[first * block : (first + step) * block] = torch.from_numpy(part[0])
    return values.view(entry.shape)


@contextmanager
def create_gguf(
    path: Path, metadata: Mapping[str, object], tensors: Mapping[str, StoredTensor], dtype: str
) -> Iterator[Callable[[str, Tensor], None]]:
    """Create a file with this metadata and room for these tensors; its hash is written next to it. -> the function that
    takes them one after the other, by name; it raises OSError when the disk is full, and UserError for values beyond
    the type.

    dtype: float32, bfloat16, float16 or q8_0 of the matrices, "" keeps every one's. What is no matrix is float32, as
    llama.cpp needs it, and so is a matrix whose rows q8_0 does not divide.
    """
    kinds = {name: _kind_of(stored, dtype) for name, stored in tensors.items()}
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))

    def write(name: str, tensor: Tensor) -> None:
        """Append a tensor [...] in the type that it was laid out with."""
        # a block of q8_0 has a float16, which its codes multiply
        check_range(name, tensor, _PLAIN.get(kinds[name], torch.float16), 1 if kinds[name] in _PLAIN else _Q8_LARGEST)
        try:
            writer.write_tensor_data(_packed(tensor, kinds[name]))
        except OSError as problem:  # numpy tells how many bytes were written, and no errno
            if problem.errno is not None:
                raise
            raise OSError(errno.EFBIG, "The disk or a limit on files is full") from None

    try:
        _add_metadata(writer, metadata, kinds)
        for name, stored in tensors.items():
            kind = gguf.GGMLQuantizationType[kinds[name]]
            shape = gguf.quant_shape_to_byte_shape(stored.shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), _nbytes(stored.shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield write
    finally:
        writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    digest_path(path).write_text(file_hash(path))


def gguf_bytes(tensors: Mapping[str, StoredTensor], dtype: str) -> int:
    """Bytes that these tensors take in a file of this type."""
    return sum(_nbytes(stored.shape, gguf.GGMLQuantizationType[_kind_of(stored, dtype)]) for stored in tensors.values())


def _kind_of(stored: StoredTensor, dtype: str) -> str:
    """The name of the type in which a tensor is written."""
    if len(stored.shape) < 2 or dtype == "q8_0" and stored.shape[-1] % _Q8_BLOCK:
        return "F32"
    return _TYPES["q8_0" if dtype == "q8_0" else getattr(torch, dtype) if dtype else stored.dtype]


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * nbytes


def _packed(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor's bytes in a type, row after row. [...] -> uint8, of any shape."""
    if kind in _PLAIN:
        return tensor.to(_PLAIN[kind]).contiguous().view(torch.uint8).numpy()
    values = tensor.float().contiguous().view(1, -1).numpy()
    packed = gguf.GGMLQuantizationType[kind]
    parts = [gguf.quantize(values[:, at : at + _CHUNK], packed) for at in range(0, values.shape[1], _CHUNK)]
    return np.concatenate(parts, axis=1)


def _add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, object], kinds: Mapping[str, str]) -> None:
    """Give the writer its keys; whole numbers are uint32 and others float32, as llama.cpp asks for them."""
    of_matrices = [kind for kind in kinds.values() if kind != "F32"]
    file_type = _FILE_TYPES[max(set(of_matrices), key=of_matrices.count) if of_matrices else "F32"]
    extra = {"general.file_type": file_type, "general.quantization_version": gguf.GGML_QUANT_VERSION}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (metadata | extra).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":  # the writer has said it
            add[type(value)](key, value)
