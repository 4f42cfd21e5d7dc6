"""src/losses.py against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import losses

T, F = True, False


def test_bradley_terry_by_hand() -> None:
    # tie: -log 1/2 = log 2; margin log 3: -log(3/4); margin -log 3: -log(1/4)
    margins = torch.tensor([0.0, math.log(3), -math.log(3)])
    rejected = torch.tensor([5.0, -2.0, 0.0])
    loss = losses.bradley_terry_loss(rejected + margins, rejected)
    assert_close(loss, torch.tensor([math.log(2), math.log(4 / 3), math.log(4)]))


@pytest.mark.parametrize(
    "gamma, lam, expected",
    [
        # rewards 0 0 1, values 1/2: deltas with gamma 1 are 0, 0, 1/2; each step back halves
        (1.0, 0.5, [0.125, 0.25, 0.5]),
        (1.0, 0.0, [0.0, 0.0, 0.5]),
        # lambda 1: the return minus the value
        (1.0, 1.0, [0.5, 0.5, 0.5]),
        # gamma 1/2: deltas -1/4, -1/4, 1/2; then -1/4 + 1/2 * 1/2 = 0, -1/4 + 0 = -1/4
        (0.5, 1.0, [-0.25, 0.0, 0.5]),
        # gamma * lambda = 1/4: -1/4 + 1/4 * 1/2 = -1/8, -1/4 - 1/32
        (0.5, 0.5, [-0.28125, -0.125, 0.5]),
        (0.0, 0.7, [-0.5, -0.5, 0.5]),
    ],
)
def test_gae_by_hand(gamma: float, lam: float, expected: list[float]) -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    found = losses.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma, lam)
    assert_close(found, torch.tensor([expected]))
    # two tokens that code printed stand after the first, with rewards and values that nobody reads: no step is theirs
    rewards, values = torch.tensor([[0.0, 9, 9, 0, 1]]), torch.tensor([[0.5, 7, 7, 0.5, 0.5]])
    found = losses.gae(rewards, values, torch.tensor([[T, F, F, T, T]]), gamma, lam)
    assert_close(found, torch.tensor([[expected[0], 0.0, 0.0, *expected[1:]]]))


def test_gae_skips_padding_wherever_it_stands() -> None:
    # the episode has rewards 0 1 and values 1/2 1/4: deltas 1/4 - 1/2 = -1/4 and 3/4, so -1/4 + 1/2 * 3/4 = 1/8
    rewards = torch.tensor([[0.0, 9.0, 1.0, 9.0], [9.0, 9.0, 0.0, 1.0], [0.0, 1.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 7.0, 0.25, 7.0], [7.0, 7.0, 0.5, 0.25], [0.5, 0.25, 7.0, 7.0]])
    mask = torch.tensor([[T, F, T, F], [F, F, T, T], [T, T, F, F]])
    expected = torch.tensor([[0.125, 0, 0.75, 0], [0, 0, 0.125, 0.75], [0.125, 0.75, 0, 0]])
    assert_close(losses.gae(rewards, values, mask, 1.0, 0.5), expected)


def test_gae_of_one_token_is_reward_minus_value() -> None:
    mask = torch.tensor([[F, T, F], [T, F, F]])
    found = losses.gae(torch.full((2, 3), 2.0), torch.full((2, 3), 0.5), mask, 0.9, 0.9)
    assert_close(found, torch.tensor([[0.0, 1.5, 0.0], [1.5, 0.0, 0.0]]))


def test_gae_of_an_episode_cut_at_the_last_column_does_not_bootstrap() -> None:
    # nothing follows the last True, so its successor is worth 0: the advantage is 0 - value
    found = losses.gae(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([[T, T]]), 1.0, 1.0)
    assert_close(found, torch.tensor([[-3.0, -4.0]]))


def test_whiten_by_hand() -> None:
    # 1 2 3 have mean 2 and variance 2/3
    found = losses.whiten(torch.tensor([[1.0, 99.0, 2.0, 3.0]]), torch.tensor([[T, F, T, T]]))
    assert_close(found, torch.tensor([[-math.sqrt(1.5), 0.0, 0.0, math.sqrt(1.5)]]))


@pytest.mark.parametrize("n", [2, 3, 7, 8, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1.7, -100.1, 1000.1])
def test_equal_rewards_have_exactly_no_advantages(n: int, value: float) -> None:
    """Of any other, however small, Adam makes steps of the whole learning rate."""
    x = torch.full((1, n), value)
    for found in (losses.whiten(x, torch.ones(1, n, dtype=torch.bool)), losses.rloo_advantages(x),
                  *(losses.grpo_advantages(x, divide_by_std=by_std) for by_std in (True, False))):
        assert found.dtype == torch.float32 and not found.any()


def test_probability_ratio_and_its_clamp() -> None:
    old = torch.full((4,), -1.0)
    ratio = losses.probability_ratio(old + torch.tensor([math.log(2), 0.0, 100.0, -100.0]), old)
    assert_close(ratio, torch.tensor([2.0, 1.0, math.exp(20), math.exp(-20)]))


def test_policy_loss_on_both_sides_of_the_clip_and_its_gradient() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], requires_grad=True)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    # the smaller of 3 and 2.4, of -3 and -2.4, of 1 and 1.6, of -1 and -1.6; the last ratio is inside the clip
    loss = losses.ppo_policy_loss(ratio, advantages, 0.2, 0.2)
    assert_close(loss.detach(), torch.tensor([-2.4, 3.0, -1.0, 1.6, -3.3]))
    # a ratio that has moved too far in the wanted direction is no longer pushed
    loss.sum().backward()
    assert_close(ratio.grad, torch.tensor([0.0, 2.0, -2.0, 0.0, -3.0]))


def test_gspo_by_hand_and_its_gradient() -> None:
    # two responses of 2 and 1 tokens and one without: ratios (2 * 8)^(1/2) = 4 and 1.25, clipped at 1.5
    old = torch.tensor([-3.0, -4.0, -1.0])
    logprobs = (old + torch.tensor([2.0, 8.0, 1.25]).log()).requires_grad_()
    counts, advantages = torch.tensor([2, 0, 1]), torch.tensor([-1.0, -1.0, 2.0])
    ratio = losses.sequence_ratio(logprobs, old, counts)
    assert_close(ratio.detach(), torch.tensor([4.0, 4.0, 1.25]))
    loss = losses.ppo_policy_loss(ratio, advantages, 0.5, 0.5)
    assert_close(loss.detach(), torch.tensor([4.0, 4.0, -2.5]))
    # means over sequences: d/dlogp of -A s is -A s / length, as of the whole response's ratio
    (loss / torch.tensor([2.0, 2.0, 1.0])).sum().backward()
    assert_close(logprobs.grad, torch.tensor([2.0, 2.0, -2.5]))
    whole = (old + torch.tensor([2.0, 8.0, 1.25]).log()).requires_grad_()
    ((whole - old)[:2].mean().exp() - 2.0 * (whole - old)[2].exp()).backward()
    assert_close(logprobs.grad, whole.grad)


def test_cispo_by_hand_and_its_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ratio, advantages = torch.tensor([7.0, 0.1, 9.0]), torch.tensor([2.0, -1.0, -1.0])
    # weights 5 (clipped), 0.1 and 5: minus weight times advantage times log-prob
    loss = losses.cispo_loss(logprobs, ratio, advantages, 1.0, 4.0)
    assert_close(loss.detach(), torch.tensor([10.0, -0.2, -15.0]))
    loss.sum().backward()  # no token falls out, whichever way its ratio has moved
    assert_close(logprobs.grad, torch.tensor([-10.0, 0.1, 5.0]))


def test_value_loss_is_half_the_worse_squared_error() -> None:
    values = torch.tensor([1.0, 1.0, 0.1, -1.0], requires_grad=True)
    returns = torch.tensor([2.0, 0.0, 1.0, -2.0])
    # clipped to within 0.2 of 0: 0.2 0.2 0.1 -0.2; worse squares: (2 - 0.2)^2, (1 - 0)^2, 0.9^2, (2 - 0.2)^2
    loss = losses.ppo_value_loss(values, torch.zeros(4), returns, clip=0.2)
    assert_close(loss.detach(), torch.tensor([1.62, 0.5, 0.405, 1.62]))
    loss.sum().backward()
    assert_close(values.grad, torch.tensor([0.0, 1.0, -0.9, 0.0]))


def test_the_policy_gradient_of_distillation_is_that_of_the_reverse_kl() -> None:
    found = losses.distillation_advantages(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5]), 2.0)
    assert_close(found, torch.tensor([-1.0, 2.0, 0.0]))
    logits, teacher = torch.tensor([0.3, -1.0, 2.0, 0.1], requires_grad=True), torch.tensor([1.0, 0.5, 0.2, -2.0])
    p, q = logits.log_softmax(0), teacher.log_softmax(0)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    advantages = losses.distillation_advantages(p, q, 0.7).detach()
    (found,) = torch.autograd.grad(-(p.exp().detach() * advantages * p).sum(), logits)
    assert_close(found, 0.7 * exact)


def test_kl_k1_is_the_difference_of_logprobs() -> None:
    found = losses.kl_k1(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5]))
    assert_close(found, torch.tensor([0.5, -1.0, 0.0]))


@pytest.mark.parametrize(
    "values, returns, expected",
    [
        # residuals 0 0 1 have variance 2/9, returns 1 2 4 have 14/9: 1 - 1/7
        ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], 6 / 7),
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 1.0),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], 0.0),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], 0.0),
        ([0.01, 0.02, 0.03], [-1.0, -1.0 + 2e-7, -1.0], 0.0),  # constant but for rounding
    ],
)
def test_explained_variance(values: list[float], returns: list[float], expected: float) -> None:
    found: Tensor = losses.explained_variance(torch.tensor(values), torch.tensor(returns))
    assert_close(found.float(), torch.tensor(expected))


def test_label_loss_by_hand() -> None:
    scores, labels = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 0.25])
    softplus = [math.log(2), math.log1p(math.exp(2)), math.log1p(math.exp(-1)) + 0.25]
    assert losses.label_loss(scores, labels).tolist() == pytest.approx(softplus, rel=1e-6)
    assert losses.label_loss(scores[:1], labels[:1], 3.0).item() == pytest.approx(3 * math.log(2))


def test_dpo_family_golden_numbers() -> None:
    margins = losses.dpo_margins(*(torch.tensor([x]) for x in (-10.0, -14.0, -11.0, -13.5)))
    assert margins.item() == 1.5
    assert losses.dpo_loss(margins, 0.1).item() == pytest.approx(0.620957, abs=1e-6)
    assert losses.dpo_loss(torch.zeros(1), 0.1).item() == pytest.approx(math.log(2), abs=1e-7)
    smoothed = 0.9 * math.log1p(math.exp(-0.15)) + 0.1 * math.log1p(math.exp(0.15))
    assert losses.dpo_loss(margins, 0.1, 0.1).item() == pytest.approx(smoothed, abs=1e-6)
    assert losses.ipo_loss(margins, 0.5).item() == pytest.approx(0.25)
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([-1.5])
    nll = 0.5
    assert nll + losses.orpo_loss(chosen, rejected, 0.1).item() == pytest.approx(0.517086, abs=1e-6)
    assert losses.simpo_loss(chosen, rejected, 2.0, 1.0).item() == pytest.approx(math.log1p(math.exp(-1.0)))


@pytest.mark.parametrize("value", [0.0, -1e-8, -1e-3])
def test_orpo_stays_finite_near_certainty(value: float) -> None:
    chosen = torch.tensor([value], dtype=torch.bfloat16, requires_grad=True)
    loss = losses.orpo_loss(chosen, torch.tensor([-1.0]), 0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


def test_clip_higher_and_dual_clip_by_hand() -> None:
    ratio, advantages = torch.tensor([1.5, 1.25, 0.5, 5.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert losses.ppo_policy_loss(ratio, advantages, 0.2, 0.28).tolist() == pytest.approx(
        [-1.28, -1.25, 0.8, 5.0]
    )
    assert losses.ppo_policy_loss(ratio, advantages, 0.2, 0.28, 3.0).tolist() == pytest.approx(
        [-1.28, -1.25, 0.8, 3.0]
    )


def test_kl_estimators_by_hand_and_their_means() -> None:
    p, q = (
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64),
    )
    exact = (p * (p / q).log()).sum().item()
    assert (p * losses.kl_k1(p.log(), q.log())).sum().item() == pytest.approx(exact)
    assert (p * losses.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(exact)
    assert (losses.kl_k3(p.log(), q.log()) >= 0).all()
    assert losses.kl_k2(torch.tensor([-1.0]), torch.tensor([-3.0])).item() == 2.0


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert losses.grpo_advantages(rewards, divide_by_std=False).tolist() == [
        [0.5, -0.5, -0.5, 0.5],
        [0.0] * 4,
    ]
    std = math.sqrt(1 / 3) + 1e-4
    found = losses.grpo_advantages(rewards, divide_by_std=True)
    assert found[0].tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std])
    assert found[1].tolist() == [0.0] * 4
    assert losses.rloo_advantages(rewards)[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_gdpo_by_hand() -> None:
    # rewards 1 0 and 10 30 of one prompt, 5 5 and 0 2 of another: +-1/2 and -+10 over deviations sqrt(1/2), sqrt(200);
    # equal ones give nothing, however large; the second reward weighs 3
    rewards = torch.tensor([[[1.0, 0.0], [5.0, 5.0]], [[10.0, 30.0], [0.0, 2.0]]])
    found = losses.gdpo_advantages(rewards, torch.tensor([1.0, 3.0]))
    a, b, c = 0.5 / (0.5**0.5 + 1e-4), 10 / (200**0.5 + 1e-4), 1 / (2**0.5 + 1e-4)
    assert_close(found, torch.tensor([[a - 3 * b, 3 * b - a], [-3 * c, 3 * c]]))


def test_returns_by_hand() -> None:
    mask = torch.tensor([[False, True, False, True]])
    found = losses.discounted_returns(torch.tensor([[9.0, 1.0, 9.0, 2.0]]), mask, 0.5)
    assert found.tolist() == [[0.0, 2.0, 0.0, 2.0]]


def test_aggregation_weights_by_hand() -> None:
    counts = torch.tensor([2, 4])
    assert losses.sequence_weights(counts, "token-mean", 8).tolist() == [1.0, 1.0]
    assert losses.sequence_weights(counts, "seq-mean", 8).tolist() == [0.5, 0.25]
    assert losses.sequence_weights(counts, "seq-sum", 8).tolist() == [1.0, 1.0]
    assert losses.sequence_weights(counts, "seq-constant", 8).tolist() == [0.125, 0.125]


def test_process_rewards_by_hand() -> None:
    probabilities = torch.tensor([0.8, 0.9, 0.5])
    shapes = {"raw": [0.8, 0.9, 0.5], "min-drop": [-0.2, 0.0, -0.3], "prod-drop": [-0.2, -0.08, -0.36]}
    for shape, expected in shapes.items():
        assert losses.process_rewards(probabilities, shape).tolist() == pytest.approx(expected)
