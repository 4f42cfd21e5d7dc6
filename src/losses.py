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


def label_loss(scores: Tensor, labels: Tensor, right_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of logits with labels in [0, 1] (Cobbe et al. 2021; Lightman et al. 2023). [N] -> [N].
    right_weight multiplies the term of a right label, to even out classes of unequal size."""
    weight = torch.tensor(right_weight, device=scores.device)
    return F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight, reduction="none")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the True positions of each row.

    rewards, values [B, S] float; mask [B, S] bool -> advantages [B, S], 0 where mask is False. Positions outside
    the mask are skipped as if absent: the value and the running sum are carried over them. After the last
    True position the episode is over and its value is 0.
    """
    # A_t = delta_t + gamma lambda A_(t+1), from the last token back
    advantages = torch.zeros_like(rewards)  # [B, S]
    next_value = torch.zeros_like(rewards[:, 0])  # [B]
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * lam * running  # [B]; kept where the mask is True, else the row's last one stays
        running = torch.where(mask[:, t], here, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], here, 0.0)
    return advantages


def whiten(x: Tensor, mask: Tensor, *, shift: bool = True) -> Tensor:
    """Shift and scale the masked entries to mean 0 and variance 1; the others become 0. [...] twice -> [...] float32.

    shift False leaves the mean in, so that rewards keep their signs. 1e-8 is added to the variance: entries that are
    equal up to rounding become about 0, not noise of size 1.
    """
    x = x.double()  # as in _less_mean()
    chosen = x[mask]
    scale = (chosen.var(unbiased=False) + 1e-8).sqrt()
    return torch.where(mask, (x - chosen.mean() if shift else x) / scale, 0.0).float()


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old of each token, its logarithm clamped to +-20. [N], [N] -> [N]."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, counts: Tensor) -> Tensor:
    """(pi / pi_old of a whole response) to the power 1 / its length, at each of its tokens. [N], [N] -> [N].

    The value is that of GSPO (Zheng et al. 2025, eq. 7). A token's gradient is its own (eq. 14): where the advantages
    of a response are equal, the loss has GSPO's gradient, and where they differ each token learns from its own.
    counts [B] int64: tokens of each response; a response may have none.
    """
    log_ratio = (logprobs - old_logprobs).detach()  # [N]
    parts = log_ratio.split(counts.tolist())
    means = torch.cat([(part.sum() / max(1, len(part))).expand(len(part)) for part in parts])
    # the value is the mean's alone, the gradient each token's own
    return (logprobs - logprobs.detach() + means).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncated_importance(old_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap) of each token: corrects for a sampler that is not quite the policy trained.
    Truncated importance sampling (Ionides 2008; for samplers, Yao et al. 2025). [...] twice -> [...]."""
    return probability_ratio(old_logprobs, sampled_logprobs).clamp_max(cap)


def ppo_policy_loss(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> Tensor:
    """Clipped surrogate of each token, to be minimised (Schulman et al. 2017, eq. 7). [N], [N] -> [N].

    The ratio is clipped to [1 - clip_low, 1 + clip_high]; a higher clip_high is DAPO's clip-higher (Yu et al. 2025,
    section 3.1). dual_clip c > 1 also bounds the loss at -c A where A < 0 (Ye et al. 2020, eq. 5); 0 = off.
    """
    # the smaller of the two: to leave the range never pays, to come back into it does
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -surrogate


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-clip(ratio) A log pi of each token, no gradient through the ratio (CISPO, MiniMax 2025, eq. 4-5). [N] -> [N].

    Unlike PPO's clip it bounds what a token weighs, and lets none fall out of the update.
    """
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * logprobs


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of clipped and unclipped values (Schulman et al. 2017's code). [N] -> [N]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    # the worse of the two: to move further than the clip never pays
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Single-sample estimate of KL(policy, reference), unbiased, may be negative (Schulman 2020, k1). [N] -> [N]."""
    return logprobs - reference_logprobs


def distillation_advantages(logprobs: Tensor, teacher_logprobs: Tensor, weight: float) -> Tensor:
    """weight * (log q - log p) at the sampled tokens of a policy p with the teacher q. [N] -> [N].
    Their policy gradient, E_p[(log q - log p) grad log p], is minus that of each token's reverse KL(p, q): on-policy
    distillation (Agarwal et al. 2024, arXiv 2306.13649; as advantages without discount: Thinking Machines Lab 2025)."""
    return weight * (teacher_logprobs - logprobs)


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio (Schulman 2020, k2): biased in value, its gradient is that of the KL. [N] -> [N]."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased, never negative estimate of the KL (Schulman 2020, k3). As a loss its gradient is biased. [N] -> [N]."""
    # with r = reference / policy, k1 is -log r; r - 1, whose mean is 0, is added to take variance from it
    log_ratio = (reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def _less_mean(rewards: Tensor) -> Tensor:
    """What each reward has above its group's mean. [P, G] -> [P, G].

    The mean is exact for equal rewards: in float32 that of eight times 1.7 is 1.2e-7 off, and Adam makes whole steps of
    a gradient however small.
    """
    return (rewards.double() - rewards.double().mean(1, keepdim=True)).to(rewards.dtype)


def grpo_advantages(rewards: Tensor, *, divide_by_std: bool) -> Tensor:
    """Reward minus the group's mean. [P, G] rewards of G samples of each of P prompts -> [P, G].

    divide_by_std also divides by the group's (unbiased) deviation + 1e-4 (GRPO, Shao et al. 2024, section 4.1.2);
    without it this is Dr. GRPO (Liu et al. 2025, section 3.2), which does not favour problems of little spread.
    """
    centred = _less_mean(rewards)
    # with 1e-4 a group of equal rewards has advantages of 0
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if divide_by_std else centred


def gdpo_advantages(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of what GRPO makes of each reward alone (GDPO, Liu et al. 2026, eq. 4-5).

    rewards [K, P, G]: K rewards of G samples of each of P prompts; weights [K] -> [P, G]. The caller brings them to
    mean 0 and variance 1 over the buffer (eq. 6).
    """
    each = grpo_advantages(rewards.flatten(0, 1), divide_by_std=True).view_as(rewards)
    return (weights[:, None, None] * each).sum(0)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Reward minus the mean of the group's other samples (RLOO, Ahmadian et al. 2024, eq. 9). [P, G > 1] -> [P, G]."""
    # the mean of the others is (G mean - own) / (G - 1)
    n = rewards.shape[1]
    return _less_mean(rewards) * n / (n - 1)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum of the discounted rewards from each True position to its row's last; 0 elsewhere. [B, S] -> [B, S]. What
    REINFORCE++ (Hu et al. 2025, eq. 5) takes as advantages before it whitens them over the batch."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def sequence_weights(counts: Tensor, aggregation: str, constant_length: int) -> Tensor:
    """What each token of a row weighs in the loss. counts [B] int64: tokens of each row -> [B] float32.

    The weighted sum over all rows is then divided by the number of rows, or for token-mean by that of all tokens.

    token-mean: every token alike. seq-mean: 1 / its row's length (GRPO). seq-sum: 1.
    seq-constant: 1 / constant_length (Dr. GRPO).
    """
    if aggregation == "seq-mean":
        return 1.0 / counts.clamp_min(1)
    return torch.full(counts.shape, 1.0 / constant_length if aggregation == "seq-constant" else 1.0)


def process_rewards(probabilities: Tensor, shape: str) -> Tensor:
    """Reward at the end of each of a solution's steps from the probabilities that they are right. [T] -> [T].

    raw: the probability itself. min-drop: how far it falls below the running minimum, which starts at 1; prod-drop:
    how far the running product falls (Sun et al. 2024, Easy-to-Hard, section 3.4; both are never positive and sum up
    to min or product minus 1).
    """
    if shape == "raw":
        return probabilities
    joined = torch.cat((probabilities.new_ones(1), probabilities))  # [1 + T]
    return (joined.cummin(0).values if shape == "min-drop" else joined.cumprod(0)).diff()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over [N] entries; 0 for constant returns. -> scalar."""
    values, returns = values.double(), returns.double()
    spread = returns.var(unbiased=False)
    # float32 made the returns of values: constant ones differ by its rounding. where() computes both sides: the one
    # that is not taken must not divide by 0
    noise = 1e-12 * (values.square().mean() + returns.square().mean())
    return torch.where(spread > noise, 1 - (returns - values).var(unbiased=False) / spread.clamp_min(1e-300), 0.0)


def dpo_margins(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    """How much more the policy than the reference prefers chosen to rejected, in nats (Rafailov et al. 2023, eq. 7).
    Summed (or mean) log-probs of each side [B] -> [B]."""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def dpo_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * margin); label_smoothing: chance of a wrong label (cDPO, Mitchell 2023). [B] -> [B]."""
    logits = beta * margins
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def kto_loss(
    log_ratios: Tensor, right: Tensor, reference_point: float, beta: float, right_weight: float, wrong_weight: float
) -> Tensor:
    """lambda_y - v of each response (KTO, Ethayarajh et al. 2024, eq. 8). log_ratios [B], right [B] bool -> [B].

    log_ratios: summed log-probs less the reference's, in nats; v = lambda_D sigmoid(beta (ratio - z)) of a right
    response, lambda_U sigmoid(beta (z - ratio)) of a wrong one, z being the reference point.
    """
    logits = beta * (log_ratios - reference_point)  # [B]
    weights = torch.where(right, right_weight, wrong_weight)
    return weights * (1 - torch.where(right, logits, -logits).sigmoid())


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2 on margins of mean log-probs (Azar et al. 2023, eq. 17). [B] -> [B]."""
    # a target for each margin: log sigmoid would drive the margins of pairs that are always judged alike to infinity
    return (margins - 1 / (2 * beta)) ** 2


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """beta * -log sigmoid(log odds ratio), the preference term of ORPO (Hong et al. 2024, eq. 6-7). [B], [B] -> [B].
    chosen, rejected: mean log-probs a token, float32 and not above 0. The caller adds the NLL of chosen."""
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))  # log p / (1 - p) of each
    return -beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact near 0 (Maechler 2012) and finite at it: x is kept below -1e-7. [B] -> [B]."""
    x = x.float().clamp_max(-1e-7)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma) on mean log-probs (Meng et al. 2024, eq. 6). [B], [B] -> [B]."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)
