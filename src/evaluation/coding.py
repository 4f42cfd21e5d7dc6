"""Solutions with code while they are written: each block of code is run as soon as it ends, its output comes next.

A solution's blocks lie in its tokens, prompt included, so nothing is remembered between two pauses: a run replays the
code blocks before it, whether they were sampled or given with the beginning of an answer.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from src import parallel
from src.evaluation import code_runner
from src.evaluation.code_runner import Limits, SandboxError
from src.inference.engine import Completion, Pausing, Request
from src.inference.sampling import Sampling
from src.text.blocks import ANY_MARKER, KINDS, Block, Marker
from src.text.tokenizer import Tokenizer

SHOWN = ("ok", "error", "output_limit")  # after these a solution sees the output and goes on
MAX_ROUNDS, MAX_TOKENS, CONTEXT_FULL = "max_rounds", "max_tokens", "context_full"
MALFORMED, INFRASTRUCTURE = "malformed", "infrastructure"
OUTPUT_BYTES = 2048  # of one execution; a page of digits teaches a model nothing and fills its context
THREADS = 2
# The interpreter's and the conversation's: a model that wrote them would answer for others.
NOT_SAMPLED = (Marker.EXECUTION, Marker.USER, Marker.SYSTEM, Marker.ASSISTANT)


class Coding(NamedTuple):
    """How solutions with code are written: blocks that the model writes at most, and what isolates its code.

    A solution ends as `stop` when the model ends its message, otherwise as MAX_ROUNDS, MAX_TOKENS (in a block),
    CONTEXT_FULL, MALFORMED (a block without a beginning), or exec_STATUS when an execution did not come to its end
    (exec_timeout, exec_memory, ...).
    """

    tokenizer: Tokenizer
    max_rounds: int
    isolation: str | None = None
    limits: Limits = Limits(output_bytes=OUTPUT_BYTES)

    def pausing(self) -> Pausing:
        """What the engine asks at the end of every block. Raises UserError where code cannot be isolated."""
        if self.isolation is None and parallel.rank() == 0:
            code_runner.best_isolation()
        return Pausing((self.tokenizer.control[Marker.END_OF_BLOCK],), self._go_on)

    def sampling(self, sampling: Sampling) -> Sampling:
        """The same without the markers that a solution must not write."""
        banned = {self.tokenizer.control[marker]: float("-inf") for marker in NOT_SAMPLED}
        return replace(sampling, logit_bias={**sampling.logit_bias, **banned})

    def end(self, completion: Completion, max_seq_len: int) -> str:
        """Why a solution ended."""
        if completion.finish != "length":
            return completion.finish
        n_tokens = len(completion.request.prompt) + len(completion.tokens)
        return CONTEXT_FULL if n_tokens >= max_seq_len else MAX_TOKENS

    def _go_on(self, rows: list[tuple[Request, list[int]]]) -> list[list[int] | str]:
        """Rank 0 runs the code of all rows side by side; every rank hears what came of it."""
        text = None
        if parallel.rank() == 0:
            solutions = [self.blocks(request.prompt, tokens) for request, tokens in rows]
            with ThreadPoolExecutor(THREADS) as pool:
                text = json.dumps(list(pool.map(self._next, solutions)))
        return [
            reason or ([] if output is None else self._execution(output))
            for output, reason in json.loads(parallel.broadcast_text(text))
        ]

    def _next(self, solution: Sequence[Block]) -> tuple[str | None, str]:
        """What the last block of a solution printed, None where it is no code, and why the solution ends, or ""."""
        if sum(block.kind != "execution" for block in solution) >= self.max_rounds:
            return None, MAX_ROUNDS
        if solution[-1].kind != "code":
            return None, MALFORMED if solution[-1].kind == "" else ""
        code = [block.content for block in solution if block.kind == "code"]
        try:
            execution = code_runner.run(code, self.limits, self.isolation)
        except SandboxError as problem:
            return None, f"{INFRASTRUCTURE}: {problem}"
        return (execution.output, "") if execution.status in SHOWN else (None, f"exec_{execution.status}")

    def _execution(self, output: str) -> list[int]:
        """The tokens of an execution block."""
        harmless = ANY_MARKER.sub(
            lambda found: f"<| {found[0][2:]}", output
        )  # the text form must not mistake it
        parts = self.tokenizer.encode_pieces([Marker.EXECUTION, harmless, Marker.END_OF_BLOCK])
        return [index for part in parts for index in part]

    def blocks(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[Block]:
        """The finished blocks of the answer that a prompt may begin and these tokens go on with.

        kind "" is a block that no marker began.
        """
        control = self.tokenizer.control
        kinds = {control[marker]: kind for kind, marker in KINDS.items()}
        ids = [*prompt, *tokens]
        start = len(ids) - 1 - ids[::-1].index(control[Marker.ASSISTANT])
        found: list[Block] = []
        kind, begin = "", start + 1
        for place in range(start, len(ids)):
            if ids[place] in kinds:
                kind, begin = kinds[ids[place]], place + 1
            elif ids[place] == control[Marker.END_OF_BLOCK]:
                found.append(Block(kind, self.tokenizer.decode(ids[begin:place])))
                kind = ""
        return found
