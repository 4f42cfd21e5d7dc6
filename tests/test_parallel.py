"""src/parallel.py, models/forward.py and models/layers.py on 1 and 2 ranks."""

import platform

import pytest
import torch
from torch.testing import assert_close

from src import parallel
from src.processes import heap
from tests.ranks import run_ranks
from tests.workers import random_vocabulary

N_ROWS, VOCAB = 6, 32


@pytest.fixture(scope="module", params=[1, 2])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, object]]:
    """What each rank computed from its slice of the same logits."""
    target = "tests.workers:vocabulary_and_layers"
    return run_ranks(request.param, target, tmp_path_factory.mktemp("ranks"), n_rows=N_ROWS, vocab_size=VOCAB)


def test_vocab_logprobs_equal_log_softmax(ranks: list[dict[str, object]]) -> None:
    logits, targets, _ = random_vocabulary(N_ROWS, VOCAB)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    huge = (logits * 1e4).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    for rank in ranks:
        assert_close(rank["logprobs"], expected, rtol=3e-7, atol=1e-6)
        assert_close(rank["huge"], huge)
        assert rank["none"].shape == (0,)


def test_vocab_logprobs_have_the_gradient_of_log_softmax(ranks: list[dict[str, object]]) -> None:
    logits, targets, weights = random_vocabulary(N_ROWS, VOCAB)
    logits.requires_grad_()
    (logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1) * weights).sum().backward()
    assert_close(torch.cat([rank["gradient"] for rank in ranks], 1), logits.grad, rtol=0, atol=1e-6)


def test_vocab_entropy_is_that_of_the_whole_distribution(ranks: list[dict[str, object]]) -> None:
    logits, _, weights = random_vocabulary(N_ROWS, VOCAB)
    entropy = torch.distributions.Categorical(logits=logits.requires_grad_()).entropy()
    (entropy * weights).sum().backward()
    gradient = torch.cat([rank["entropy_gradient"] for rank in ranks], 1)
    assert_close(gradient, logits.grad, rtol=0, atol=1e-6)
    for rank in ranks:
        assert_close(rank["entropy"], entropy.detach())
        assert_close(rank["huge_entropy"], torch.zeros(N_ROWS))


def test_gather_vocab_joins_slices_and_cuts_their_gradient(ranks: list[dict[str, object]]) -> None:
    logits, _, _ = random_vocabulary(N_ROWS, VOCAB)
    assert all(torch.equal(rank["gathered"], logits) for rank in ranks)
    assert_close(torch.cat([rank["gathered_gradient"] for rank in ranks], 1), logits)


def test_layers_lay_out_their_slice_on_the_meta_device(ranks: list[dict[str, object]]) -> None:
    n = len(ranks)
    assert ranks[0]["shapes"] == {
        "tok_embeddings.weight": [32, 16 // n],
        "layers.0.attention.wq.weight": [16 // n, 16],
        "layers.0.attention.wk.weight": [8 // n, 16],
        "layers.0.attention.wv.weight": [8 // n, 16],
        "layers.0.attention.wo.weight": [16, 16 // n],
        "layers.0.feed_forward.w1.weight": [24 // n, 16],
        "layers.0.feed_forward.w2.weight": [16, 24 // n],
        "layers.0.feed_forward.w3.weight": [24 // n, 16],
        "layers.0.attention_norm.weight": [16],
        "layers.0.ffn_norm.weight": [16],
        "norm.weight": [16],
        "output.weight": [32 // n, 16],
    }


def test_embedding_width_that_does_not_divide_is_refused(ranks: list[dict[str, object]]) -> None:
    n, message = len(ranks), ranks[0]["refusal"]
    assert not message if n == 1 else f"width {2 * n + 1} does not divide over {n} ranks" in message


@pytest.mark.parametrize("size", [1, 7, 8, 52])
def test_shares_cover_a_dimension_once(size: int) -> None:
    for n in range(1, 9):
        parts = [parallel.share(size, n, index) for index in range(n)]
        assert [row for part in parts for row in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        padded = [row for index in range(n) for row in parallel.padded_share(size, n, index)]
        assert padded == list(range(-(-size // n) * n))


def test_ranks_sum_share_and_draw_alike(ranks: list[dict[str, object]]) -> None:
    for rank in ranks:
        assert rank["sum"].item() == sum(range(1, len(ranks) + 1))
        assert rank["from_first"].item() == 1.0
        assert torch.equal(rank["draw"], ranks[0]["draw"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_freed_memory_goes_back_to_the_system() -> None:
    megabyte = 2**18  # float32
    torch.ones(megabyte)  # from now on blocks of this size lie in the heap
    blocks = [torch.ones(megabyte) for _ in range(64)]
    pins = [torch.ones(64) for _ in range(4096)]  # what stays behind them keeps the heap from shrinking
    del blocks
    held = heap.resident_memory()
    heap.release_memory()
    assert heap.resident_memory() < held - 32 * 2**20 and len(pins) == 4096
