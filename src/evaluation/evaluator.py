"""A benchmark from problems to graded samples: sample, write down, grade meanwhile. report.py counts."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from src import parallel
from src.code_solutions.tool_hook import INFRASTRUCTURE, Coding
from src.data.encoding import encode_prompt
from src.data.examples import Prompt, Sample, read_samples
from src.errors import UserError, on_one_line
from src.evaluation.metrics import answer_classes
from src.evaluation.prompting import Prompting
from src.evaluation.report import Graded, Speed, type_of
from src.grading.grader import Grader, Verdict
from src.grading.tasks import Task
from src.inference.engine import Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.jsonfile import read_json, write_json, write_text
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.text.tokenizer import Tokenizer

GRADING_THREADS = 2  # and as many processes for the expressions that rules cannot decide
SampleRequest = tuple[Prompt, int]  # a problem and the number of a sample


class SamplerOutput(NamedTuple):
    """One sample as it comes from a sampler; with an error it failed and has no response. values: what else its line in
    samples.jsonl holds."""

    id: str
    sample: int
    response: str
    token_count: int | None
    finish: str
    logprob: float | None
    error: str = ""
    values: Mapping[str, object] = {}


Sampler = Callable[[Sequence[SampleRequest]], Iterator[SamplerOutput]]


class LocalSolver(NamedTuple):
    """A solver in this process; a ServedSolver is one at a server.

    coding: how the code of solutions is run; None leaves it as text. source: what samples depend on besides the
    sampling.
    """

    model: Decoder
    tokenizer: Tokenizer
    prompting: Prompting
    max_batch_size: int
    coding: Coding | None = None
    source: Mapping[str, object] = {}
    compiled: bool = False

    def sampler(self, sampling: Sampling) -> Sampler:
        """Whole solutions, as sample_prompts() takes them; tensor-parallel ranks get the same in the same order."""
        coding, config = self.coding, self.model.config
        sampling = coding.sampling(sampling) if coding else sampling
        tool_hook = coding.tool_hook() if coding else None

        def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
            """Decode a solution to each request, and yield them as they end."""
            requests = [
                Request(prompt.id, number, encode_prompt(
                    self.tokenizer, self.prompting.text(prompt.instruction), where=prompt.where))
                for prompt, number in wanted]
            with parallel.gathered(self.model):  # data-parallel ranks sample different numbers of tokens
                for done in generate(self.model, requests, sampling, vocabulary=vocabulary_of(self.tokenizer),
                                     max_batch_size=self.max_batch_size, compiled=self.compiled, tool_hook=tool_hook):
                    finish = coding.end(done, config.max_seq_len) if coding else done.finish
                    error = finish if finish.startswith(INFRASTRUCTURE) else ""
                    # to a tenth of a nat: further digits depend on the rest of the batch, and a rerun would differ
                    logprob = round(sum(done.logprobs), 1)
                    yield SamplerOutput(
                        done.request.id, done.request.sample, done.text, len(done.tokens), finish, logprob, error)

        return sample


class BackgroundGrader:
    """Grade samples of a task in the background, while others are still being sampled. Use as a context manager. Raises
    UserError for a problem of an unknown answer type."""

    def __init__(self, task: Task, prompts: Sequence[Prompt]) -> None:
        self.types = {prompt.id: type_of(prompt) for prompt in prompts}
        self.grader = Grader(task, workers=GRADING_THREADS)
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self._threads = ThreadPoolExecutor(GRADING_THREADS)
        self._verdicts: dict[tuple[str, int], Future[Verdict]] = {}

    def __enter__(self) -> "BackgroundGrader":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self.grader.__exit__(*error)

    def submit(self, name: str, number: int, response: str) -> None:
        """Take a sample, unless it was taken before; returns at once."""
        if (name, number) in self._verdicts:
            return
        prompt = self.prompts[name]
        self._verdicts[name, number] = self._threads.submit(
            self.grader.grade_one, response, prompt.label or "", self.types[name])

    def verdict(self, name: str, number: int) -> Verdict:
        """The verdict of a sample that was submitted, as soon as there is one."""
        return self._verdicts[name, number].result()


def claim_samples(path: Path, identity: dict[str, object]) -> None:
    """Bind samples.jsonl to what its samples depend on; all ranks call this.

    Raises UserError when the directory holds samples of another checkpoint, of other sampling flags or of unknown
    origin, which a rerun would otherwise take for its own.
    """
    if path.is_file():
        if not identity_file(path).is_file():
            raise UserError(f"{path} was not sampled here (no {identity_file(path).name} beside it); choose another "
                            "--log_dir or delete that file")
        found = read_json(identity_file(path))
        for name, value in identity.items():
            if found.get(name) != value and not (name == "config" and name not in found):  # of an earlier version
                raise UserError(f"{path} holds samples with {name}={on_one_line(found.get(name))}, but this run has "
                                f"{on_one_line(value)}; choose another --log_dir or delete that file")
    parallel.barrier()  # nobody writes before all have read
    if parallel.rank() == 0:
        write_json(identity_file(path), identity)


def refuse_sampled(path: Path) -> None:
    """Raise UserError if graded samples of another file would take the place of those that were sampled here."""
    if path.is_file() and identity_file(path).is_file():
        raise UserError(f"{path} was sampled here, and graded samples of another file would replace it; choose another "
                        "--log_dir")


def identity_file(path: Path) -> Path:
    """Where is kept what a file of samples, or one made of them, depends on: samples.jsonl -> samples.identity.json."""
    return path.with_name(f"{path.stem}.identity.json")


def sample_prompts(
    sampler: Sampler, prompts: Sequence[Prompt], *, num_samples: int, path: Path, log: RunLog,
    grading: BackgroundGrader | None = None,
) -> Speed:
    """Sample every prompt into samples.jsonl, a line as each sample finishes; what the file holds is not redone.

    In the end the file is sorted by prompt and sample. A sample that failed is in failures.jsonl instead, and is
    tried again by a rerun. `grading` grades what is finished meanwhile. All ranks call this. Data-parallel ranks share
    the prompts; the first of each tensor-parallel group writes, into a part of its own until the end.
    """
    if not prompts:
        raise UserError(f"there is no prompt to sample for {path}; expected at least one")
    _join_parts(path)
    done = _finished_samples(path, prompts, num_samples)
    parallel.barrier()  # nobody writes before all have read
    index, n_groups = parallel.data_parallel_rank(), parallel.data_parallel_size()
    missing = [[(prompt, number) for number in range(num_samples) if (prompt.id, number) not in done]
               for prompt in prompts]
    wanted = [request for of_prompt in list(filter(None, missing))[index::n_groups] for request in of_prompt]
    for (name, number), response in done.items() if grading else ():
        grading.submit(name, number, response)
    started, n_done, failed, tokens = time.monotonic(), 0, [], 0
    by_id = {prompt.id: prompt for prompt in prompts}
    log.progress(len(wanted), "sample")
    part = path.with_name(f"{path.stem}.part-{index}.jsonl") if index else path
    with part.open("a", encoding="utf-8") if parallel.tensor_parallel_rank() == 0 else open(os.devnull, "w") as file:
        for sample in sampler(wanted):
            log.advance(tokens=sample.token_count or 0)
            if sample.error:
                failed.append({"id": sample.id, "sample": sample.sample, "error": sample.error})
                continue
            prompt = by_id[sample.id]
            row = {"id": prompt.id, "sample": sample.sample, "prompt": prompt.instruction, "response": sample.response,
                   "token_count": sample.token_count, "finish": sample.finish, "logprob": sample.logprob,
                   "label": prompt.label}
            file.write(json.dumps(row | prompt.answer_fields | dict(sample.values), ensure_ascii=False) + "\n")
            file.flush()
            if grading:
                grading.submit(sample.id, sample.sample, sample.response)
            n_done, tokens = n_done + 1, tokens + (sample.token_count or 0)
    log.close_progress()
    parallel.barrier()
    n_done, tokens = (int(parallel.sum_over_data_parallel(n)) for n in (n_done, tokens))
    failed = parallel.gather_over_data_parallel(failed)
    _join_parts(path)
    speed = Speed(n_done, tokens, time.monotonic() - started)
    log.metrics(0, samples=n_done, tokens=tokens, tokens_per_second=tokens / max(speed.seconds, 1e-9))
    if parallel.rank() == 0:
        _report_failures(failed, path, log)
        place = {prompt.id: index for index, prompt in enumerate(prompts)}
        if not path.stat().st_size:
            raise UserError(f"none of {len(failed)} samples came; the first failed with: {failed[0]['error']}")
        rows = [sample.values for sample in read_samples(str(path))]
        write_samples(path, sorted(rows, key=lambda row: (place[row["id"]], row["sample"])))
    parallel.barrier()
    return speed


def _join_parts(path: Path) -> None:
    """Append what data-parallel ranks have written, perhaps of a run that was killed, to samples.jsonl. All ranks call
    this."""
    cut_torn_line(path)
    parts = sorted(path.parent.glob(f"{path.stem}.part-*.jsonl")) if parallel.rank() == 0 else []
    for part in parts:
        known = set(path.read_bytes().splitlines()) if path.is_file() else set()  # a kill may fall before unlink()
        lines = part.read_bytes().splitlines(keepends=True)
        with path.open("ab") as file:
            file.writelines(line for line in lines if line.endswith(b"\n") and line[:-1] not in known)
        part.unlink()
    parallel.barrier()


def _report_failures(failed: Sequence[dict[str, object]], path: Path, log: RunLog) -> None:
    """Leave failures.jsonl with what this start could not sample, or none if nothing failed."""
    record = path.with_name("failures.jsonl")
    if not failed:
        record.unlink(missing_ok=True)
        return
    write_samples(record, failed)
    names = ", ".join(f"{row['id']}/{row['sample']}" for row in failed[:10]) + " ..." * (len(failed) > 10)
    [(reason, n)] = Counter(row["error"] for row in failed).most_common(1)
    log.logger.warning("%d samples failed and count as missing until a rerun gets them: %s; %d of them with: %s; all "
                       "reasons in %s", len(failed), names, n, reason, record)


def _finished_samples(path: Path, prompts: Sequence[Prompt], num_samples: int) -> dict[tuple[str, int], str]:
    """(id, sample) -> response of what an earlier, interrupted run left; a torn last line is cut off. Raises UserError
    for a sample that is not asked for: it would be deleted, or graded against another problem."""
    cut_torn_line(path)
    instructions = {prompt.id: prompt.instruction for prompt in prompts}
    done = {}
    for sample in read_samples(str(path)) if path.is_file() and path.stat().st_size else ():
        if instructions.get(sample.id) != sample.prompt or sample.sample >= num_samples:
            raise UserError(f"{path} holds sample {sample.sample} of problem {sample.id!r}, which this run does not "
                            "ask for (other problems, or fewer); choose another --log_dir or delete that file")
        done[sample.id, sample.sample] = sample.response
    return done


def cut_torn_line(path: Path, begins: bytes = b"") -> None:
    """Cut off a last line that a killed run left without its end, if it begins as its lines do. All ranks call this."""
    if parallel.rank() == 0 and path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if data[whole:].startswith(begins) or begins.startswith(data[whole:]):
            os.truncate(path, whole)
    parallel.barrier()  # nobody reads before the torn line is gone


def write_samples(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a whole samples.jsonl, complete or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def grade_samples(grading: BackgroundGrader, samples: Sequence[Sample], path: Path) -> dict[str, list[Graded]]:
    """Grade samples and write them with answer and outcome to `path`. -> those of each problem in the order of their
    numbers, perhaps none. Samples that `grading` has graded already are not graded again. Samples of other problems are
    left out."""
    samples = [sample for sample in samples if sample.id in grading.prompts]
    for sample in samples:
        grading.submit(sample.id, sample.sample, sample.response)
    rows: list[dict[str, object]] = []
    numbered: dict[str, list[tuple[int, Graded]]] = {name: [] for name in grading.prompts}
    for sample in samples:
        verdict, values = grading.verdict(sample.id, sample.sample), sample.values
        named = {"id": sample.id, "sample": sample.sample, "prompt": sample.prompt}
        prompt = grading.prompts[sample.id]
        graded = {"label": prompt.label or "", "answer": verdict.answer, "outcome": verdict.outcome}
        rows.append(values | named | prompt.answer_fields | graded)
        facts = (values.get(name) for name in ("score", "step_scores", "finish", "token_count"))
        numbered[sample.id].append((sample.sample, Graded(verdict, *facts)))
    write_samples(path, rows)
    problems = {}
    for name, found in numbered.items():
        graded = [each for _, each in sorted(found, key=lambda pair: pair[0])]
        equal = partial(grading.grader.equal, answer_type=grading.types[name])
        classes = answer_classes([each.verdict.answer for each in graded], equal)
        problems[name] = [each._replace(vote=vote) for each, vote in zip(graded, classes, strict=True)]
    return problems
