"""src/models/layers.py: embeddings and RMS normalisation beside torch's own, in twice the bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from src import parallel
from src.models.layers import ParallelEmbedding, RMSNorm, VocabParallelEmbedding


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


@pytest.mark.parametrize("kind", [ParallelEmbedding, VocabParallelEmbedding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_s_gradient_is_summed_in_float32_over_its_tokens(
    kind: type[ParallelEmbedding | VocabParallelEmbedding], dtype: torch.dtype
) -> None:
    """In half precision as FSDP2 gathers the weight: on as many tokens as a packed micro-batch has."""
    parallel.start()
    embedding, tokens = kind(4, 8), torch.randint(3, (1, 16384))
    torch.nn.init.normal_(embedding.weight)
    embedding.to(dtype)
    direction = torch.randn(1, 16384, 8).add(0.3).to(dtype)
    exact = embedding.weight.detach().double().requires_grad_()
    rows, expected = embedding(tokens), F.embedding(tokens, exact)
    assert rows.dtype == dtype and torch.equal(rows.double(), expected)
    rows.backward(direction)
    expected.backward(direction.double())
    assert_close(embedding.weight.grad.double(), exact.grad, rtol=1.3 * torch.finfo(dtype).eps, atol=0.01)
