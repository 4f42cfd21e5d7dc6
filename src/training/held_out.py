"""What a policy is worth on held-out problems while it learns: avg@N, pass@N and maj@N."""

from functools import partial

import torch

from src import context_parallel, parallel
from src.evaluation.metrics import answer_classes, weighted_vote
from src.evaluation.report import type_of
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.runlog import Phases
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import Inputs, PPOModels
from src.training.rollout import sample_rollout, shard_for_rank


def measure_held_out(
    config: PPOConfig, models: PPOModels, data: Inputs, grader: Grader, timer: Phases
) -> dict[str, float]:
    """eval_accuracy, the mean share of right responses to the held-out prompts; of several to each, eval_pass too, the
    share of prompts with a right one, and eval_majority, that of prompts whose most frequent answer is right.

    Of equally frequent answers the one seen first counts. A prompt that is too long to be answered is wrong.
    """
    n = config.eval_samples
    sampling = Sampling(temperature=config.eval_temperature, max_new_tokens=config.max_new_tokens,
                        stop=data.task.stop, seed=config.seed)
    counts = torch.zeros(3, dtype=torch.int64)  # right: responses, in any, by majority
    with models.phase(timer, "evaluate", models.actor.model):
        rollout = sample_rollout(models.actor.model, data.held_out, data.tokenizer, sampling, numbers=range(n),
                                 max_batch_size=config.rollout_batch_size, coding=data.coding)
    # a problem's responses are compared with one another: they stay on one rank, the first of its group
    mine = context_parallel.share(shard_for_rank(range(len(data.held_out))))
    for place in mine if parallel.tensor_parallel_rank() == 0 else ():
        prompt = data.held_out[place]
        responses, kind = rollout.responses[place * n : (place + 1) * n], type_of(prompt)
        verdicts = grader.grade(responses, [prompt.label or ""] * n, [kind] * n)
        is_right = [verdict.outcome == "right" for verdict in verdicts]
        counts[0] += sum(is_right)
        if n > 1:
            equal = partial(grader.equal, answer_type=kind)
            chosen = weighted_vote(answer_classes([verdict.answer for verdict in verdicts], equal), [1.0] * n)
            counts[1:] += torch.tensor([any(is_right), chosen is not None and is_right[chosen]])
    right, one_or_more, majority = parallel.sum_over_all(counts.to(parallel.device())).tolist()
    several = {"eval_pass": one_or_more / data.n_held_out, "eval_majority": majority / data.n_held_out}
    return {"eval_accuracy": right / (n * data.n_held_out)} | (several if n > 1 else {})
