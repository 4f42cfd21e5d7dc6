"""src/training/optimizers.py: AdamW with 8-bit moments trains, is saved and goes on."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchao.optim import AdamW8bit
from transformers import LlamaConfig, LlamaForCausalLM

from src import parallel
from src.errors import UserError
from src.training.optimizers import BETAS, AdamW, AdamWIn8Bits, encode
from tests import tiny
from tests.ranks import Job, run_jobs
from tests.training.workers import resumed_epochs

TARGET = "tests.training.workers:resumed_epochs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose matrices have the 4096 values that 8-bit moments begin at, even on two ranks."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(root / "hf")
    tiny.write_tokenizer(root / "hf")
    return tiny.split(root / "hf", root / "one")


def gradient(step: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def step_of(weight: torch.nn.Parameter, optimizer: AdamW | AdamWIn8Bits, step: int) -> None:
    weight.grad = gradient(step, weight.shape) - 0.5  # mostly negative: so are the largest of many blocks
    optimizer.step(1e-2)


def adamw(weight: torch.nn.Parameter, kind: type[AdamW | AdamWIn8Bits] = AdamWIn8Bits) -> AdamW | AdamWIn8Bits:
    return kind([{"params": [weight], "weight_decay": 0.1}])


def test_float32_moments_give_the_bits_of_torch_s_own_class() -> None:
    parallel.start()
    ours, torchs = ([torch.nn.Parameter(gradient(0, torch.Size(shape))) for shape in ([8, 32], [32])] for _ in "ab")
    optimizer = AdamW([{"params": [x], "weight_decay": 0.1 * x.dim() - 0.1} for x in ours], eps=1e-6)
    groups = [{"params": [x], "weight_decay": 0.1 * x.dim() - 0.1} for x in torchs]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=1e-6, fused=True)
    for step in range(1, 8):
        for x in (*ours, *torchs):
            x.grad = gradient(step, x.shape) if step != 4 or x.dim() > 1 else None
        for group in reference.param_groups:
            group["lr"] = 1e-2 / step
        reference.step()
        optimizer.step(1e-2 / step)
        assert all(map(torch.equal, ours, torchs))
    assert all(torch.equal(optimizer.moment(x, "exp_avg_sq"), reference.state[y]["exp_avg_sq"])
               for x, y in zip(ours, torchs, strict=True))
    optimizer.zero_grad()
    assert ours[0].grad is ours[1].grad is None


def test_moments_go_to_float32_and_back_without_a_change() -> None:
    """What load() takes up is what moment() gave, and the next updates are the same bits."""
    parallel.start()
    weight = torch.nn.Parameter(gradient(0, torch.Size([64, 256])))
    optimizer = adamw(weight)
    for step in range(1, 6):
        step_of(weight, optimizer, step)
    twin = torch.nn.Parameter(weight.detach().clone())
    other, moments = adamw(twin), {name: optimizer.moment(weight, name) for name in ("exp_avg", "exp_avg_sq")}
    other.load(twin, 5, moments)
    for name, moment in moments.items():
        assert moment.dtype == torch.float32 and moment.unique().numel() > 100
        assert torch.equal(other.moment(twin, name), moment)
    for step in range(6, 9):
        step_of(weight, optimizer, step)
        step_of(twin, other, step)
    assert torch.equal(weight, twin)


def test_other_values_are_rounded_to_their_nearest_codes() -> None:
    held = AdamW8bit([torch.nn.Parameter(torch.zeros(16, 256))])._new_buffer(torch.zeros(16, 256), signed=True)
    values = -gradient(1, torch.Size([16, 256])).abs()
    encode(held, values)
    largest = values.abs().amax(1, keepdim=True)
    assert ((held.dequantize() - values).abs() <= 0.008 * largest).all()


def test_it_follows_adamw_in_a_quarter_of_the_memory() -> None:
    parallel.start()
    ended, sizes = {}, {}
    for kind in (AdamW, AdamWIn8Bits):
        weight = torch.nn.Parameter(gradient(0, torch.Size([64, 256])))
        optimizer = adamw(weight, kind)
        for step in range(1, 20):
            step_of(weight, optimizer, step)
        ended[kind], sizes[kind] = weight.detach(), sum(tensor.nbytes for tensor in optimizer.held())
    start = gradient(0, torch.Size([64, 256]))
    moved = [ended[kind] - start for kind in ended]
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()
    assert sizes[AdamWIn8Bits] / sizes[AdamW] == pytest.approx(0.25 + 1 / 256)


@pytest.mark.parametrize("lora_rank", [-1, 64])
def test_a_resumed_run_ends_with_the_same_bits(folder: str, tmp_path: Path, lora_rank: int) -> None:
    parallel.start()
    options = {"lora_rank": lora_rank, "optimizer": "adamw_8bit"}
    whole = resumed_epochs(folder, str(tmp_path / "whole"), 0, 8, **options)
    parts = [resumed_epochs(folder, str(tmp_path / "parts"), *part, **options) for part in ((0, 3), (3, 8))]
    losses = torch.cat([part.pop("losses") for part in parts])
    assert torch.equal(losses, whole.pop("losses"))
    assert losses[-2:].mean() < losses[:2].mean()
    assert all(torch.equal(parts[1][name], tensor) for name, tensor in whole.items())


def test_a_run_goes_on_at_another_number_of_ranks(folder: str, tmp_path: Path) -> None:
    """On tensor-parallel, then data-parallel ranks, then alone, then with float32 moments."""
    parallel.start()
    whole = resumed_epochs(folder, str(tmp_path / "whole"), 0, 8, optimizer="adamw_8bit")["losses"]
    save_dir = str(tmp_path / "run")
    where = {"folder": folder, "save_dir": save_dir, "optimizer": "adamw_8bit"}
    jobs = [Job(2, TARGET, where | {"first": first, "last": first + 2}, size) for size, first in ((2, 0), (1, 2))]
    parts = [ranks[0] for ranks in run_jobs(jobs, tmp_path)]
    parts.append(resumed_epochs(folder, save_dir, 4, 6, optimizer="adamw_8bit"))
    parts.append(resumed_epochs(folder, save_dir, 6, 8))
    found = torch.cat([part["losses"] for part in parts])
    assert_close(found, whole, rtol=0, atol=2e-3)  # blocks end elsewhere, so moments are rounded otherwise


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    adamw(weight)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="--optimizer adamw_8bit needs the package torchao"):
        adamw(weight)
