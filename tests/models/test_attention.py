"""src/models/attention.py: what a short row's gradient in float32 changes, beside float64's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.models import attention
from src.models.attention import Scoring, attend


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "length", "before", "window"),
    [(1, 9, 3, 100, 0, 0), (3, 4, 4, 33, 0, 0), (1, 9, 3, 60, 40, 0), (2, 4, 4, 70, 0, 9)])
def test_short_rows_in_bfloat16_have_their_own_gradient(
    monkeypatch: pytest.MonkeyPatch, rows: int, heads: int, kv_heads: int, length: int, before: int, window: int
) -> None:
    """The same bits forwards as torch's, gradients no farther from the exact ones, and less than rounding off: rows
    alone, after a beginning in common, and in a window."""
    sizes = ((heads, length), (kv_heads, before + length), (kv_heads, before + length))
    inputs = [torch.randn(rows, n, of, 64).bfloat16().transpose(1, 2) for of, n in sizes]
    direction = torch.randn(rows, heads, length, 64).bfloat16()
    scores = Scoring(0.3, 0.0, window)
    places = torch.arange(before + length)
    distance = places[before:, None] - places
    seen = (distance >= 0) & (distance < (window or before + length))  # [S, T]

    def found(limit: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(attention, "SHORT", limit)
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = attend(*leaves, seen[None, None] if before else None, scores)
        return y.detach(), *torch.autograd.grad(y, leaves, direction)

    leaves = [x.double().requires_grad_() for x in inputs]
    y = F.scaled_dot_product_attention(*leaves, attn_mask=seen, scale=0.3, enable_gqa=heads > kv_heads)
    exact = torch.autograd.grad(y, leaves, direction.double())
    (ours, *own), (plain, *torchs) = found(2**14), found(0)
    assert torch.equal(ours, plain)
    for mine, theirs, wanted in zip(own, torchs, exact, strict=True):
        distances = [((x - wanted).norm() / wanted.norm()).item() for x in (mine, theirs)]
        assert distances[0] < min(0.01, 1.05 * distances[1])
