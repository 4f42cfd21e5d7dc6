"""src/evaluation/judging.py: scores between 0 and 1, the same in any batch, and a rerun that continues."""

import math
from pathlib import Path

import pytest
import torch

from src import assemble
from src.data.examples import Judged, Sample
from src.errors import UserError
from src.evaluation.judging import Scored, score_samples, score_steps
from src.evaluation.step_scores import sigmoid
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from tests.conftest import Folders

TEXTS = ["4", "abc def\n\n0123", "", "a\n\nb\n\n#### 7"]
SAMPLES = [
    Sample(str(n), 0, "1+1=", text, None, {"finish": "length" if n == 1 else "stop"})
    for n, text in enumerate(TEXTS)
]


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return assemble.load_verifier(folders.verifier)  # its scores have mean 0.5 and deviation 2


def score(
    verifier: Decoder, tokenizer: Tokenizer, folder: Path, samples: list[Sample] = SAMPLES, **options: object
) -> list[Scored]:
    options = {"aggregation": "prod", "max_batch_size": 3} | options
    path, log = folder / "scores.jsonl", RunLog(str(folder), {})
    return score_samples(verifier, tokenizer, samples, path=path, log=log, **options)


def test_a_pairwise_score_is_normalised_and_read_at_the_end(
    verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = score(verifier, tokenizer, tmp_path)
    for sample, scored in zip(SAMPLES, found, strict=True):
        ending = [] if sample.id == "1" else [tokenizer.eos_id]
        tokens = [tokenizer.bos_id, *tokenizer.encode("1+1="), *tokenizer.encode(sample.response), *ending]
        raw = verifier.scores(verifier(torch.tensor([tokens])))[0, -1].item()
        assert (
            scored.score == pytest.approx(sigmoid((raw - 0.5) / 2.0), abs=1e-5) and scored.step_scores is None
        )


@pytest.mark.parametrize("objective", ["outcome", "process"])
def test_steps_are_scored_alike_in_any_batch(
    verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path, objective: str
) -> None:
    assemble.set_score(verifier, objective=objective)
    found = score(verifier, tokenizer, tmp_path)
    assert [len(scored.step_scores) for scored in found] == [1, 2, 1, 3]
    for sample, scored in zip(SAMPLES, found, strict=True):
        (alone,) = score(verifier, tokenizer, tmp_path / sample.id, [sample])
        assert scored.step_scores == pytest.approx(alone.step_scores, abs=1e-5)
        expected = math.prod(scored.step_scores) if objective == "process" else scored.step_scores[-1]
        assert scored.score == pytest.approx(expected)
    judged = Judged("1+1=", ["a", "b", "#### 7"], [1.0, 1.0, 1.0])
    (steps,) = score_steps(verifier, tokenizer, [judged], max_batch_size=1)
    assert steps == pytest.approx(found[3].step_scores, abs=1e-5)


def test_a_rerun_scores_only_what_is_missing(
    verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(verifier, tokenizer, tmp_path)
    path = tmp_path / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # torn within the last line
    seen: list[int] = []
    forward = Decoder.forward

    def counting(self: Decoder, tokens: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        seen.append(len(tokens))
        return forward(self, tokens, *rest, **more)

    monkeypatch.setattr(Decoder, "forward", counting)
    again = score(verifier, tokenizer, tmp_path)
    assert seen == [1]
    for before, after in zip(whole, again, strict=True):
        assert after.score == pytest.approx(before.score, abs=1e-6)


def test_a_diverged_verifier_and_a_sample_that_does_not_fit_are_refused(
    verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = Sample("0", 0, "1+1=", "a" * 200, None, {})
    with pytest.raises(UserError, match=r"sample '0'/0 has \d+ tokens"):
        score(verifier, tokenizer, tmp_path, [long])
    with torch.no_grad():
        verifier.v_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the score of sample '0'/0 is nan; the verifier has diverged"):
        score(verifier, tokenizer, tmp_path, [long._replace(response="a")])
