"""src/models/forward.py: the same numbers and gradients however samples lie and logits are cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import load, parallel
from src.checkpoint import saving
from src.data.batch import Batch, make_batch, pack_shared
from src.data.encoding import Encoded
from src.models import forward
from src.models.decoder import Decoder
from tests import zoo
from tests.conftest import Folders
from tests.tiny import split

SAMPLES = [Encoded([1, 5, 9, 3, 2], 2), Encoded([1, 7, 2], 1), Encoded([1, *range(4, 60), 2], 20)]


@pytest.fixture
def model(folders: Folders) -> Decoder:
    return load.load_solver(folders.one)


def gradients(
    model: Decoder, batch: Batch, read: Callable[..., tuple[Tensor, Tensor]] = forward.logprobs_and_entropy,
    **options: object,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, entropies, and the gradient of a weighted sum of the log-probs and of the entropies that learn."""
    model.zero_grad()
    logprobs, entropy = read(model, *batch.inputs, **options)
    weights = torch.arange(1, 1 + len(logprobs)).sqrt()
    (logprobs * weights - 0.5 * entropy * weights.flip(0)).mean().backward()
    return logprobs.detach(), entropy.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def dense(
    model: Decoder, tokens: Tensor, mask: Tensor, lengths: None, distribution: forward.Distribution,
    learn_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """logprobs_and_entropy() by torch, of all logits at once."""
    logits = model.logits(model(tokens)).float()[:, :-1][mask[:, 1:]][:, : distribution.size] / distribution.temperature
    logits = logits.index_fill(1, torch.tensor(distribution.banned), -1e4)
    chosen = logits.log_softmax(-1).gather(-1, tokens[mask][:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return chosen, entropy if learn_entropy else entropy.detach()


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "gemma-2"])
@pytest.mark.parametrize("learn_entropy", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_logprobs_entropies_and_gradients_are_torch_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, learn_entropy: bool, learns: bool
) -> None:
    """With an output layer of its own, a tied one and softcapped logits, in four chunks of several parts."""
    parallel.start()
    solver = load.load_solver(split(zoo.make(tmp_path / "hf", name), tmp_path / "split"))
    solver.output_weight.requires_grad_(learns)
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 13 * 4 * solver.config.vocab_size)
    monkeypatch.setitem(forward.SOFTMAX_BYTES, "cpu", 5 * 4 * solver.config.vocab_size)
    size = solver.config.vocab_size
    options = {"distribution": forward.Distribution(0.7, size - 3, (0, size - 6)), "learn_entropy": learn_entropy}
    expected, found = (gradients(solver, make_batch(SAMPLES), read, **options)
                       for read in (dense, forward.logprobs_and_entropy))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_id_that_cannot_be_has_no_gradient_however_far_the_loss_is_scaled() -> None:
    """Padding's logit is -inf; the entropy and its gradient are those of the two others."""
    parallel.start()
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    local, _ = forward.vocab_logprobs(logits, torch.tensor([0]))
    entropies, scale = forward.vocab_entropy(local), torch.tensor([2.0**16])
    found = forward.vocab_gradient(local, torch.tensor([0]), entropies, torch.zeros(1), scale)
    leaf = logits[:, :2].clone().requires_grad_()
    torch.distributions.Categorical(logits=leaf).entropy().backward(scale)
    assert_close(found, torch.cat((leaf.grad, torch.zeros(1, 1)), 1))


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("packing", [False, True])
def test_scdpo_04_packing_and_chunks_change_nothing(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, rows: int, packing: bool
) -> None:
    expected = gradients(model, make_batch(SAMPLES))
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", rows * 4 * model.config.vocab_size)
    found = gradients(model, make_batch(SAMPLES, packing=packing))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


FORKS = [
    (Encoded([1, *range(4, 30), 2], 12), Encoded([1, *range(4, 15), 33, 34, 2], 12)),
    (Encoded([1, 7, 2], 1), Encoded([1, 8, 9, 2], 1)),
    (Encoded([1, 9, 9, 4, 2], 3), Encoded([1, 9, 9, 5, 2], 3), Encoded([1, 9, 9, 4, 2], 3)),
]


@pytest.mark.parametrize("name", ["llama-3.1", "mistral-window", "gemma-2"])
def test_a_common_beginning_read_once_changes_nothing(tmp_path: Path, name: str) -> None:
    """Beside rows of their own: plain, with a window shorter than the beginning, and with softcapped scores."""
    forked = load.load_solver(split(zoo.make(tmp_path / "hf", name), tmp_path / "split"))
    expected = gradients(forked, make_batch([row for group in FORKS for row in group]))
    assert_close(gradients(forked, pack_shared(FORKS)), expected, rtol=1e-5, atol=1e-5)


def test_chunks_by_hand(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 1)
    alone = torch.tensor([SAMPLES[0].tokens])
    logprobs = model.logits(model(alone))[0].log_softmax(-1)
    expected = torch.stack([logprobs[1, 9], logprobs[2, 3], logprobs[3, 2]])
    packed = make_batch(SAMPLES, packing=True)
    assert_close(forward.response_logprobs(model, *packed.inputs)[:3], expected, rtol=1e-5, atol=1e-5)


def test_logits_of_one_chunk_exist_at_once(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made twice but for the first chunk; once of an output layer that does not learn, and of a sum."""
    sizes, product = [], forward.linear
    monkeypatch.setattr(forward, "linear", lambda rows, weight: sizes.append(len(rows)) or product(rows, weight))
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 7 * 4 * model.config.vocab_size)
    batch, n = make_batch(SAMPLES, packing=True), sum(sample.n_response for sample in SAMPLES)
    for read, learns, made in ((forward.response_logprobs, True, 2 * n - 7), (forward.response_logprobs, False, n),
                               (forward.summed_logprobs, True, n)):
        sizes.clear()
        model.output.requires_grad_(learns)
        read(model, *batch.inputs).sum().backward()
        assert max(sizes) == 7 and sum(sizes) == made


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "gemma-2"])
@pytest.mark.parametrize("rows", [3, 1000])
def test_a_sum_and_its_gradient_are_those_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """With an output layer of its own and a tied one, with softcapped logits, cut up and whole."""
    solver = load.load_solver(split(zoo.make(tmp_path / "hf", name), tmp_path / "split"))
    for limits in (forward.CHUNK_BYTES, forward.SOFTMAX_BYTES):
        monkeypatch.setitem(limits, "cpu", rows * 4 * solver.config.vocab_size)
    batch = make_batch(SAMPLES)
    sums, found = (forward.summed_logprobs, lambda *args: forward.response_logprobs(*args).sum()), []
    for total in (of(solver, *batch.inputs) for of in sums):
        solver.zero_grad()
        (total / 7).backward()
        found.append((total.detach(), [parameter.grad for parameter in solver.parameters()]))
    assert_close(*found, rtol=1e-5, atol=1e-5)


def test_only_a_learnt_output_layer_has_a_gradient(model: Decoder) -> None:
    model.output.requires_grad_(False)
    forward.summed_logprobs(model, *make_batch(SAMPLES).inputs).backward()
    assert model.output.weight.grad is None and model.norm.weight.grad is not None


@pytest.mark.parametrize("score", ["last", "mean"])
def test_packed_scores_and_values_are_those_of_padded_rows(folders: Folders, score: str) -> None:
    verifier = load.load_verifier(folders.verifier)
    saving.record(verifier, score=score)
    padded, packed = make_batch(SAMPLES), make_batch(SAMPLES, packing=True)
    for read in (forward.response_scores, forward.response_values):
        assert_close(read(verifier, *packed.inputs), read(verifier, *padded.inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(padded.response_counts(), packed.response_counts())


def test_scdpo_04_no_position_sees_another_sample(model: Decoder) -> None:
    first, second = Encoded([1, 5, 9, 3, 2], 2), Encoded([1, 7, 2], 1)
    for other in (Encoded([1, 60, 2], 1), Encoded([3, 3, 3], 1)):
        together = forward.response_logprobs(model, *make_batch([first, other, first], packing=True).inputs)
        alone = forward.response_logprobs(model, *make_batch([first, second], packing=True).inputs)
        assert_close(together[:3], alone[:3], rtol=0, atol=1e-6)
        assert_close(together[-3:], alone[:3], rtol=0, atol=1e-6)
