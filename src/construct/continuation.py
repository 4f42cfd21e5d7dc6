"""Solutions gone on with from a given beginning: rollouts that judge a step, and branches that go wrong behind one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from src import parallel
from src.code_solutions.tool_hook import MALFORMED, Coding
from src.data.encoding import STEP_END, encode_prompt, split_steps
from src.data.examples import Prompt, Sample
from src.evaluation.evaluator import Sampler, SampleRequest, SamplerOutput, local_sampler
from src.evaluation.prompting import Prompting
from src.evaluation.served import ServedSolver, until
from src.inference.engine import Request, generate, vocabulary_of
from src.inference.remote import RemoteRequest
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.blocks import ANY_MARKER, Marker
from src.text.tokenizer import Tokenizer

EOS, LENGTH, CONTEXT_FULL, TOO_MANY_STEPS = "eos", "length", "context full", "too many steps"


class Begun(NamedTuple):
    """A solution of which the first k steps are given; prompt.id names it: PROBLEM/SAMPLE/K."""

    prompt: Prompt
    sample: Sample
    steps: list[str]  # of the whole solution, each with what parts it from the next
    k: int
    step_end: str  # what parts them

    @property
    def prefix(self) -> str:
        """The given steps as text."""
        return "".join(self.steps[: self.k])

    @property
    def rest(self) -> str:
        """What the solution itself says behind them."""
        return "".join(self.steps[self.k :])


def step_end_of(solution: str, otherwise: str = STEP_END) -> str:
    """What ends a step of a solution: of one with code a block's end."""
    return Marker.END_OF_BLOCK if ANY_MARKER.search(solution) else otherwise


def whole_steps(solution: str, step_end: str = STEP_END) -> list[str]:
    """The steps of a solution, which join to it: paragraphs or lines, or the blocks of one with code."""
    if step_end == Marker.END_OF_BLOCK:
        return [f"{block}{step_end}" for block in solution.split(step_end)[:-1]]
    *steps, last = split_steps(solution, step_end)
    return [step + step_end for step in steps] + [last]


def begun(sample: Sample, k: int, step_end: str = STEP_END) -> Begun:
    """A sample's solution up to its k-th step."""
    name = f"{sample.id}/{sample.sample}/{k}"
    prompt = Prompt(name, sample.prompt, str(sample.values.get("label") or ""), None, None)
    return Begun(prompt, sample, whole_steps(sample.response, step_end), k, step_end)


class Solver(NamedTuple):
    """What goes on with solutions in this process; a ServedSolver does at a server.

    source: what its samples depend on beside the sampling.
    """

    model: Decoder
    tokenizer: Tokenizer
    prompting: Prompting
    max_batch_size: int
    coding: Coding | None = None  # of one that writes solutions with code
    source: Mapping[str, object] = {}

    def sampler(self, sampling: Sampling) -> Sampler:
        """Whole solutions, as sample_prompts() takes them."""
        return local_sampler(
            self.model, self.tokenizer, self.prompting, sampling, self.max_batch_size, coding=self.coding
        )


class Asked(NamedTuple):
    """A text to go on with; (id, sample) seeds its randomness."""

    id: str
    sample: int
    instruction: str
    prefix: str


class Continued(NamedTuple):
    """What follows the prefix, and its end: EOS, LENGTH, the stop string that was met, or why there is none.

    A server may not say the number of tokens and their log-prob.
    """

    asked: Asked
    text: str
    n_tokens: int | None
    logprob: float | None
    end: str


def continuations(
    solver: Solver | ServedSolver, asked: Sequence[Asked], sampling: Sampling
) -> Iterator[Continued]:
    """Go on from every prefix, as each is done; samples of one prefix share its reading.

    All ranks call this and get the same ones in the same order. A prefix that fills the context is not gone on from:
    it ends as CONTEXT_FULL, and at a server with what the server says.
    """
    if isinstance(solver, ServedSolver):
        yield from _continued_by_server(solver, asked, sampling)
        return
    tokenizer, requests, places = solver.tokenizer, [], {}
    vocabulary = vocabulary_of(tokenizer)
    for item in asked:
        text = solver.prompting.text(item.instruction)
        ids = encode_prompt(tokenizer, text, item.prefix)
        if len(ids) >= solver.model.config.max_seq_len:
            yield Continued(item, "", 0, 0.0, CONTEXT_FULL)
            continue
        requests.append(Request(item.id, item.sample, ids))
        places[item.id, item.sample] = item, ids[len(encode_prompt(tokenizer, text)) :]
    for done in generate(
        solver.model,
        requests,
        sampling,
        vocabulary=vocabulary,
        max_batch_size=solver.max_batch_size,
    ):
        item, before = places[done.request.id, done.request.sample]
        # read behind the prefix: a vocabulary may drop a space at the beginning of a text, but not in the middle
        text = vocabulary.decode([*before, *done.tokens])[len(vocabulary.decode(before)) :]
        met = min((stop for stop in sampling.stop if stop in text), key=text.index, default="")
        end = met or (EOS if done.tokens[-1] in tokenizer.stop_ids else LENGTH)
        yield Continued(
            item, text.partition(met)[0] if met else text, len(done.tokens), sum(done.logprobs), end
        )


def _continued_by_server(
    solver: ServedSolver, asked: Sequence[Asked], sampling: Sampling
) -> Iterator[Continued]:
    """continuations() of a server. It does not say which stop string it met, so the end of a step is looked for here;
    what it wrote behind one is dropped."""
    items = {(item.id, item.sample): item for item in asked}
    requests = [RemoteRequest(*key, solver.prompt(item.instruction, item.prefix)) for key, item in items.items()]
    for answer in solver.complete(requests, replace(sampling, stop=solver.prompting.stop)):
        item = items[answer.request.id, answer.request.sample]
        if answer.reply is None:
            yield Continued(item, "", None, None, answer.error)
            continue
        text, met, reply = until(answer.reply, sampling.stop)
        end = met or (EOS if reply.finish == "stop" else LENGTH)
        yield Continued(item, text, reply.token_count, reply.logprob, end)


def rollout_sampler(solver: Solver | ServedSolver, prefixes: Mapping[str, str], sampling: Sampling) -> Sampler:
    """Whole solutions that begin with the prefix of their id, as sample_prompts() takes them."""

    def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        asked = [
            Asked(prompt.id, number, prompt.instruction, prefixes[prompt.id]) for prompt, number in wanted
        ]
        for found in continuations(solver, asked, sampling):
            error = "" if found.end in (EOS, LENGTH, *sampling.stop) else found.end
            finish = "length" if found.end == LENGTH else "stop"
            response = found.asked.prefix + found.text
            logprob = None if found.logprob is None else round(found.logprob, 1)
            yield SamplerOutput(found.asked.id, found.asked.sample, response, found.n_tokens, finish, logprob, error)

    return sample


class Schedule(NamedTuple):
    """The temperature of each step behind the given ones: from `start` up by `rise` a step, `cap` at most."""

    start: float
    rise: float
    cap: float

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        return min(self.start + self.rise * step, self.cap)


class Written(NamedTuple):
    """A continuation of several steps and how it ended; as Continued, as Coding says, or TOO_MANY_STEPS."""

    text: str
    n_tokens: int | None
    logprob: float | None
    end: str


def branching_sampler(
    solver: Solver | ServedSolver,
    prefixes: Mapping[str, str],
    schedule: Schedule,
    outcome: Callable[[str, str], str],
    *,
    attempts: int,
    max_steps: int,
    max_new_tokens: int,
    seed: int,
    step_end: str = STEP_END,
) -> Sampler:
    """Wrong solutions that begin with the prefix of their id (Lu et al. 2024, Step-Controlled DPO, section 3.2).

    Each is tried up to `attempts` times, a step at a time with rising temperature, until it ends with a wrong
    answer; attempts go in waves(), and the first that is wrong counts, so that the result is that of one after the
    other. One that never is wrong is an error, and so is one that never ends. outcome(response, label) is asked on
    rank 0 alone. max_new_tokens bounds a step.
    """

    def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        live = {prompt.id: (prompt, number) for prompt, number in wanted}
        ends: dict[str, str] = {}
        for wave in waves(attempts):
            if not live:
                break
            asked = [Asked(p.id, n, p.instruction, prefixes[p.id]) for p, _ in live.values() for n in wave]
            written = write_steps(
                solver,
                asked,
                schedule,
                max_steps=max_steps,
                max_new_tokens=max_new_tokens,
                seed=seed,
                step_end=step_end,
            )
            labels = {name: prompt.label or "" for name, (prompt, _) in live.items()}
            verdicts = on_rank_0(
                lambda found=written, labels=labels: {
                    f"{item.id}/{item.sample}": outcome(item.prefix + text.text, labels[item.id])
                    for item, text in found.items()
                }
            )
            for item, found in written.items():
                verdict = verdicts[f"{item.id}/{item.sample}"]
                ends[item.id] = f"{found.end}, {verdict}"
                ended = found.end in (EOS, *solver.prompting.stop) and found.text.strip()
                if item.id in live and ended and verdict == "wrong":
                    _, number = live.pop(item.id)
                    response = item.prefix + found.text
                    logprob = None if found.logprob is None else round(found.logprob, 1)
                    yield SamplerOutput(item.id, number, response, found.n_tokens, "stop", logprob)
        for name, (_, number) in live.items():
            error = f"not wrong in {attempts} attempts; the last: {ends[name]}"
            yield SamplerOutput(name, number, "", None, "", None, error)

    return sample


def waves(attempts: int) -> Iterator[range]:
    """The numbers of attempts in groups that double, to be made at once: many solutions need few attempts, and the
    few that need many would else decode one by one."""
    first = 0
    while first < attempts:
        yield range(first, min(2 * first + 1, attempts))
        first = 2 * first + 1


def write_steps(
    solver: Solver | ServedSolver,
    asked: Sequence[Asked],
    schedule: Schedule,
    *,
    max_steps: int,
    max_new_tokens: int,
    seed: int,
    step_end: str = STEP_END,
) -> dict[Asked, Written]:
    """Go on from every prefix step by step, each step at its own temperature, all texts in step.

    The steps of a solution with code are its blocks; what its code prints is put behind them.
    """
    written = {item: Written("", 0, 0.0, "") for item in asked}
    for step in range(max_steps):
        sampling = Sampling(
            temperature=schedule.at(step),
            max_new_tokens=max_new_tokens,
            stop=(step_end, *solver.prompting.stop),
            seed=seed,
        )
        sampling = solver.coding.sampling(sampling) if solver.coding else sampling
        # the id counts the step, so that each draws its own random numbers
        going = {(f"{item.id}/{step}", item.sample): item for item in asked if not written[item].end}
        if not going:
            break
        requests = [
            item._replace(id=name, prefix=item.prefix + written[item].text)
            for (name, _), item in going.items()
        ]
        for found in continuations(solver, requests, sampling):
            item = going[found.asked.id, found.asked.sample]
            before, more = written[item], found.end == step_end
            written[item] = Written(
                before.text + found.text + (step_end if more else ""),
                _sum(before.n_tokens, found.n_tokens),
                _sum(before.logprob, found.logprob),
                ""
                if more
                else MALFORMED
                if solver.coding and found.text
                else found.end,  # it ends within a block
            )
        if solver.coding:
            _execute(solver.coding, [item for item in going.values() if not written[item].end], written)
    return {
        item: found if found.end else found._replace(end=TOO_MANY_STEPS) for item, found in written.items()
    }


def _sum(one: float | None, other: float | None) -> float | None:
    """None where a part is not known."""
    return None if one is None or other is None else one + other


def _execute(coding: Coding, asked: Sequence[Asked], written: dict[Asked, Written]) -> None:
    """Put what their code prints behind these solutions, in place."""
    answers = [item.prefix + written[item].text for item in asked]
    for item, (shown, reason) in zip(asked, coding.behind(answers), strict=True):
        written[item] = written[item]._replace(text=written[item].text + shown, end=reason)


def replayable(jobs: Sequence[Begun], coding: Coding) -> list[Begun]:
    """Those of solutions whose code prints again what stands in them; all ranks call this."""
    responses = {job.sample.id: job.sample.response for job in jobs}
    verdicts = on_rank_0(
        lambda: {name: str(coding.replays(response)) for name, response in responses.items()}
    )
    return [job for job in jobs if verdicts[job.sample.id] == str(True)]


def on_rank_0(verdicts: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What rank 0 says, on every rank: a timeout on one alone would part their ways."""
    return json.loads(parallel.broadcast_text(json.dumps(verdicts()) if parallel.rank() == 0 else None))
