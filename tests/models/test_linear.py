import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from src.models import linear as module
from src.models.linear import linear


@pytest.mark.parametrize("shape", [(1,), (3,), (129,), (2, 5), (0,), (0, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_other_library(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(*shape, 48), torch.randn(40, 48)
    added = torch.randn(40) if bias else None
    with torch.inference_mode():
        found = linear(x, weight, added)
    assert found.shape == (*shape, 40)
    assert_close(found, F.linear(x, weight, added), atol=2e-5, rtol=1e-5)


def test_strided_rows_and_weights() -> None:
    x, weight = torch.randn(6, 9, 32)[:, -1], torch.randn(32, 20).t()
    with torch.inference_mode():
        assert_close(linear(x, weight), F.linear(x, weight), atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")
def test_a_weight_with_gaps_between_its_rows_is_as_fast_as_one_without() -> None:
    x, wide = torch.randn(64, 576), torch.randn(576, 640)
    weights = wide[:, :576].contiguous(), wide[:, :576]

    def seconds(weight: Tensor) -> float:
        start = time.process_time()
        linear(x, weight)
        return time.process_time() - start

    with torch.inference_mode():
        assert torch.equal(*(linear(x, weight) for weight in weights))
        dense, strided = (min(seconds(weight) for _ in range(5)) for weight in weights)
    assert strided < 100 * dense  # it took 1,000 times as long


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    x, weight = torch.randn(64, 96), torch.randn(80, 96)
    with torch.inference_mode():
        whole = linear(x, weight)
        for n in (2, 3, 5, 17, 33, 63):
            assert torch.equal(linear(x[:n], weight), whole[:n]), n


def test_a_small_product_outside_of_decoding_is_torchs_own() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    linear(x, weight).sum().backward()
    assert_close(weight.grad, x.sum(0).expand(5, 8))


@pytest.mark.parametrize("shape", [(2, 5), (64,), (131,), (3, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("intel", [False, True])
def test_gradients_are_those_of_the_other_library(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool, intel: bool
) -> None:
    monkeypatch.setattr(module, "INTEL", intel)
    x, weight = torch.randn(*shape, 120), torch.randn(80, 120)
    added = torch.randn(80) if bias else None
    direction = torch.randn(*shape, 80)
    found, expected = [], []
    for product, gradients in ((linear, found), (F.linear, expected)):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, added) if leaf is not None]
        y = product(*leaves)
        y.backward(direction)
        gradients.extend([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


def test_training_scoring_and_decoding_multiply_alike() -> None:
    x, weight = torch.randn(70, 120), torch.randn(80, 120)
    assert weight.numel() >= module.SMALL
    trained = linear(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(linear(x, weight), trained)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), trained)


def test_a_gradient_spread_over_its_rows() -> None:
    x, weight = torch.randn(70, 120, requires_grad=True), torch.randn(80, 120, requires_grad=True)
    linear(x, weight).sum().backward()
    assert_close(x.grad, weight.detach().sum(0).expand(70, 120), atol=2e-5, rtol=1e-5)
    assert_close(weight.grad, x.detach().sum(0).expand(80, 120), atol=2e-5, rtol=1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(70, 120, requires_grad=True), torch.randn(80, 120)
    linear(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None


def test_other_precisions_go_the_usual_way() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_few_row_counts_reach_the_library() -> None:
    counts = {module._row_count(n) for n in range(1, 2049)}
    assert len(counts) == len(module.ROWS) + 31
    assert all(module._row_count(n) >= n for n in range(1, 2049))


class Doubled(torch.autograd.Function):
    """Doubles its input in place, as the sum over tensor-parallel ranks changes it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """x of any shape."""
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """The gradient of x."""
        return 2 * grad


@pytest.mark.parametrize("shape", [(2, 8, 64), (1, 5, 64), (5, 64)])
def test_a_product_may_be_written_into(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    found = Doubled.apply(linear(x, weight))
    expected = 2 * F.linear(x, weight)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, weight), g) for y in (found, expected)), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
