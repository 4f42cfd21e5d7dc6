"""The arithmetic of the papers: pure functions of tensors.

B batch, S sequence, N response tokens of a batch laid end to end. Losses come per token or per pair; the caller
divides their sum by the global count it means. logprobs are normalised, in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp() of more is no probability ratio that training could survive


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) of each pair (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1). [B] -> [B]."""
    return -F.logsigmoid(chosen - rejected)


def judgement_loss(scores: Tensor, labels: Tensor, right_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of logits with labels in [0, 1] (Cobbe et al. 2021; Lightman et al. 2023). [N] -> [N].

    right_weight multiplies the term of a right label, to even out classes of unequal size.
    """
    weight = torch.tensor(right_weight, device=scores.device)
    return F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight, reduction="none")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the True positions of each row.

    rewards, values [B, S] float; mask [B, S] bool -> advantages [B, S], 0 where mask is False. Positions outside
    the mask are skipped as if absent: the value and the running sum are carried over them. After the last
    True position the episode is over and its value is 0.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * lam * running
        running = torch.where(mask[:, t], here, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], here, 0.0)
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the masked entries to mean 0 and variance 1; the others become 0. Any shape, float32.

    1e-8 is added to the variance: entries that are equal up to rounding become about 0, not noise of size 1.
    """
    chosen = x[mask]
    scale = (chosen.var(unbiased=False) + 1e-8).sqrt()
    return torch.where(mask, (x - chosen.mean()) / scale, 0.0)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old of each token, its logarithm clamped to +-20. [N], [N] -> [N]."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_policy_loss(ratio: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Clipped surrogate of each token, to be minimised (Schulman et al. 2017, eq. 7). [N], [N] -> [N]."""
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of clipped and unclipped values (Schulman et al. 2017's code). [N] -> [N]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Single-sample estimate of KL(policy, reference), unbiased, may be negative (Schulman 2020, k1). [N] -> [N]."""
    return logprobs - reference_logprobs


def dpo_margins(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    """How much more the policy than the reference prefers chosen to rejected, in nats (Rafailov et al. 2023, eq. 7).

    Summed (or mean) log-probs of each side [B] -> [B].
    """
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def dpo_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin); label_smoothing: chance of a wrong label (cDPO, Mitchell 2023). [B]."""
    logits = beta * margins
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2 on margins of mean log-probs (Azar et al. 2023, eq. 17). [B] -> [B]."""
    return (margins - 1 / (2 * beta)) ** 2


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """beta * -log sigmoid(log odds ratio), the preference term of ORPO (Hong et al. 2024, eq. 6-7). [B], [B] -> [B].

    chosen, rejected: mean log-probs a token, float32 and not above 0. The caller adds the NLL of chosen.
    """
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact near 0 (Maechler 2012) and finite at it: x is kept below -1e-7."""
    x = x.float().clamp_max(-1e-7)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma) on mean log-probs, no reference (Meng et al. 2024, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over [N] entries; 0 for constant returns. -> scalar."""
    spread = returns.var(unbiased=False)
    return torch.where(spread > 0, 1 - (returns - values).var(unbiased=False) / spread.clamp_min(1e-12), 0.0)
