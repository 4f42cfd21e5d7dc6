"""Multiple choice by log-likelihood: each choice is put after the prompt, and the likeliest is the answer.

As lm-evaluation-harness defines them (Gao et al. 2021): acc takes the choice with the highest sum of log-probs,
acc_norm the one with the highest sum per byte of its text (beyond ASCII its acc_bytes; its acc_norm counts characters
there). Of equal ones the first counts.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from src.data.batch import chunks, pack_shared
from src.data.encoding import Encoded, encode_prompt
from src.data.examples import Prompt, Sample
from src.errors import UserError, naming
from src.evaluation.evaluator import LocalSolver, Sampler, SampleRequest, SamplerOutput
from src.evaluation.metrics import interval
from src.grading.letters import LETTERS
from src.inference.sampling import check_numbers
from src.models.forward import response_logprobs

ChoiceKind = Literal["letter", "text"]
PROMPT = "Question: {instruction}\nAnswer:"  # of tasks that leave a problem as it is
TEXTS, LOGPROBS = "choices", "choice_logprobs"  # of samples.jsonl: what was compared and the log-prob of each, in nats


def choice_sampler(solver: LocalSolver, kind: ChoiceKind, prompts: Sequence[Prompt]) -> Sampler:
    """What sample_prompts() takes: one sample a problem, which names the likeliest choice. All ranks get the same.

    kind: whether the choices' letters are compared, after the problem that lists them, or their texts, after the
    question alone. Raises UserError for a problem without choices, or one that is longer than the model's context.
    """
    if solver.coding:
        raise UserError("--choices compares answers as they are, but this checkpoint writes solutions with code")
    texts = {prompt.id: _choices(prompt, kind) for prompt in prompts}
    encoded = {}
    for prompt in prompts:
        with naming(prompt.where):
            encoded[prompt.id] = [_encode(solver, prompt, kind, text) for text in texts[prompt.id]]
    n = max(1, solver.max_batch_size // max(map(len, texts.values())))

    @torch.inference_mode()
    def score(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
        """Yield samples as they are scored; a problem's choices share the reading of its prompt."""
        solver.model.eval()
        for some in chunks(wanted, n):
            batch = pack_shared([tuple(encoded[prompt.id]) for prompt, _ in some])
            found = iter(response_logprobs(solver.model, *batch.inputs).cpu().split(batch.response_counts().tolist()))
            for prompt, number in some:
                # a thousandth of a nat: further digits depend on the rest of the batch
                sums = [round(next(found).double().sum().item(), 3) for _ in texts[prompt.id]]
                check_numbers(np.array(sums), f"problem {prompt.id!r}")
                best = sums.index(max(sums))
                yield SamplerOutput(prompt.id, number, f"The answer is ({LETTERS[best]}).",
                                    encoded[prompt.id][best].n_response, "stop", round(sums[best], 1),
                                    values={TEXTS: texts[prompt.id], LOGPROBS: sums})

    return score


def _choices(prompt: Prompt, kind: ChoiceKind) -> list[str]:
    """The texts of a problem's choices, or their letters. Raises UserError."""
    texts, needed = prompt.others.get("choices"), ("choices", "question") if kind == "text" else ("choices",)
    if missing := [key for key in needed if not prompt.others.get(key)]:
        raise UserError(f"problem {prompt.id!r} has no {missing[0]!r}, which --choices {kind} needs; "
                        "dataset/prepare.py writes it")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS) or not all(
            isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"problem {prompt.id!r}: 'choices' is {str(texts)[:80]}; expected 2 to {len(LETTERS)} texts")
    letters = LETTERS[: len(texts)]
    if prompt.label not in [*letters]:
        raise UserError(f"problem {prompt.id!r}: 'label' is {prompt.label!r}; expected the letter of a choice, "
                        f"A to {letters[-1]}")
    return texts if kind == "text" else [*letters]


def _encode(solver: LocalSolver, prompt: Prompt, kind: ChoiceKind, choice: str) -> Encoded:
    """A prompt and a choice as ids: in a chat template the choice begins the answer; else both are tokenised together,
    a space between them, and the choice is what comes after the prompt's own tokens."""
    tokenizer = solver.tokenizer
    text = solver.prompting.text(str(prompt.others["question"]) if kind == "text" else prompt.instruction)
    if tokenizer.chat:
        row = Encoded(encode_prompt(tokenizer, text, choice), len(encode_prompt(tokenizer, text)))
    else:
        stem = text.rstrip()
        whole = encode_prompt(tokenizer, stem + (text[len(stem) :] or " ") + choice)
        row = Encoded(whole, len(encode_prompt(tokenizer, stem)))
    if not 0 < row.n_response or len(row.tokens) > solver.model.config.max_seq_len:
        raise UserError(f"problem {prompt.id!r} has {len(row.tokens)} tokens with the choice {choice[:40]!r}, "
                        f"{row.n_response} of them the choice's, but the model's context is "
                        f"{solver.model.config.max_seq_len}; shorten or drop it")
    return row


def normalised(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> dict[str, object]:
    """acc_norm and its 95% interval as results.json holds them; nothing for samples without log-probs of choices."""
    picks = {}
    for name, values in ((sample.id, sample.values) for sample in samples if LOGPROBS in sample.values):
        per_byte = [sum_ / len(text.encode()) for text, sum_ in zip(values[TEXTS], values[LOGPROBS], strict=True)]
        picks[name] = LETTERS[per_byte.index(max(per_byte))]
    right = [float(picks.get(prompt.id) == prompt.label) for prompt in prompts]
    return {"acc_norm": sum(right) / len(right), "acc_norm_interval": interval(right)} if picks else {}
