"""src/training/reward_model.py: the pairwise loss, where a score is read, and the numbers that go into a checkpoint."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import load
from src.checkpoint import saving
from src.command.config import OptimizerFlags
from src.data.batch import BatchSampler, Dataset, chunks, make_batch
from src.data.encoding import encode_response
from src.data.examples import Pair
from src.errors import UserError
from src.models.decoder import Decoder
from src.models.forward import response_scores
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from src.training.reward_model import PairwiseObjective, pair_dataset
from src.training.trainer import Trainer
from tests.conftest import Folders

PAIRS = [
    Pair("1+1=", ["2"], ["3", "abcdefgh 01"]),
    Pair("a", ["b c d e", "f"], ["g"]),
    Pair("", ["7"], ["8"]),
]


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return load.load_verifier(folders.verifier)


def make_data(rows: list[Pair], tokenizer: Tokenizer, max_seq_len: int = 64) -> Dataset:
    """The rows as training data."""
    return pair_dataset(rows, tokenizer, max_seq_len=max_seq_len, source="pairs.json")


def batching(max_batch_size: int, accumulation_steps: int) -> BatchSampler:
    """The steps of one data-parallel rank."""
    return BatchSampler(max_batch_size=max_batch_size, accumulation_steps=accumulation_steps, seed=1)


def test_rows_give_as_many_pairs_as_their_longer_side(tokenizer: Tokenizer) -> None:
    texts = [
        tuple(tokenizer.decode(side.tokens[side.response_start :]) for side in pair)
        for pair in make_data(PAIRS, tokenizer).samples
    ]
    assert texts == [("2", "3"), ("2", "abcdefgh 01"), ("b c d e", "g"), ("f", "g"), ("7", "8")]


def test_first_loss_is_ln_2(folders: Folders, tokenizer: Tokenizer) -> None:
    fresh = load.load_verifier(folders.one, from_solver=True)
    ((_, _, (batch,)),) = batching(5, 1).steps(make_data(PAIRS, tokenizer), packing=False, epochs=1)
    assert PairwiseObjective().loss(fresh, batch).item() / 5 == pytest.approx(math.log(2), abs=1e-7)


def test_loss_by_hand_and_its_invariance_to_the_split(verifier: Decoder, tokenizer: Tokenizer) -> None:
    data = make_data(PAIRS, tokenizer)
    expected = 0.0
    for pair in data.samples:
        better, worse = (response_scores(verifier, *make_batch([side]).inputs).item() for side in pair)
        expected += math.log(1 + math.exp(worse - better)) / len(data.samples)
    for size, packing in itertools.product((1, 2, 5), (False, True)):
        ((_, _, batches),) = batching(size, 5 // size + 1).steps(data, packing=packing, epochs=1)
        assert PairwiseObjective().count(batches) == len(data.samples)
        loss = sum(PairwiseObjective().loss(verifier, batch).item() for batch in batches) / len(data.samples)
        assert loss == pytest.approx(expected, abs=1e-5)


def test_score_is_read_at_the_last_response_token(verifier: Decoder, tokenizer: Tokenizer) -> None:
    rows = [
        encode_response(tokenizer, "1+1=", "2"),
        encode_response(tokenizer, "a", "bcdefgh abcdefgh", finished=False),
        encode_response(tokenizer, "a", "b c"),
    ]
    batch = make_batch(rows)
    batch.tokens[0, len(rows[0].tokens) :] = 63  # padding of another value
    together = response_scores(verifier, *batch.inputs)
    for row, score in zip(rows, together, strict=True):
        hidden = verifier(torch.tensor([row.tokens]))
        assert_close(score, verifier.scores(hidden)[0, -1], rtol=1e-5, atol=1e-5)
        assert_close(score, response_scores(verifier, *make_batch([row]).inputs)[0], rtol=1e-5, atol=1e-5)


def test_mean_score_is_over_the_response_tokens(verifier: Decoder, tokenizer: Tokenizer) -> None:
    saving.record(verifier, score="mean")
    rows = [
        encode_response(tokenizer, "1+1=", "2"),
        encode_response(tokenizer, "a", "bcdefgh a"),
    ]
    for row, score in zip(rows, response_scores(verifier, *make_batch(rows).inputs), strict=True):
        each = verifier.scores(verifier(torch.tensor([row.tokens])))[0]
        assert_close(score, each[row.response_start :].mean(), rtol=1e-5, atol=1e-5)


def test_report_counts_ties_as_wrong_and_measures_scores(verifier: Decoder, tokenizer: Tokenizer) -> None:
    tie = Pair("2", ["abc"], ["abc"])  # read_pairs() refuses this; here it makes an exact tie
    data = make_data([*PAIRS, tie], tokenizer)
    batches = [data.collate(pairs, False) for pairs in chunks(data.samples, 1)]
    scores = torch.cat([response_scores(verifier, *batch.inputs) for batch in batches]).view(-1, 2)
    won = scores[:, 0] > scores[:, 1]
    for size in (1, 4, 100):
        report = PairwiseObjective().evaluate(verifier, data, size)
        assert report.held_out_accuracy == pytest.approx(won[:-1].sum().item() / 6)
        assert report.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
        assert report.score_std == pytest.approx(scores.std(unbiased=False).item(), abs=1e-5)


def test_report_of_an_untrained_verifier_divides_by_one(folders: Folders, tokenizer: Tokenizer) -> None:
    fresh = load.load_verifier(folders.one, from_solver=True)
    assert PairwiseObjective().evaluate(fresh, make_data(PAIRS, tokenizer), 2) == pytest.approx(
        (0.0, -math.sqrt(5), 0.0, 1.0))


def test_score_statistics_are_stored(folders: Folders, verifier: Decoder, tmp_path: Path) -> None:
    assert (verifier.config.score_mean, verifier.config.score_std) == (0.5, 2.0)
    saving.record(verifier, score_mean=-3.25, score_std=0.125)
    saving.begin_save(verifier, str(tmp_path / "saved"), folders.verifier).complete()
    again = load.load_verifier(str(tmp_path / "saved")).config
    assert (again.score_mean, again.score_std, again.value_head) == (-3.25, 0.125, True)


def test_it_learns_separable_pairs(folders: Folders, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [Pair(f"{a}+{b}=", [f"a{a} b{b}"], [f"a{b} c{a}"]) for a in range(8) for b in range(4)]
    data, held_data = make_data(rows[:24], tokenizer), make_data(rows[24:], tokenizer)
    model = load.load_verifier(folders.one, from_solver=True)
    trainer = Trainer(model, RunLog(str(tmp_path), {}), OptimizerFlags(lr=1e-2), total_steps=24)
    reports = []
    for _, _, (batch,) in batching(8, 1).steps(data, packing=False, epochs=8):
        trainer.backward(PairwiseObjective().loss(model, batch) / 8)
        reports.append(trainer.step())
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-6) and reports[-1].loss < 0.1
    assert PairwiseObjective().evaluate(model, held_data, 8).held_out_accuracy == 1.0


def test_margin_and_centring_by_hand(verifier: Decoder, tokenizer: Tokenizer) -> None:
    data = make_data(PAIRS[:1], tokenizer)
    sides = [response_scores(verifier, *make_batch([side]).inputs).item() for side in data.samples[0]]
    plain, other = PairwiseObjective(), PairwiseObjective(margin=0.5, centring=0.01)
    ((_, _, (batch,)),) = batching(9, 1).steps(data, packing=False, epochs=1)
    first = math.log1p(math.exp(-(sides[0] - 0.5 - sides[1]))) + 0.01 * sum(sides) ** 2
    ((_, _, (alone,)),) = batching(9, 1).steps(
        make_data([Pair("1+1=", ["2"], ["3"])], tokenizer), packing=False, epochs=1
    )
    assert other.loss(verifier, alone).item() == pytest.approx(first, abs=1e-5)
    assert other.loss(verifier, batch).item() != pytest.approx(plain.loss(verifier, batch).item(), abs=1e-3)


def test_long_pairs_are_dropped_and_counted_up_to_one_percent(tokenizer: Tokenizer) -> None:
    short, long = Pair("a", ["b"], ["c"]), Pair("a", ["b"], ["c" * 40])
    data = make_data([short] * 99 + [long], tokenizer, max_seq_len=30)
    assert len(data.samples) == 99 and data.report == "pairs.json: 100 samples, 1 too long: 0 cut, 1 dropped"
    with pytest.raises(UserError, match="pairs.json: 2 of 100 rows are longer than --max_seq_len 30"):
        make_data([short] * 98 + [long] * 2, tokenizer, max_seq_len=30)
