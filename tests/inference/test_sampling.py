"""src/inference/sampling.py by hand and by frequency."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from src import parallel
from src.errors import UserError
from src.inference import sampling as sampling_module
from src.inference.sampling import Sampling, choose, uniforms

# probabilities 0.1, 0.6, 0.3 of tokens 0, 1, 2
LOGITS = torch.tensor([0.1, 0.6, 0.3]).log()


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> None:
    parallel.start()


def drawn(u: list[float], **settings: object) -> list[int]:
    """The tokens that these numbers draw from LOGITS."""
    sampling = Sampling(**{"temperature": 1.0} | settings)
    return choose(LOGITS.expand(len(u), 3), sampling, torch.tensor(u, dtype=torch.float64)).tokens.tolist()


def test_draw_inverts_the_cumulative_distribution() -> None:
    # cumulative 0.1, 0.7, 1.0 in the order of ids
    assert drawn([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 0.9999]) == [0, 0, 1, 1, 2, 2]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # by size: token 1 has 0.6, then token 2 makes 0.9, then token 0
    assert drawn([0.0, 0.5, 0.9999], top_p=0.5) == [1, 1, 1]
    assert drawn([0.0, 0.5, 0.9999], top_p=0.59) == [1, 1, 1]
    # tokens 1 and 2 renormalised: 0.667 and 0.333, in the order of ids
    assert drawn([0.0, 0.666, 0.667, 0.9999], top_p=0.61) == [1, 1, 2, 2]
    assert drawn([0.0, 0.666, 0.667, 0.9999], top_p=0.89) == [1, 1, 2, 2]
    # all three
    assert drawn([0.0, 0.0999, 0.1001, 0.6999, 0.7001], top_p=0.95) == [0, 0, 1, 1, 2]


def test_top_k_keeps_the_likeliest() -> None:
    assert drawn([0.0, 0.9999], top_k=1) == [1, 1]
    assert drawn([0.0, 0.666, 0.667, 0.9999], top_k=2) == [1, 1, 2, 2]
    assert drawn([0.0, 0.1001, 0.7001], top_k=3) == [0, 1, 2]
    assert drawn([0.0, 0.1001, 0.7001], top_k=50) == [0, 1, 2]
    # top_p is a share of what top_k leaves: 0.667 and 0.333
    assert drawn([0.0, 0.9999], top_k=2, top_p=0.66) == [1, 1]
    assert drawn([0.0, 0.9999], top_k=2, top_p=0.67) == [1, 2]


def test_min_p_is_relative_to_the_likeliest() -> None:
    # 0.1, 0.6, 0.3 relative to 0.6: 0.167, 1, 0.5
    assert drawn([0.0, 0.9999], min_p=0.51) == [1, 1]
    assert drawn([0.0, 0.9999], min_p=0.49) == [1, 2]
    assert drawn([0.0, 0.1001, 0.9999], min_p=0.16) == [0, 1, 2]


def test_a_nucleus_wider_than_the_candidates_is_found_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "CANDIDATES", 2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 100, generator=generator)
    u = torch.rand(5, dtype=torch.float64, generator=generator)
    for top_p in (0.02, 0.5, 0.99):
        probs, order = logits.double().softmax(-1).sort(descending=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p)
        in_order_of_ids = torch.zeros_like(probs).scatter(-1, order, probs)
        cumulative = in_order_of_ids.cumsum(-1) / in_order_of_ids.sum(-1, keepdim=True)
        choice = choose(logits, Sampling(temperature=1.0, top_p=top_p), u)
        assert choice.tokens.tolist() == (cumulative <= u[:, None]).sum(-1).tolist()


def test_bias_shifts_bans_and_leaves_the_plain_log_probs() -> None:
    bias = torch.tensor([0.0, float("-inf"), 0.0])
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.9999], dtype=torch.float64)  # 0.1 and 0.3 of 0.4
    for settings in ({}, {"top_p": 0.99}, {"top_k": 3}):
        choice = choose(LOGITS.expand(4, 3), Sampling(temperature=1.0, **settings), u, bias)
        assert choice.tokens.tolist() == [0, 0, 2, 2]
        plain, sampled = LOGITS[choice.tokens], (LOGITS - math.log(0.4))[choice.tokens]
        torch.testing.assert_close(choice.logprobs, plain)
        torch.testing.assert_close(choice.sampled_logprobs, sampled)
    greedy = choose(LOGITS[None], Sampling(), u[:1], bias)
    assert greedy.tokens.tolist() == [2] and greedy.sampled_logprobs.tolist() == [0.0]
    torch.testing.assert_close(greedy.logprobs, LOGITS[2:])


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}]
)
def test_sampled_log_probs_are_those_of_the_distribution_sampled_from(settings: dict[str, float]) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    n = 4000
    choice = choose(logits.expand(n, 40), Sampling(temperature=1.3, **settings), torch.arange(n).double() / n)
    probs = torch.zeros(40).index_add(
        0, choice.tokens, torch.full((n,), 1 / n)
    )  # u is a grid: exact to 1 / n
    for token, logprob in zip(choice.tokens.tolist(), choice.sampled_logprobs.tolist(), strict=True):
        assert math.exp(logprob) == pytest.approx(probs[token].item(), abs=1.1 / n)


def test_top_p_keeps_at_least_one_token() -> None:
    assert drawn([0.0, 0.9999], top_p=1e-9) == [1, 1]


def test_temperature_sharpens_and_flattens() -> None:
    # temperature 0.5 squares: 0.01, 0.36, 0.09 of 0.46 -> cumulative 0.0217, 0.8043
    assert drawn([0.0216, 0.0218, 0.8042, 0.8044], temperature=0.5) == [0, 1, 1, 2]
    # temperature 2 takes roots: 0.3162, 0.7746, 0.5477 of 1.6385 -> cumulative 0.1930, 0.6657
    assert drawn([0.1929, 0.1931, 0.6656, 0.6658], temperature=2.0) == [0, 1, 1, 2]
    # top_p acts on the distribution after temperature: 0.36 / 0.46 = 0.783
    assert drawn([0.0, 0.9999], temperature=0.5, top_p=0.78) == [1, 1]
    assert drawn([0.0, 0.9999], temperature=0.5, top_p=0.79) == [1, 2]


def test_the_extremes_of_temperature_are_greedy_and_uniform() -> None:
    bias = torch.tensor([0.0, 0.0, -math.inf])  # row 2 is padding
    u = torch.tensor([0.0, 0.49, 0.51, 0.99], dtype=torch.float64)
    for settings in ({}, {"top_p": 0.99}):
        for temperature, expected in ((1e-30, [1, 1, 1, 1]), (1e30, [0, 0, 1, 1])):
            sampling = Sampling(temperature=temperature, **settings)
            choice = choose(1e4 * LOGITS.expand(4, 3), sampling, u, bias)
            assert choice.tokens.tolist() == expected and choice.sampled_logprobs.isfinite().all()


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    tokens, *_ = choose(logits, Sampling(temperature=0.0), torch.tensor([0.99, 0.99], dtype=torch.float64))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_logprobs_are_those_of_the_plain_model(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=0.7)
    tokens, logprobs, _ = choose(
        5 + LOGITS[None].bfloat16(), sampling, torch.tensor([0.5], dtype=torch.float64)
    )
    assert logprobs.dtype == torch.float32
    expected = (5 + LOGITS.bfloat16()).float().log_softmax(-1)[tokens]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.6)])
def test_frequencies_are_those_of_the_distribution(temperature: float, top_p: float) -> None:
    logits: Tensor = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0])
    probs = (logits / temperature).softmax(-1)
    kept = probs.sort(descending=True)
    mass, nucleus = 0.0, []
    for p, token in zip(kept.values.tolist(), kept.indices.tolist(), strict=True):
        if mass < top_p:
            nucleus.append(token)
        mass += p
    expected = torch.zeros(6)
    expected[nucleus] = probs[nucleus] / probs[nucleus].sum()
    n = 20_000
    u = torch.from_numpy(uniforms(1, "row", 0, n))
    tokens, *_ = choose(logits.expand(n, 6), Sampling(temperature=temperature, top_p=top_p), u)
    found = torch.bincount(tokens, minlength=6) / n
    assert (found - expected).abs().max() < 0.015  # four standard deviations of a share
    assert not found[expected == 0].any()


def test_uniforms_depend_on_seed_id_and_sample_alone() -> None:
    first = uniforms(1, "a", 0, 8)
    assert np.array_equal(uniforms(1, "a", 0, 8), first)
    assert np.array_equal(uniforms(1, "a", 0, 100)[:8], first)  # a longer response begins alike
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(uniforms(1, "a", 0, 8), first)
    others = [uniforms(2, "a", 0, 8), uniforms(1, "b", 0, 8), uniforms(1, "a", 1, 8), uniforms(1, "a0", 0, 8)]
    assert not any(np.isin(other, first).any() for other in others)


def test_uniforms_are_uniform() -> None:
    u = np.concatenate([uniforms(1, str(index), sample, 10) for index in range(100) for sample in range(10)])
    assert u.dtype == np.float64
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.012  # four standard deviations
    counts = np.histogram(u, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 1000).max() < 120


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 1e-40},  # what logits are divided by in float32 would be 0 or infinite
        {"temperature": 1e39},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 2**63},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.*: expected"):
        Sampling(**wrong)
