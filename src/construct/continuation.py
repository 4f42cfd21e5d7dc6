"""Solutions continued from a prefix: rollouts that label a step, and branches that go wrong after it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from src import parallel
from src.code_solutions.tool_hook import MALFORMED, Coding
from src.data.encoding import STEP_END, encode_prompt, split_steps
from src.data.examples import Prompt, Sample
from src.evaluation.evaluator import LocalSolver, Sampler, SampleRequest, SamplerOutput
from src.inference.engine import Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.serving.served import ServedSolver, until
from src.serving.server_client import RemoteRequest
from src.text.blocks import ANY_MARKER, Marker

EOS, LENGTH, CONTEXT_FULL, TOO_MANY_STEPS = "eos", "length", "context full", "too many steps"


class Truncated(NamedTuple):
    """A solution cut after its first k steps; prompt.id names it: PROBLEM/SAMPLE/K."""

    prompt: Prompt
    sample: Sample
    steps: list[str]  # of the whole solution, each with what parts it from the next
    k: int
    step_end: str

    @property
    def prefix(self) -> str:
        """The first k steps as text."""
        return "".join(self.steps[: self.k])

    @property
    def rest(self) -> str:
        """How the solution itself continues."""
        return "".join(self.steps[self.k :])


def truncate_at_step(sample: Sample, k: int, step_end: str = STEP_END) -> Truncated:
    """Cut a sample's solution after its k-th step."""
    prompt = sample.problem._replace(id=f"{sample.id}/{sample.sample}/{k}")
    return Truncated(prompt, sample, split_into_steps(sample.response, step_end), k, step_end)


def split_into_steps(solution: str, step_end: str = STEP_END) -> list[str]:
    """Split a solution into steps that join to it: paragraphs or lines, or the blocks of one with code."""
    if step_end == Marker.END_OF_BLOCK:
        return [f"{block}{step_end}" for block in solution.split(step_end)[:-1]]
    *steps, last = split_steps(solution, step_end)
    return [step + step_end for step in steps] + [last]


def step_end_of(solution: str) -> str:
    """What ends a step of a solution: the end of a paragraph, or of a block in one with code."""
    return Marker.END_OF_BLOCK if ANY_MARKER.search(solution) else STEP_END


class ContinuationRequest(NamedTuple):
    """A prefix to continue; (id, sample) seeds its randomness."""

    id: str
    sample: int
    instruction: str
    prefix: str


class Continuation(NamedTuple):
    """What follows the prefix, and its end: EOS, LENGTH, the stop string that came, or why there is no text. A server
    may not report the number of tokens and their log-prob (sum over tokens, nats)."""

    request: ContinuationRequest
    text: str
    n_tokens: int | None
    logprob: float | None
    end: str


def generate_continuations(
    solver: LocalSolver | ServedSolver, requests: Sequence[ContinuationRequest], sampling: Sampling
) -> Iterator[Continuation]:
    """Continue every prefix, yielding each as it finishes; samples of one prefix share its prefill.

    All ranks call this and get the same ones in the same order. A prefix that fills the context ends as CONTEXT_FULL,
    and at a server with what the server says.
    """
    if isinstance(solver, ServedSolver):
        yield from _generate_at_server(solver, requests, sampling)
        return
    tokenizer, engine_requests, by_key = solver.tokenizer, [], {}
    vocabulary = vocabulary_of(tokenizer)
    for request in requests:
        text = solver.prompting.text(request.instruction)
        ids = encode_prompt(tokenizer, text, request.prefix, where=f"sample {request.id!r}")
        if len(ids) >= solver.model.config.max_seq_len:
            yield Continuation(request, "", 0, 0.0, CONTEXT_FULL)
            continue
        engine_requests.append(Request(request.id, request.sample, ids))
        by_key[request.id, request.sample] = request, ids[len(encode_prompt(tokenizer, text)) :]
    for done in generate(solver.model, engine_requests, sampling, vocabulary=vocabulary,
                         max_batch_size=solver.max_batch_size):
        request, prefix_ids = by_key[done.request.id, done.request.sample]
        # decoded together with the prefix: a vocabulary may drop a space at the start of a text, but not within it
        text = vocabulary.decode([*prefix_ids, *done.tokens])[len(vocabulary.decode(prefix_ids)) :]
        text, stop = sampling.until_stop(text)
        end = stop or (EOS if done.tokens[-1] in tokenizer.stop_ids else LENGTH)
        yield Continuation(request, text, len(done.tokens), sum(done.logprobs), end)


def _generate_at_server(
    solver: ServedSolver, requests: Sequence[ContinuationRequest], sampling: Sampling
) -> Iterator[Continuation]:
    """generate_continuations() by a server. A server does not say which stop string came, so it is not sent those that
    end a step: the first is looked for here, and what the server wrote after it is dropped."""
    by_key = {(request.id, request.sample): request for request in requests}
    remote = [RemoteRequest(*key, solver.prompt(one.instruction, one.prefix)) for key, one in by_key.items()]
    for answer in solver.complete(remote, replace(sampling, stop=solver.prompting.stop)):
        request = by_key[answer.request.id, answer.request.sample]
        if answer.reply is None:
            yield Continuation(request, "", None, None, answer.error)
            continue
        text, stop, reply = until(answer.reply, sampling)
        end = stop or (EOS if reply.finish == "stop" else LENGTH)
        yield Continuation(request, text, reply.token_count, reply.logprob, end)


def rollout_sampler(solver: LocalSolver | ServedSolver, prefixes: Mapping[str, str], sampling: Sampling) -> Sampler:
    """Make a sampler of whole solutions that begin with the prefix of their id."""

    def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        """Yield each solution, prefix and continuation, as it finishes."""
        requests = [ContinuationRequest(prompt.id, number, prompt.instruction, prefixes[prompt.id])
                    for prompt, number in wanted]
        for found in generate_continuations(solver, requests, sampling):
            error = "" if found.end in (EOS, LENGTH, *sampling.stop) else found.end
            yield _as_sample(found, found.request.sample, "length" if found.end == LENGTH else "stop", error)

    return sample


def _as_sample(found: Continuation, number: int, finish: str, error: str = "") -> SamplerOutput:
    # a tenth of a nat: further digits depend on the batch, and a rerun would change the file
    logprob = None if found.logprob is None else round(found.logprob, 1)
    response = found.request.prefix + found.text
    return SamplerOutput(found.request.id, number, response, found.n_tokens, finish, logprob, error)


class TemperatureSchedule(NamedTuple):
    """The temperature of each new step: from `start` up by `rise` a step, `cap` at most."""

    start: float
    rise: float
    cap: float

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        return min(self.start + self.rise * step, self.cap)


class StepSampling(NamedTuple):
    """How continuations are sampled step by step; max_new_tokens bounds one step."""

    schedule: TemperatureSchedule
    max_steps: int
    max_new_tokens: int
    seed: int
    step_end: str = STEP_END


def branching_sampler(
    solver: LocalSolver | ServedSolver, prefixes: Mapping[str, str], sampling: StepSampling,
    grade: Callable[[Prompt, str], str], attempts: int,
) -> Sampler:
    """Make a sampler of wrong solutions that begin with the prefix of their id (Lu et al. 2024, section 3.2).

    Each is tried up to `attempts` times, until one ends with a wrong answer; the first that is wrong counts, however
    many are made at once. A prefix that never goes wrong, or whose attempts never end, gives an error.
    grade(problem, response) -> outcome is called on rank 0 alone.
    """

    def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        """Yield the first wrong solution of each prefix, then an error for those without one."""
        open_prompts = {prompt.id: (prompt, number) for prompt, number in wanted}
        last_end: dict[str, str] = {}
        for batch in doubling_ranges(attempts):
            if not open_prompts:
                break
            requests = [ContinuationRequest(prompt.id, attempt, prompt.instruction, prefixes[prompt.id])
                        for prompt, _ in open_prompts.values() for attempt in batch]
            continuations = generate_stepwise(solver, requests, sampling)
            problems = {name: prompt for name, (prompt, _) in open_prompts.items()}
            outcomes = parallel.from_first_rank(lambda continuations=continuations, problems=problems: {
                f"{one.id}/{one.sample}": grade(problems[one.id], one.prefix + found.text)
                for one, found in continuations.items()})
            for request, found in continuations.items():
                outcome = outcomes[f"{request.id}/{request.sample}"]
                last_end[request.id] = f"{found.end}, {outcome}"
                has_ended = found.end in (EOS, *solver.prompting.stop) and found.text.strip()
                if request.id in open_prompts and has_ended and outcome == "wrong":
                    _, number = open_prompts.pop(request.id)
                    yield _as_sample(found, number, "stop")
        for name, (_, number) in open_prompts.items():
            error = f"not wrong in {attempts} attempts; the last: {last_end[name]}"
            yield SamplerOutput(name, number, "", None, "", None, error)

    return sample


def doubling_ranges(n: int) -> Iterator[range]:
    """Yield the numbers below n in ranges that double. Attempts of one range are made at once: most prefixes need few,
    and the few that need many would otherwise decode one by one."""
    first = 0
    while first < n:
        yield range(first, min(2 * first + 1, n))
        first = 2 * first + 1


def generate_stepwise(
    solver: LocalSolver | ServedSolver, requests: Sequence[ContinuationRequest], sampling: StepSampling
) -> dict[ContinuationRequest, Continuation]:
    """Continue every prefix a step at a time, all in lockstep, each step at its own temperature. The steps of a
    solution with code are its blocks; what its code prints is appended to them."""
    found = {request: Continuation(request, "", 0, 0.0, "") for request in requests}
    for step in range(sampling.max_steps):
        step_sampling = Sampling(temperature=sampling.schedule.at(step), max_new_tokens=sampling.max_new_tokens,
                                 stop=(sampling.step_end, *solver.prompting.stop), seed=sampling.seed)
        if solver.coding:
            step_sampling = solver.coding.sampling(step_sampling)
        # the id counts the step, so that each has random numbers of its own
        active = {(f"{one.id}/{step}", one.sample): one for one in requests if not found[one].end}
        if not active:
            break
        step_requests = [one._replace(id=name, prefix=one.prefix + found[one].text)
                         for (name, _), one in active.items()]
        for new in generate_continuations(solver, step_requests, step_sampling):
            request = active[new.request.id, new.request.sample]
            goes_on = new.end == sampling.step_end
            end = "" if goes_on else new.end
            if end and solver.coding and new.text:
                end = MALFORMED  # it stopped within a block
            before = found[request]
            text = before.text + new.text + (sampling.step_end if goes_on else "")
            found[request] = Continuation(request, text, _sum(before.n_tokens, new.n_tokens),
                                          _sum(before.logprob, new.logprob), end)
        if solver.coding:
            unfinished = [one for one in active.values() if not found[one].end]
            executed = solver.coding.execute_after([one.prefix + found[one].text for one in unfinished])
            for one, (output, reason) in zip(unfinished, executed, strict=True):
                found[one] = found[one]._replace(text=found[one].text + output, end=reason)
    return {one: item if item.end else item._replace(end=TOO_MANY_STEPS) for one, item in found.items()}


def _sum(one: float | None, other: float | None) -> float | None:
    """None where a part is not known."""
    return None if one is None or other is None else one + other


def replayable(jobs: Sequence[Truncated], coding: Coding) -> list[Truncated]:
    """Keep those of solutions whose code prints again what the solution shows; all ranks call this."""
    responses = {job.sample.id: job.sample.response for job in jobs}
    # by one rank: a timeout on one alone would let the ranks take different paths
    replays = parallel.from_first_rank(lambda: {name: coding.replays(text) for name, text in responses.items()})
    return [job for job in jobs if replays[job.sample.id]]
