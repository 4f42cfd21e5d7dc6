"""src/training/ppo_setup.py: which prompts a run answers."""

import pytest

from src.data.encoding import encode_prompt
from src.data.examples import Prompt
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.training.ppo_setup import fitting_prompts
from tests.training.workers import PROMPTS


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
