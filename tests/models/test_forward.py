"""src/models/forward.py: the same numbers and gradients however samples lie and logits are cut."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src import load
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


def gradients(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, entropies, and the gradient of a weighted sum of the log-probs."""
    model.zero_grad()
    logprobs, entropy = forward.logprobs_and_entropy(model, *batch.inputs, temperature=0.7)
    (logprobs * torch.arange(1, 1 + len(logprobs)).sqrt()).mean().backward()
    return logprobs.detach(), entropy, [parameter.grad.clone() for parameter in model.parameters()]


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
    sizes = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 7 * 4 * model.config.vocab_size)
    forward.response_logprobs(model, *make_batch(SAMPLES, packing=True).inputs).sum().backward()
    assert max(sizes) == 7 and sum(sizes) == 2 * sum(sample.n_response for sample in SAMPLES)


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
