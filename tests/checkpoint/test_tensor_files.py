"""src/checkpoint/tensor_files.py: files that torch and Python's zipfile agree on, and the hash of what was written."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.checkpoint import tensor_files
from src.checkpoint.tensor_files import PIECE_BYTES, TensorSpec, open_tensor_file
from src.errors import UserError

TENSORS = {
    "piece and a bit": torch.randn(PIECE_BYTES // 4 + 3),
    "empty": torch.zeros(0, 3),
    "one": torch.tensor([7], dtype=torch.uint8),
    "pieces": torch.randn(3 * PIECE_BYTES // 2).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    layout = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with open_tensor_file(path, layout) as file:
        for name in file.names:
            file.write(name, tensors[name])
    return path


@pytest.mark.parametrize("names", [list(TENSORS), ["one"], ["empty", "pieces"], []])
def test_zipfile_and_torch_agree_on_every_file(tmp_path: Path, names: list[str]) -> None:
    tensors = {name: TENSORS[name] for name in names}
    path = write(tmp_path / "a.pth", tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mapped in (True, False):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in names)
    assert tensor_files.digest_path(path).read_text() == tensor_files.file_hash(path)


def test_zipfile_finds_a_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", TENSORS)
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["pieces"].view(torch.uint8).numpy().tobytes()) + PIECE_BYTES + 5] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "a/data/3"


def test_places_of_checksums_in_a_file_beyond_32_bits(tmp_path: Path) -> None:
    """Laid out alone: a file with holes, of which nothing is written."""
    layout = {"large": TensorSpec((5 * 2**30,), torch.uint8), "behind": TensorSpec((3,), torch.float32)}
    path = tmp_path / "a.pth"
    starts, checksums = tensor_files._lay_out_torch(path, layout)
    assert starts["behind"] - starts["large"] > 5 * 2**30
    with path.open("rb") as file:
        for name in layout:
            behind, entry = checksums[name]
            assert behind == starts[name] + layout[name].nbytes + 4
            assert os.pread(file.fileno(), 4, behind - 4) == b"PK\x07\x08"
            assert os.pread(file.fileno(), 4, entry - 16) == b"PK\x01\x02"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_float16_would_make_infinite_is_refused(tmp_path: Path, suffix: str) -> None:
    path, layout = tmp_path / f"a.{suffix}", {"w": TensorSpec((3,), torch.float16)}
    for values in ([1.0, -65504.0, 65519.0], [float("inf"), float("nan"), 1e9]):  # what was damaged is told elsewhere
        with open_tensor_file(path, layout) as file:
            file.write("w", torch.tensor(values))
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match="w holds (1e.06|999424), but float16 ends at 65504; store it as bfloat16"):
            with open_tensor_file(path, layout) as file:
                file.write("w", torch.tensor([0.0, 1.0, -1e6], dtype=dtype))
    with open_tensor_file(path, {"w": TensorSpec((1,), torch.bfloat16)}) as file:
        file.write("w", torch.tensor([1e6]))
