"""Solutions with code while they are written: each block of code is run as soon as it ends, its output comes next.

A solution's blocks lie in its tokens, prompt included, so nothing is remembered between two pauses: a run replays the
code blocks before it, whether they were sampled or given with the beginning of an answer.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from src import parallel
from src.code_solutions import runner
from src.code_solutions.runner import Limits, SandboxError
from src.inference.engine import Completion, Request, ToolHook
from src.inference.sampling import Sampling
from src.text.blocks import ANY_MARKER, Block, Marker, Piece, ended_blocks, split_text
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

    def tool_hook(self) -> ToolHook:
        """What the engine asks at the end of every block. Raises UserError where code cannot be isolated."""
        if self.isolation is None and parallel.rank() == 0:
            runner.best_isolation()
        return ToolHook((self.tokenizer.control[Marker.END_OF_BLOCK],), self._on_pause)

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

    def execute_after(self, answers: Sequence[str]) -> list[tuple[str, str]]:
        """Run what follows beginnings of answers in their text form, each up to the end of a block.

        -> the execution, perhaps none, and why the answer ends there, or "". All ranks call it.
        """
        ran = self._run([ended_blocks(split_text(answer)) for answer in answers])
        return [("" if output is None else "".join(_execution(output)), reason) for output, reason in ran]

    def replays(self, answer: str) -> bool:
        """Whether the code of an answer prints what follows it when it is run again. A solution for which it is false
        must not be continued: its state cannot be rebuilt."""
        blocks = ended_blocks(split_text(answer))
        code, outputs = (
            [block.content for block in blocks if block.kind == kind] for kind in ("code", "execution")
        )
        return len(code) == len(outputs) and runner.replays(code, outputs, self.limits, self.isolation)

    def _on_pause(self, rows: list[tuple[Request, list[int]]]) -> list[list[int] | str]:
        """What the engine appends after each pause."""
        ran = self._run([self.blocks(request.prompt, tokens) for request, tokens in rows])
        appended: list[list[int] | str] = []
        for output, reason in ran:
            pieces = [] if output is None else self.tokenizer.encode_pieces(_execution(output))
            appended.append(reason or [index for piece in pieces for index in piece])
        return appended

    def _run(self, solutions: list[list[Block]]) -> list[tuple[str | None, str]]:
        """What the code at the end of all solutions gives, run side by side on the first rank, on every rank."""
        with ThreadPoolExecutor(THREADS) as pool:
            return parallel.from_first_rank(lambda: list(pool.map(self._next, solutions)))

    def _next(self, solution: Sequence[Block]) -> tuple[str | None, str]:
        """What the last block of a solution printed, None where it is no code, and why the solution ends, or ""."""
        if sum(block.kind != "execution" for block in solution) >= self.max_rounds:
            return None, MAX_ROUNDS
        if solution[-1].kind != "code":
            return None, MALFORMED if solution[-1].kind == "" else ""
        code = [block.content for block in solution if block.kind == "code"]
        try:
            execution = runner.run(code, self.limits, self.isolation)
        except SandboxError as problem:
            return None, f"{INFRASTRUCTURE}: {problem}"
        return (execution.output, "") if execution.status in SHOWN else (None, f"exec_{execution.status}")

    def blocks(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[Block]:
        """The ended blocks of the answer that a prompt may begin and these tokens go on with."""
        markers = {self.tokenizer.control[marker]: marker for marker in Marker}
        ids = [*prompt, *tokens]
        start = len(ids) - ids[::-1].index(self.tokenizer.control[Marker.ASSISTANT])
        parts: list[Piece] = []
        for is_marker, group in groupby(ids[start:], markers.__contains__):
            stretch = list(group)
            parts += [markers[index] for index in stretch] if is_marker else [self.tokenizer.decode(stretch)]
        return ended_blocks(parts)


def _execution(output: str) -> list[Piece]:
    """The block that shows an output, markers in it broken: the text form of a solution must not mistake them."""
    harmless = ANY_MARKER.sub(lambda found: f"<| {found[0][2:]}", output)
    return [Marker.EXECUTION, harmless, Marker.END_OF_BLOCK]
