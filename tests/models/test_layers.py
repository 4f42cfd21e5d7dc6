"""src/models/layers.py: RMS normalisation beside torch's own, in twice the bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from src.models.layers import RMSNorm


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 7, 48), (1, 3, 4, 64)])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_a_norm_and_its_gradients_are_torchs(shape: tuple[int, ...], offset: bool, learnt: bool) -> None:
    norm = RMSNorm(shape[-1], 1e-5, offset, torch.float32).requires_grad_(learnt)
    torch.nn.init.normal_(norm.weight)
    x, direction = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weight = norm.weight.detach().double().requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.rms_norm(exact, shape[-1:], weight + 1 if offset else weight, 1e-5)
    found = norm(x)
    with torch.no_grad():
        assert torch.equal(norm(x), found)

    def gradients(y: Tensor, leaf: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (leaf, factor) if learnt else (leaf,), direction.to(y.dtype))

    assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(found, x, norm.weight), gradients(expected, exact, weight), strict=True):
        assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)
