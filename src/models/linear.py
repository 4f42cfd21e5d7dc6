"""The product of a linear layer: while decoding on a CPU in float32, by oneDNN.

torch's x86 builds multiply float32 with MKL, which leaves AVX-512 unused on processors of other makers and is slow at
two to sixteen rows; oneDNN comes with the same builds. One core of an AMD EPYC, weight 2560 x 768: 64 rows at 185
instead of 91 GFLOP/s, 8 rows at 67 instead of 40, one at 14 instead of 9. Training and all that it is compared with
(references, old log-probs) stay with one library, so that equal weights give equal numbers to the last bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Row counts that a kernel is made for. Each takes 0.3 MB and half a millisecond, so others are padded to the next of
# these, or to a multiple of the last.
ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> x W^T + b [..., out]."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if _padded(n) > n:
        rows = F.pad(rows, (0, 0, 0, _padded(n) - n))
    # "none": no activation behind the product
    product = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return product[:n].view(*x.shape[:-1], len(weight))


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a float32 model is decoding on a CPU; the engine alone uses inference mode."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_inference_mode_enabled()
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
    )


def _padded(n: int) -> int:
    """The smallest number of rows, n or more, that a kernel is made for."""
    return next((rows for rows in ROWS if rows >= n), -(-n // ROWS[-1]) * ROWS[-1])
