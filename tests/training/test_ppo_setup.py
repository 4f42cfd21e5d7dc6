"""src/training/ppo_setup.py: which prompts a run answers, and when."""

import dataclasses
import json
from pathlib import Path

import pytest

from src.data.encoding import encode_prompt
from src.data.examples import Prompt
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.training.ppo_config import PPOConfig
from src.training.ppo_setup import fitting_prompts, read_inputs
from tests.conftest import Folders
from tests.training.workers import PROMPTS


def test_prompts_that_leave_a_model_no_token_are_left_out_counted_and_named(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = [len(encode_prompt(tokenizer, prompt.instruction)) for prompt in PROMPTS]
    longest = max(lengths)

    def fitting(context: int) -> list[Prompt]:
        caplog.clear()
        contexts = {"actor": 99, "verifier": context}
        return fitting_prompts(PROMPTS, "p.json", tokenizer, contexts, max_new_tokens=6, policy="actor")

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


def test_a_critic_of_a_shorter_context_than_responses_is_refused(tokenizer: Tokenizer) -> None:
    """Beyond it it would give values, of positions that it has never seen."""
    longest = max(len(encode_prompt(tokenizer, prompt.instruction)) for prompt in PROMPTS)

    def fitting(actor: int, critic: int) -> list[Prompt]:
        contexts = {"actor": actor, "critic": critic}
        return fitting_prompts(PROMPTS, "p.json", tokenizer, contexts, 6, "actor", readers=["critic"])

    assert fitting(99, longest + 6) == fitting(longest + 2, longest + 2) == PROMPTS
    with pytest.raises(UserError, match=f"critic, {longest + 4} tokens, which reads them whole; lower .* by 2"):
        fitting(99, longest + 4)


@pytest.mark.parametrize(("task", "row", "complaint"), [
    ("none", {}, "--task none grades nothing"),
    ("GSM9K", {}, "no task 'GSM9K'.*did you mean GSM8K"),
    ("OlympiadBench", {"answer_type": "word"}, "'0' has the answer_type 'word'; expected number"),
])
def test_tasks_that_cannot_reward_are_refused_first(
    folders: Folders, tmp_path: Path, task: str, row: dict[str, str], complaint: str
) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": "1", "label": "1"} | row]))
    with pytest.raises(UserError, match=complaint):
        read_inputs(PPOConfig(actor_ckpt_dir=str(folders.one), actor_save_dir=str(tmp_path / "actor"), task=task,
                              train_file=str(tmp_path / "p.json"), reward=["rule"], advantage="rloo"))
    with pytest.raises(UserError, match="--eval_samples 8 greedy responses would be one"):
        PPOConfig(actor_ckpt_dir="", actor_save_dir="", reward=["rule"], advantage="rloo", eval_file="held",
                  eval_samples=8, eval_temperature=0.0)


def test_a_schedule_is_as_long_as_the_run(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"instruction": str(row), "label": "1"} for row in range(5)]))
    config = PPOConfig(
        actor_ckpt_dir=str(folders.one), actor_save_dir=str(tmp_path / "actor"), train_file=str(path), reward=["rule"],
        advantage="grpo", group_size=2, max_buffer_size=4, max_new_tokens=4, epochs=10**12, max_steps=7,
    )
    found = read_inputs(config)
    assert [epoch for epoch, _ in found.iterations] == [1, 1, 1, 2, 2, 2, 3] and found.per_epoch == 3
    assert sorted(row for _, rows in found.iterations[:3] for row in rows) == list(range(5))
    assert "--max_steps" not in caplog.text
    read_inputs(dataclasses.replace(config, epochs=2))
    assert "the run ends after step 6 of --max_steps 7, when its rows are used up: raise --epochs 2" in caplog.text
