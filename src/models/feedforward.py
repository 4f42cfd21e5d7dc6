"""The gated feed-forward layer, alone or as one of several experts, and RMS normalisation.

B batch, S sequence, D width, N tokens, X experts
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.config import ModelConfig
from src.models.layers import ColumnParallelLinear, RowParallelLinear
from src.models.linear import linear
from src.parallel import copy_to_tensor_parallel, reduce_from_tensor_parallel


class FeedForward(nn.Module):
    """Gated linear unit (Shazeer 2020): w2(act(w1 x) * w3 x), with its inner width split over the ranks."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation, bias = config.activation, config.mlp_bias
        self.w1 = ColumnParallelLinear(config.dim, width, bias=bias)
        self.w2 = RowParallelLinear(width, config.dim, bias=bias)
        self.w3 = ColumnParallelLinear(config.dim, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        return self.w2(activate(self.w1(x), self.activation) * self.w3(x))

    def partial_output(self, x: Tensor) -> Tensor:
        """This rank's summand of the output, for callers that sum over ranks themselves. x [N, D] -> [N, D]."""
        inner = activate(linear(x, self.w1.weight), self.activation) * linear(x, self.w3.weight)
        return linear(inner, self.w2.weight)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the gate's nonlinearity, silu or gelu in its tanh approximation. [...] -> [...]."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


class MixtureOfExperts(nn.Module):
    """Each token through its n_active_experts most probable experts (Shazeer et al. 2017), none dropped.

    Where there is a shared expert, all tokens go through it too, each weighed by a sigmoid (Qwen team 2024).
    Every expert is split over the ranks like a plain feed-forward layer. All ranks route alike, so the experts'
    outputs are summed over the ranks once, however many were used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_active, self.renormalised = config.n_active_experts, config.renormalised_experts
        self.gate = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config, config.ffn_dim) for _ in range(config.n_experts))
        self.shared = FeedForward(config, config.shared_ffn_dim) if config.shared_ffn_dim else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.shared_ffn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        tokens = x.flatten(0, 1)  # [N, D]
        probabilities = linear(tokens, self.gate.weight).float().softmax(-1)  # [N, X]
        weights, chosen = probabilities.topk(self.n_active, dim=-1)  # [N, n_active]
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        # each rank has a part of every expert, hence a part of these gradients
        tokens, weights = copy_to_tensor_parallel(tokens), copy_to_tensor_parallel(weights)
        output = torch.zeros_like(tokens, dtype=torch.float32)
        if self.shared is not None:
            share = linear(x.flatten(0, 1), self.shared_gate.weight).float().sigmoid()  # [N, 1]
            output = copy_to_tensor_parallel(share) * self.shared.partial_output(tokens)
        chosen, weights = chosen.flatten(), weights.flatten()  # [N * n_active]
        # a GPU is asked once how many tokens each expert has
        counts = (chosen[:, None] == torch.arange(len(self.experts), device=chosen.device)).sum(0).tolist()
        for expert, places in zip(self.experts, chosen.argsort(stable=True).split(counts), strict=True):
            rows = places // self.n_active
            if not len(rows) and not torch.is_grad_enabled():  # in training an idle expert has a gradient of zero
                continue
            mixed = expert.partial_output(tokens[rows]) * weights[places, None]
            output = output.index_add(0, rows, mixed.type_as(output))
        return reduce_from_tensor_parallel(output).view_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in float32; with offset, * (1 + weight)."""

    def __init__(self, dim: int, eps: float, offset: bool, dtype: torch.dtype) -> None:
        """dtype: of what comes out, for the linear layers that read it."""
        super().__init__()
        self.eps, self.offset, self.dtype = eps, offset, dtype
        self.weight = nn.Parameter(torch.empty(dim))

    def scale(self) -> Tensor:
        """The factor of each dimension. -> [D] float32."""
        weight = self.weight.to(self.dtype).float()  # as FSDP2 gathers it in bfloat16
        return weight + 1 if self.offset else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] of any float dtype -> [..., D] in the norm's dtype."""
        x, scale = x.float(), self.scale()
        if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _LearningNorm.apply(x, scale, self.eps).to(self.dtype)
        return F.rms_norm(x, x.shape[-1:], scale, self.eps).to(self.dtype)


class _LearningNorm(torch.autograd.Function):
    """rms_norm() with a fused gradient, which torch has on a GPU alone; on a CPU it takes a dozen passes over x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        """x [..., D], scale [D] -> [..., D], all float32: the bits of F.rms_norm()."""
        y, inverse = torch.ops.aten._fused_rms_norm(x, scale.shape, scale, eps)  # inverse [..., 1]: 1 / rms(x)
        ctx.save_for_backward(x, scale, inverse)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """[..., D] -> [..., D], [D]: layer norm's gradient at a mean of 0, but for what that mean itself adds."""
        x, scale, inverse = ctx.saved_tensors
        mean, wanted = torch.zeros_like(inverse), [True, ctx.needs_input_grad[1], False]
        of_x, of_scale, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, scale.shape, mean, inverse, scale, None, wanted
        )
        of_x.addcmul_(inverse, (grad @ scale)[..., None], value=1 / len(scale))
        return of_x, of_scale, None
