"""Sampling problems until they have what pairs are made of: right and wrong solutions (Lu et al. 2024, section 3.1)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from src.construct.continuation import on_rank_0
from src.data.examples import Prompt, Sample
from src.evaluation.evaluator import Sampler, SampleRequest, SamplerOutput


class Enough(NamedTuple):
    """How many right and how many wrong solutions a problem needs; then it is not sampled any more."""

    right: int
    wrong: int

    def met(self, outcomes: Mapping[str, int]) -> bool:
        """Whether these are enough. What was cut off or has no answer is neither right nor wrong."""
        return outcomes["right"] >= self.right and outcomes["wrong"] >= self.wrong


def kinds(problems: Sequence[Prompt], samples: Sequence[Sample]) -> Counter[str]:
    """How many of the problems have which kinds of samples that came to their end."""
    outcomes = {problem.id: set() for problem in problems}
    for sample in samples:
        if sample.values.get("finish") == "stop":
            outcomes[sample.id].add(sample.outcome)
    names = {(True, True): "with right and wrong samples", (True, False): "with right ones alone",
             (False, True): "with wrong ones alone", (False, False): "with neither"}  # fmt: skip
    return Counter(names["right" in found, "wrong" in found] for found in outcomes.values())


def until_enough(
    sampler: Sampler,
    enough: Enough,
    outcome: Callable[[Prompt, str], str],
    before: Mapping[tuple[str, int], str],
) -> Sampler:
    """Of the samples that are asked for, one of each problem at a time, until it has enough.

    outcome(problem, response) is asked on rank 0 alone, of responses that came to their end. before: (id, sample) ->
    response of what an earlier, killed run left, which counts too, empty where it was cut off: whether a sample is
    drawn depends on those with lower numbers alone.
    """

    def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        problems = {prompt.id: prompt for prompt, _ in wanted}
        numbers = defaultdict(list)
        for prompt, number in wanted:
            numbers[number].append(prompt)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for number in range(1 + max(numbers, default=-1)):
            left = [prompt for prompt in numbers[number] if not enough.met(counts[prompt.id])]
            found = {name: text for (name, n), text in before.items() if n == number and name in problems}
            for drawn in sampler([(prompt, number) for prompt in left]) if left else ():
                yield drawn
                if not drawn.error:
                    found[drawn.id] = drawn.response if drawn.finish == "stop" else ""
            verdicts = on_rank_0(
                lambda texts=found: {name: outcome(problems[name], text) for name, text in texts.items()}
            )
            for name, verdict in verdicts.items():
                counts[name][verdict] += 1

    return sample
