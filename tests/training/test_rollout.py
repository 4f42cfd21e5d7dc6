"""src/training/rollout.py: which episodes a buffer holds, and how they lie in it."""


import pytest
import torch

from src import load
from src.data.encoding import encode_prompt
from src.data.examples import Prompt
from src.errors import UserError
from src.grading.grader import Grader
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.rollout import Rollout, fitting_prompts, greedy_accuracy, sample_rollout
from tests.conftest import Folders
from tests.training.workers import PROMPTS


@pytest.fixture
def actor(folders: Folders) -> Decoder:
    return load.load_solver(folders.one)


SAMPLING = Sampling(temperature=0.8, max_new_tokens=6, seed=11)


def sample(
    actor: Decoder, prompts: list[Prompt], tokenizer: Tokenizer, first_sample: int, group_size: int = 1
) -> Rollout:
    options = {"group_size": group_size, "first_sample": first_sample, "max_batch_size": 4}
    return sample_rollout(actor, prompts, tokenizer, SAMPLING, **options)


def test_episodes_are_sampled_in_prompt_order_and_reproducibly(actor: Decoder, tokenizer: Tokenizer) -> None:
    found = sample(actor, PROMPTS, tokenizer, 0)
    assert found.prompts == PROMPTS
    for prompt, tokens, mask, text in zip(PROMPTS, *found.batch[:2], found.responses, strict=True):
        ids = encode_prompt(tokenizer, prompt.instruction)
        assert tokens[: len(ids)].tolist() == ids and mask.nonzero()[0] == len(ids)
        assert tokenizer.decode(tokens[mask].tolist()) == text
    again = sample(actor, PROMPTS[::-1], tokenizer, 0)
    assert again.responses[::-1] == found.responses
    assert sample(actor, PROMPTS, tokenizer, 1).responses != found.responses
    assert torch.equal(found.lengths, found.batch.response_mask.sum(1))
    assert torch.equal(found.last, torch.tensor([int(mask.nonzero().max()) for mask in found.batch[1]]))


def test_groups_of_different_iterations_do_not_share_samples(actor: Decoder, tokenizer: Tokenizer) -> None:
    first, second = (sample(actor, PROMPTS[:2], tokenizer, number, 3) for number in (0, 3))
    assert [prompt.id for prompt in first.prompts] == ["0", "0", "0", "1", "1", "1"]
    assert len(set(first.responses + second.responses)) > 8  # of 12


def test_greedy_accuracy_counts_every_prompt(actor: Decoder, tokenizer: Tokenizer) -> None:
    greedy = Sampling(max_new_tokens=6, seed=11)
    answers = sample_rollout(actor, PROMPTS, tokenizer, greedy, group_size=1, first_sample=0, max_batch_size=4)
    with Grader("toy") as grader:
        found = [grader.grade_one(response, "4").answer for response in answers.responses]
        prompts = [
            prompt._replace(label=answer if index in (1, 3) and answer else "no number")
            for index, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True))
        ]
        n_right = sum(prompt.label != "no number" for prompt in prompts)
        assert greedy_accuracy(actor, prompts, tokenizer, greedy, grader, 4) == pytest.approx(n_right / 5)


def test_prompts_that_leave_a_model_no_token_are_left_out_counted_and_named(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [len(encode_prompt(tokenizer, prompt.instruction)) for prompt in PROMPTS]
    longest = max(lengths)

    def fitting(context: int) -> list[Prompt]:
        caplog.clear()
        contexts = {"actor": 99, "verifier": context}
        return fitting_prompts(PROMPTS, "p.json", tokenizer, contexts, max_new_tokens=6)

    assert fitting(longest + 6) == PROMPTS and not caplog.records
    assert fitting(longest + 1) == PROMPTS
    assert "of 5 prompts leave less than --max_new_tokens 6 in the context of verifier" in caplog.text
    for context in range(min(lengths) + 1, longest + 1):
        kept = [prompt for prompt, n in zip(PROMPTS, lengths, strict=True) if n < context]
        assert fitting(context) == kept
        told = f"p.json: {5 - len(kept)} of 5 prompts fill the context of verifier, {context} tokens, and are left out"
        assert told in caplog.text
        assert all((f"(id {prompt.id!r}, " in caplog.text) == (prompt not in kept) for prompt in PROMPTS)
    with pytest.raises(UserError, match=r"p.json: 5 of 5 prompts fill .*; the first is row 1 \(id '0', \d+ tokens\)"):
        fitting(min(lengths))
