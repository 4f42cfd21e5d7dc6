"""src/training/rollout.py: which episodes a buffer holds, and how they lie in it."""

from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close

from src import load
from src.checkpoint import export, saving
from src.checkpoint.sources import open_adapter
from src.data.encoding import encode_prompt
from src.data.examples import Prompt
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.text.tokenizer import Tokenizer
from src.training.monitor import rollout_metrics
from src.training.rewards import at_last
from src.training.rollout import Rollout, sample_rollout
from tests.conftest import Folders
from tests.reference import hf_model
from tests.training.workers import PROMPTS, collect, lora_of, ppo_config, ppo_models, ppo_update


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


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_adapters_sample_as_peft_s_merged_weights(
    folders: Folders, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    config = ppo_config(advantage="grpo", group_size=2)
    lora = lora_of(4, **{kind: True})
    models = ppo_models(folders.one, "", str(tmp_path / "log"), lora=lora, lr=2e-2)
    for iteration in range(2):
        buffer, _ = collect(
            models, tokenizer, lambda rollout: at_last(rollout.lengths.float(), rollout), config, iteration)
        metrics = rollout_metrics(buffer, config)
        assert metrics["sampler_mismatch"] < 1e-6 and (metrics["kl"] == 0) == (iteration == 0)
        saving.begin_save(models.actor.model, str(tmp_path / str(iteration)), folders.one,
                          lora=lora).complete()
        ppo_update(models, buffer, config, iteration)
    export.export_peft(open_adapter(tmp_path / "1"), tmp_path / "peft", "actor")
    merged = peft.PeftModel.from_pretrained(hf_model(folders.hf), tmp_path / "peft").merge_and_unload()
    tokens, mask = buffer.batch.tokens, buffer.batch.response_mask
    with torch.no_grad():
        logits = merged(tokens).logits[..., : buffer.distribution.size] / config.temperature
    expected = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    assert_close(buffer.rollout.sampled_logprobs[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], rtol=0, atol=1e-5)
