"""The gated feed-forward layer and RMS normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.config import ModelConfig
from src.parallel import ColumnParallelLinear, RowParallelLinear


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x), with its inner width split over the ranks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(config.dim, config.ffn_dim)
        self.w2 = RowParallelLinear(config.ffn_dim, config.dim)
        self.w3 = ColumnParallelLinear(config.dim, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]; dtype of x is kept."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)
