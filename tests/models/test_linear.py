import pytest
import torch
import torch.nn.functional as F
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


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    x, weight = torch.randn(64, 96), torch.randn(80, 96)
    with torch.inference_mode():
        whole = linear(x, weight)
        for n in (2, 3, 5, 17, 33, 63):
            assert torch.equal(linear(x[:n], weight), whole[:n]), n


def test_outside_of_decoding_the_product_is_torchs_own() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    linear(x, weight).sum().backward()
    assert_close(weight.grad, x.sum(0).expand(5, 8))


def test_other_precisions_go_the_usual_way() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_few_row_counts_reach_the_library() -> None:
    counts = {module._padded(n) for n in range(1, 2049)}
    assert len(counts) == len(module.ROWS) + 15
    assert all(module._padded(n) >= n for n in range(1, 2049))
