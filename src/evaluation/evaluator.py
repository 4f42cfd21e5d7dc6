"""A benchmark from problems to numbers: sample, grade, count. Every problem asked for is in every denominator."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from src import parallel
from src.data.collate import Encoded, chunks, collate, encode_prompt, encode_response
from src.data.examples import Prompt, Sample, read_samples
from src.errors import UserError
from src.evaluation.grade import GRADER_VERSION, Grader, Verdict
from src.evaluation.vote import best_of, majority, pass_at_k, weighted_vote, wilson_interval
from src.inference.engine import Completion, Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.inference.scoring import response_scores
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer

BOOTSTRAP_DRAWS = 1000


class Graded(NamedTuple):
    """One sample of a problem with its verdict; score is a verifier's, where one gave any."""

    response: str
    verdict: Verdict
    score: float | None


def claim_samples(path: Path, identity: dict[str, object]) -> None:
    """Bind samples.jsonl to what its samples depend on; all ranks call this.

    Raises UserError when the directory holds samples of another checkpoint, of other sampling flags or of unknown
    origin, which a rerun would otherwise take for its own.
    """
    record = _identity_file(path)
    if path.is_file():
        if not record.is_file():
            raise UserError(
                f"{path} was not sampled here (no {record.name} beside it); "
                f"choose another --log_dir or delete that file"
            )
        found = json.loads(record.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if found.get(name) != value:
                raise UserError(
                    f"{path} holds samples with {name}={found.get(name)}, but this run has {value}; "
                    f"choose another --log_dir or delete that file"
                )
    parallel.barrier()  # nobody writes before all have read
    if parallel.rank() == 0:
        _write(record, json.dumps(identity, indent=2) + "\n")


def disclaim_samples(path: Path, samples_file: str) -> None:
    """Forget what samples.jsonl is bound to, because graded samples of another file will take its place."""
    if Path(samples_file).resolve() != path.resolve():
        _identity_file(path).unlink(missing_ok=True)


def _identity_file(path: Path) -> Path:
    return path.with_name("samples.identity.json")


def sample_prompts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_samples: int,
    max_batch_size: int,
    path: Path,
    log: RunLog,
) -> None:
    """Sample every prompt into samples.jsonl, a line as each sample finishes; what the file holds is not redone.

    When all are there the file is sorted by prompt and sample. All ranks call this; rank 0 writes.
    """
    done = _finished_samples(path, prompts, num_samples)
    parallel.barrier()  # nobody writes before all have read
    requests = [
        Request(prompt.id, sample, encode_prompt(tokenizer, prompt.instruction))
        for prompt in prompts
        for sample in range(num_samples)
        if (prompt.id, sample) not in done
    ]
    by_id = {prompt.id: prompt for prompt in prompts}
    log.progress(len(requests), "sample")
    with path.open("a", encoding="utf-8") if parallel.rank() == 0 else open(os.devnull, "w") as file:
        for completion in generate(
            model, requests, sampling, vocabulary=vocabulary_of(tokenizer), max_batch_size=max_batch_size
        ):
            row = _sample_row(completion, by_id[completion.request.id])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            log.advance(tokens=len(completion.tokens))
    log.close_progress()
    if parallel.rank() == 0:
        place = {prompt.id: index for index, prompt in enumerate(prompts)}
        rows = [sample.values for sample in read_samples(str(path))]
        write_samples(path, sorted(rows, key=lambda row: (place[row["id"]], row["sample"])))
    parallel.barrier()


def _finished_samples(path: Path, prompts: Sequence[Prompt], num_samples: int) -> set[tuple[str, int]]:
    """(id, sample) of what an earlier, interrupted run left; a torn last line is cut off.

    Raises UserError for a sample that is not asked for: it would be deleted, or graded against another problem.
    """
    if parallel.rank() == 0 and path.is_file():
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    parallel.barrier()  # nobody reads before the torn line is gone
    instructions = {prompt.id: prompt.instruction for prompt in prompts}
    done = set()
    for sample in read_samples(str(path)) if path.is_file() and path.stat().st_size else ():
        if instructions.get(sample.id) != sample.prompt or sample.sample >= num_samples:
            raise UserError(
                f"{path} holds sample {sample.sample} of problem {sample.id!r}, which this run does not ask for "
                f"(other problems, or fewer); choose another --log_dir or delete that file"
            )
        done.add((sample.id, sample.sample))
    return done


def _sample_row(completion: Completion, prompt: Prompt) -> dict[str, object]:
    """A line of samples.jsonl before grading."""
    return {
        "id": prompt.id,
        "sample": completion.request.sample,
        "prompt": prompt.instruction,
        "response": completion.text,
        "token_count": len(completion.tokens),
        "finish": completion.finish,
        "logprob": round(sum(completion.logprobs), 4),  # the digits behind vary with the batch
        "label": prompt.label,
    }


def write_samples(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a whole samples.jsonl, complete or not at all."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _encode_sample(tokenizer: Tokenizer, sample: Sample, max_seq_len: int) -> Encoded:
    """A sample as ids. One that was cut off has no EOS, and loses what its text tokenises to beyond the context."""
    finished = sample.values.get("finish", "stop") == "stop" or not sample.response
    row = encode_response(tokenizer, sample.prompt, sample.response, finished=finished)
    if finished and len(row.tokens) > max_seq_len or row.response_start >= max_seq_len:
        raise UserError(
            f"sample {sample.id!r}/{sample.sample} has {len(row.tokens)} tokens; a verifier with context "
            f"{max_seq_len} cannot score it"
        )
    return Encoded(row.tokens[:max_seq_len], row.response_start)


@torch.no_grad()
def score_samples(
    verifier: Decoder, tokenizer: Tokenizer, samples: Sequence[Sample], *, max_batch_size: int, log: RunLog
) -> list[float]:
    """The verifier's score of each sample, normalised by its measured mean and deviation, in sample order.

    Sequences of like length share a batch. Raises UserError for a sample longer than the model's context, and for a
    score that is not a finite number.
    """
    config = verifier.config
    encoded = [_encode_sample(tokenizer, sample, config.max_seq_len) for sample in samples]
    verifier.eval()
    scores = [0.0] * len(samples)
    log.progress(len(samples), "sample")
    for rows in chunks(
        sorted(range(len(samples)), key=lambda index: len(encoded[index].tokens)), max_batch_size
    ):
        batch = collate([encoded[index] for index in rows]).to(parallel.device())
        for index, score in zip(rows, response_scores(verifier, *batch).tolist(), strict=True):
            scores[index] = (score - config.score_mean) / config.score_std
            if not math.isfinite(scores[index]):
                raise UserError(
                    f"the score of sample {samples[index].id!r}/{samples[index].sample} is {scores[index]}; "
                    f"the verifier has diverged, train it again with a lower learning rate"
                )
        log.advance(len(rows), tokens=batch.tokens.numel())
    log.close_progress()
    return scores


def grade_samples(
    task: str, prompts: Sequence[Prompt], samples: Sequence[Sample], path: Path
) -> dict[str, object]:
    """Grade samples against the prompts' labels; write them with answer and outcome to `path`, return results.

    Samples of other problems are left out; a prompt without samples counts as a miss.
    """
    labels = {prompt.id: prompt.label or "" for prompt in prompts}
    samples = [sample for sample in samples if sample.id in labels]
    with Grader(task) as grader:
        verdicts = grader.grade([s.response for s in samples], [labels[s.id] for s in samples])
        rows = [
            sample.values
            | {
                "id": sample.id,
                "sample": sample.sample,
                "prompt": sample.prompt,
                "label": labels[sample.id],
                "answer": verdict.answer,
                "outcome": verdict.outcome,
            }
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
        write_samples(path, rows)
        problems: dict[str, list[Graded]] = defaultdict(list)
        for sample, verdict in zip(samples, verdicts, strict=True):
            problems[sample.id].append(Graded(sample.response, verdict, sample.values.get("score")))
        return {"task": task, "grader": GRADER_VERSION} | summarize(prompts, problems, grader)


def summarize(
    prompts: Sequence[Prompt], problems: dict[str, list[Graded]], grader: Grader
) -> dict[str, object]:
    """The numbers of results.json. accuracy = mean over problems of the share of right samples.

    n samples a problem is the most any problem has; one with fewer is filled up with misses. maj_at, best_of_at and
    weighted_at average over the disjoint groups of k consecutive samples; their intervals are for the largest k.
    A weighted vote counts sigmoid(score).
    """
    n = max([1, *(len(samples) for samples in problems.values())])
    nothing = Graded("", Verdict("unparsed", None), None)
    filled = [
        problems.get(prompt.id, []) + [nothing] * (n - len(problems.get(prompt.id, []))) for prompt in prompts
    ]
    outcomes = Counter(graded.verdict.outcome for samples in filled for graded in samples)
    shares = [sum(graded.verdict.outcome == "right" for graded in samples) / n for samples in filled]
    sizes = [2**i for i in range(n.bit_length())]
    results: dict[str, object] = {
        "accuracy": _mean(shares),
        "interval": _interval(shares),
        "problems": len(prompts),
        "samples": sum(map(len, problems.values())),
        "samples_a_problem": n,
        "missing": outcomes["unparsed"],
        "outcomes": {name: outcomes[name] for name in ("right", "wrong", "unparsed", "timeout", "error")},
        "pass_at": {k: _mean([pass_at_k(n, round(share * n), k) for share in shares]) for k in sizes},
        "by_level": _by_level(prompts, shares),
    }
    for name, choose in _choices(problems, grader).items() if n > 1 else ():
        values = {k: [_chosen_share(samples, k, choose) for samples in filled] for k in sizes}
        results[f"{name}_at"] = {k: _mean(shares) for k, shares in values.items()}
        results[f"{name}_interval"] = _interval(values[sizes[-1]])
    return results


Choice = Callable[[Sequence[Graded]], int | None]  # which sample of a group to submit; None = no answer


def _choices(problems: dict[str, list[Graded]], grader: Grader) -> dict[str, Choice]:
    """The ways to submit one answer for several samples; those by score only where every sample has one."""

    def answers(group: Sequence[Graded]) -> list[str | None]:
        return [graded.verdict.answer for graded in group]

    def scores(group: Sequence[Graded]) -> list[float]:
        return [float("-inf") if graded.score is None else graded.score for graded in group]

    def weights(group: Sequence[Graded]) -> list[float]:
        # scores are about 0 on average: summed as they are, a class would gain nothing by its size
        return [0.5 + 0.5 * math.tanh(0.5 * score) for score in scores(group)]

    choices: dict[str, Choice] = {"maj": lambda group: majority(answers(group), grader.equal)}
    if all(graded.score is not None for samples in problems.values() for graded in samples):
        choices["best_of"] = lambda group: best_of(scores(group))
        choices["weighted"] = lambda group: weighted_vote(answers(group), weights(group), grader.equal)
    return choices


def _chosen_share(samples: Sequence[Graded], k: int, choose: Choice) -> float:
    """Share of right submissions over the disjoint groups of k consecutive samples."""
    groups = [samples[start : start + k] for start in range(0, len(samples) - k + 1, k)]
    picks = [(group, choose(group)) for group in groups]
    return sum(pick is not None and group[pick].verdict.outcome == "right" for group, pick in picks) / len(
        groups
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson for 0/1 shares, a seeded bootstrap over problems otherwise."""
    if all(share in (0.0, 1.0) for share in shares):
        return wilson_interval(int(sum(shares)), len(shares))
    draws = np.random.default_rng(0).choice(np.array(shares), (BOOTSTRAP_DRAWS, len(shares))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def _by_level(prompts: Sequence[Prompt], shares: Sequence[float]) -> dict[int, dict[str, float]]:
    """Accuracy and count of each level that problems name."""
    levels: dict[int, list[float]] = defaultdict(list)
    for prompt, share in zip(prompts, shares, strict=True):
        if prompt.level is not None:
            levels[prompt.level].append(share)
    return {
        level: {"accuracy": _mean(values), "problems": len(values)}
        for level, values in sorted(levels.items())
    }


def results_table(results: dict[str, object]) -> str:
    """results.json as a person reads it."""
    low, high = results["interval"]
    n = results["samples_a_problem"]
    lines = [
        f"{results['task']}: {results['problems']} problems, {n} samples each",
        f"accuracy    {results['accuracy']:7.1%}   95% interval {low:.1%} .. {high:.1%}",
    ]
    for name, label in (
        ("pass_at", "pass"),
        ("maj_at", "majority"),
        ("best_of_at", "best of"),
        ("weighted_at", "weighted"),
    ):
        if n > 1 and name in results:
            lines.append(
                f"{label:10}  " + "   ".join(f"@{k} {value:.1%}" for k, value in results[name].items())
            )
    lines += [
        f"level {level:<5} {entry['accuracy']:8.1%}   of {entry['problems']}"
        for level, entry in results["by_level"].items()
    ]
    lines.append("outcomes    " + ", ".join(f"{count} {name}" for name, count in results["outcomes"].items()))
    return "\n".join(lines)
