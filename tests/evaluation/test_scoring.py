"""src/evaluation/scoring.py: scores between 0 and 1, the same in any batch, and a rerun that continues."""

import math
from pathlib import Path

import pytest
import torch

from src import load
from src.checkpoint import saving
from src.data.encoding import encode_response
from src.data.examples import Sample, StepLabels
from src.errors import UserError
from src.evaluation.metrics import sigmoid
from src.evaluation.scoring import Scored, encode_samples, score_one, score_samples, score_steps, with_score
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer
from tests.conftest import CODE_SOLUTION, Folders

TEXTS = ["4", "abc def\n\n0123", "", "a\n\nb\n\n#### 7"]
SAMPLES = [
    Sample(str(n), 0, "1+1=", text, None, {"finish": "length" if n == 1 else "stop"})
    for n, text in enumerate(TEXTS)
]


@pytest.fixture
def verifier(folders: Folders) -> Decoder:
    return load.load_verifier(folders.verifier)  # its scores have mean 0.5 and deviation 2


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
    saving.record(verifier, objective=objective)
    found = score(verifier, tokenizer, tmp_path)
    assert [len(scored.step_scores) for scored in found] == [1, 2, 1, 3]
    for sample, scored in zip(SAMPLES, found, strict=True):
        (alone,) = score(verifier, tokenizer, tmp_path / sample.id, [sample])
        assert scored.step_scores == pytest.approx(alone.step_scores, abs=1e-5)
        expected = math.prod(scored.step_scores) if objective == "process" else scored.step_scores[-1]
        assert scored.score == pytest.approx(expected)
    judged = StepLabels("1+1=", ["a", "b", "#### 7"], [1.0, 1.0, 1.0])
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


LONG = Sample("0", 0, "1+1=", "a" * 200, None, {})


@pytest.mark.parametrize("objective", ["pairwise", "outcome", "process"])
@pytest.mark.parametrize("long", [LONG, LONG._replace(prompt="1" * 200, response="a")], ids=["solution", "problem"])
def test_a_sample_longer_than_the_context_is_left_without_a_score(
    verifier: Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    objective: str,
    long: Sample,
) -> None:
    saving.record(verifier, objective=objective)
    found = score(verifier, tokenizer, tmp_path, [SAMPLES[0], long, SAMPLES[3], long])
    assert found[1] is found[3] is None and "2 of 4 samples are longer than the model's context of 128" in caplog.text
    alone = score(verifier, tokenizer, tmp_path / "b", [SAMPLES[0], SAMPLES[3]])
    assert [found[0].score, found[2].score] == pytest.approx([each.score for each in alone], abs=1e-5)
    assert score(verifier, tokenizer, tmp_path, [SAMPLES[0], long]) == [found[0], None]  # a rerun says the same
    assert score_one(verifier, tokenizer, long) is None
    with pytest.raises(UserError, match="each of the 2 samples is longer than the model's context of 128 tokens"):
        score(verifier, tokenizer, tmp_path, [long, long])


def test_a_judged_solution_longer_than_the_context_is_left_without_scores(
    verifier: Decoder, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = StepLabels("1+1=", ["a" * 90, "b" * 90], [1.0, 0.0]), StepLabels("1+1=", ["a", "b"], [1.0, 0.0])
    found = score_steps(verifier, tokenizer, [long, short, long], max_batch_size=2)
    assert found[0] is found[2] is None and len(found[1]) == 2
    assert "2 of 3 solutions are longer than the model's context of 128" in caplog.text
    with pytest.raises(UserError, match="each of the 1 solutions is longer"):
        score_steps(verifier, tokenizer, [long], max_batch_size=2)


@pytest.mark.parametrize("text", ["a b\n1+1=2\n#### 2", "a b\n\n1+1=2\n#### 2\n"])
def test_a_verifier_of_lines_scores_lines(
    verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """Every way to score follows the checkpoint: samples, judged steps, one sample."""
    saving.record(verifier, objective="process", step="line")
    sample, judged = SAMPLES[0]._replace(response=text), StepLabels("1+1=", ["a b", "1+1=2", "#### 2"], [1.0] * 3)
    (scored,) = score(verifier, tokenizer, tmp_path, [sample])
    assert len(scored.step_scores) == 3
    assert score_steps(verifier, tokenizer, [judged], max_batch_size=1)[0] == pytest.approx(scored.step_scores)
    assert score_one(verifier, tokenizer, sample).step_scores == pytest.approx(scored.step_scores)
    assert not caplog.records
    saving.record(verifier, step="paragraph")
    paragraphs = score(verifier, tokenizer, tmp_path / "b", [sample])[0].step_scores
    assert len(paragraphs) == text.count("\n\n") + 1
    assert ("1 of the 1 samples of several lines have no blank line" in caplog.text) == (len(paragraphs) == 1)


def test_no_score_of_another_verifier_stays() -> None:
    before = SAMPLES[0]._replace(values={"finish": "stop", "score": 0.1, "step_scores": [0.2]})
    for scored, expected in ((None, {}), (Scored(0.5, None), {"score": 0.5}),
                             (Scored(0.5, [0.5]), {"score": 0.5, "step_scores": [0.5]})):
        assert with_score(before, scored).values == {"finish": "stop"} | expected


def test_a_diverged_verifier_is_refused(verifier: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with torch.no_grad():
        verifier.v_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the score of sample '0'/0 is nan; the verifier has diverged"):
        score(verifier, tokenizer, tmp_path, [LONG._replace(response="a")])


def test_a_mean_score_is_over_what_it_was_in_training(code_base: str, code_tokenizer: Tokenizer) -> None:
    """The tokens that a solver wrote, without what its code printed."""
    sample = Sample("0", 0, "Q", CODE_SOLUTION, None, {})
    (found,) = encode_samples(code_tokenizer, [sample], load.load_config(code_base))
    assert found == encode_response(code_tokenizer, "Q", CODE_SOLUTION) and not all(found.answer_mask[-30:])
