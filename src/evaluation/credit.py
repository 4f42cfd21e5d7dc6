"""Which tokens of a solution preference training has made likelier or less likely, and whether they stand where it
goes wrong (Lu et al. 2024, Step-Controlled DPO, eq. 7).

A token's credit is beta times the log-ratio of policy and reference, in nats; the credits of a response add up to the
implicit reward of DPO (Rafailov et al. 2023, eq. 5, without the term of the prompt alone).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from src.data.batch import chunks, make_batch
from src.data.encoding import Encoded
from src.data.examples import StepLabels
from src.errors import UserError
from src.evaluation.metrics import auc, wilson_interval
from src.evaluation.verifier_report import first_wrong
from src.inference.sampling import check_numbers
from src.models.decoder import Decoder
from src.models.forward import response_logprobs
from src.text.tokenizer import Tokenizer


class Credit(NamedTuple):
    """A solution's credits: of each token of the response, and of each step their sum and the lowest of them."""

    tokens: list[str]
    credits: list[float]
    step_credits: list[float]
    step_lowest: list[float]

    @property
    def reward(self) -> float:
        """The sequence's implicit reward."""
        return math.fsum(self.credits)


@torch.no_grad()
def token_logprobs(solver: Decoder, rows: Sequence[Encoded], max_batch_size: int) -> Iterator[list[float]]:
    """Compute the log-prob of each response token, row by row, in nats; as many numbers a row as it has tokens. Raises
    UserError where they are NaN."""
    solver.eval()
    for chunk in chunks(rows, max_batch_size):
        batch = make_batch(chunk)
        found = response_logprobs(solver, *batch.inputs).cpu()
        check_numbers(found.numpy(), f"{len(chunk)} solutions")
        yield from (part.tolist() for part in found.split(batch.response_counts().tolist()))


def credit(
    encoded: Encoded, policy: Sequence[float], reference: Sequence[float], beta: float, tokenizer: Tokenizer
) -> Credit:
    """The credits of one solution from the two models' log-probs of its tokens."""
    credits = [beta * (new - old) for new, old in zip(policy, reference, strict=True)]
    ends = [place + 1 for place, target in enumerate(encoded.targets) if not math.isnan(target)]
    steps = [credits[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    texts = tokenizer.pieces(encoded.tokens[encoded.response_start :])
    return Credit(texts, credits, [math.fsum(step) for step in steps], [min(step) for step in steps])


def report_credit(rows: Sequence[StepLabels], found: Sequence[Credit]) -> dict[str, object]:
    """How often the least credit lies in the first wrong step, by the step's sum and by its lowest token, with 95%
    intervals, and how often a step chosen at random would be it; and how well the reward tells solutions apart.

    Raises UserError where no solution has a wrong step.
    """
    wrong = [(place, each) for place, each in zip(first_wrong(rows), found, strict=True) if place >= 0]
    if not wrong:
        raise UserError(f"none of the {len(rows)} solutions has a wrong step; there is none to find")
    report: dict[str, object] = {"solutions": len(rows), "with_a_wrong_step": len(wrong),
                                 "blindly": sum(1 / len(each.step_credits) for _, each in wrong) / len(wrong)}
    for name, kind in (("by_sum", "step_credits"), ("by_lowest_token", "step_lowest")):
        hits = sum((steps := getattr(each, kind)).index(min(steps)) == place for place, each in wrong)
        report[name] = {"accuracy": hits / len(wrong), "interval": list(wilson_interval(hits, len(wrong)))}
    right = np.array([place < 0 for place in first_wrong(rows)])
    rewards = np.array([each.reward for each in found])
    report["reward_auc"] = auc(rewards, right) if right.any() else None
    return report


def credit_table(report: dict[str, object]) -> str:
    """The report in words."""
    lines = [f"{report['with_a_wrong_step']} of {report['solutions']} solutions go wrong; the first wrong step is"]
    for name, label in (("by_sum", "by the least credit of a step"), ("by_lowest_token", "by the least of a token")):
        low, high = report[name]["interval"]
        lines.append(f"{label:32}{report[name]['accuracy']:7.1%}   95% interval {low:.1%} .. {high:.1%}")
    lines.append(f"{'blindly':32}{report['blindly']:7.1%}")
    if report["reward_auc"] is not None:
        lines.append(f"{'AUC of the reward':32}{report['reward_auc']:7.3f}")
    return "\n".join(lines)
