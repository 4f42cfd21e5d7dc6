"""src/training/rollout.py: which episodes a buffer holds, and how they lie in it."""


import pytest
import torch

from src import load
from src.data.encoding import encode_prompt
from src.data.examples import Prompt
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.rollout import Rollout, sample_rollout
from tests.conftest import Folders
from tests.training.workers import PROMPTS


@pytest.fixture
def actor(folders: Folders) -> Decoder:
    return load.load_solver(folders.one)


SAMPLING = Sampling(temperature=0.8, max_new_tokens=6, seed=11)


def sample(
    actor: Decoder, prompts: list[Prompt], tokenizer: Tokenizer, first_sample: int, group_size: int = 1
) -> Rollout:
    numbers = range(first_sample, first_sample + group_size)
    return sample_rollout(actor, prompts, tokenizer, SAMPLING, numbers=numbers, max_batch_size=4)


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
