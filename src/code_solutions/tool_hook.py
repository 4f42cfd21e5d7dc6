"""Solutions with code while they are written: each block of code is run as soon as it ends, its output comes next.

A solution's blocks lie in its tokens, prompt included, so nothing is remembered between two pauses: a run replays the
code blocks before it, whether they were sampled or given with the beginning of an answer.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from src import parallel
from src.code_solutions import runner
from src.code_solutions.runner import Limits, SandboxError
from src.inference.engine import Completion, Request, ToolAnswer, ToolHook
from src.inference.sampling import Sampling
from src.text.blocks import Marker, Piece, SolutionBlock, ended_blocks, split_text, text_form
from src.text.tokenizer import Tokenizer

PASSED = ("ok", "output_limit")
SHOWN = (*PASSED, "error")  # after these a solution sees the output and goes on
MAX_ROUNDS, MAX_TOKENS, CONTEXT_FULL = "max_rounds", "max_tokens", "context_full"
MALFORMED, INFRASTRUCTURE = "malformed", "infrastructure"
OUTPUT_BYTES = 2048  # of one execution; a page of digits teaches a model nothing and fills its context
THREADS = 2
# The interpreter's and the conversation's: a model that wrote them would answer for others.
NOT_SAMPLED = (Marker.EXECUTION, Marker.USER, Marker.SYSTEM, Marker.ASSISTANT)


def block_limits(seconds: float) -> Limits:
    """The limits of a block of so many seconds of a processor: twice as many by the clock, little output."""
    return Limits(cpu_seconds=seconds, wall_seconds=2 * seconds, output_bytes=OUTPUT_BYTES)


class _Next(NamedTuple):
    """What follows a block: the output of its code (None: nothing is shown), why the solution ends there, or "", and
    how the execution ended, "" of none."""

    output: str | None
    end: str = ""
    status: str = ""


class Coding(NamedTuple):
    """How solutions with code are written: blocks that the model writes at most, and what isolates its code.

    A solution ends as `stop` when the model ends its message, otherwise as MAX_ROUNDS, MAX_TOKENS (in a block),
    CONTEXT_FULL, MALFORMED (a block without a beginning), or exec_STATUS when an execution did not come to its end
    (exec_timeout, exec_memory, ...).
    """

    tokenizer: Tokenizer
    max_rounds: int
    isolation: str | None = None
    limits: Limits = block_limits(6.0)

    def tool_hook(self, *, whole: bool = False) -> ToolHook:
        """What the engine asks at the end of every block; whole: max_new_tokens bounds a solution, not a block. Raises
        UserError where code cannot be isolated."""
        if self.isolation is None and parallel.tensor_parallel_rank() == 0:
            runner.best_isolation()
        return ToolHook((self.tokenizer.control[Marker.END_OF_BLOCK],), self._on_pause, whole)

    @property
    def banned(self) -> tuple[int, ...]:
        """The ids of the markers that a solution must not write."""
        return tuple(self.tokenizer.control[marker] for marker in NOT_SAMPLED)

    def sampling(self, sampling: Sampling) -> Sampling:
        """The same without those."""
        return replace(sampling, logit_bias={**sampling.logit_bias, **dict.fromkeys(self.banned, float("-inf"))})

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
        return [("" if output is None else "".join(_execution(output)), end) for output, end, _ in ran]

    def replays(self, answer: str) -> bool:
        """Whether the code of an answer prints what follows it when it is run again. A solution for which it is false
        must not be continued: its state cannot be rebuilt."""
        blocks = ended_blocks(split_text(answer))
        code, outputs = ([block.content for block in blocks if block.kind == kind] for kind in ("code", "execution"))
        return len(code) == len(outputs) and runner.replays(code, outputs, self.limits, self.isolation)

    def _on_pause(self, rows: list[tuple[Request, list[int]]]) -> list[ToolAnswer]:
        """What the engine appends after each pause."""
        answers = []
        for output, end, status in self._run([self.blocks(request.prompt, tokens) for request, tokens in rows]):
            pieces = [] if output is None else self.tokenizer.encode_pieces(_execution(output))
            answers.append(ToolAnswer([index for piece in pieces for index in piece], end, status))
        return answers

    def _run(self, solutions: list[list[SolutionBlock]]) -> list[_Next]:
        """What follows each solution, run side by side on the first rank of a tensor-parallel group, on all of it."""
        with ThreadPoolExecutor(THREADS) as pool:
            return parallel.from_first_rank(lambda: list(pool.map(self._next, solutions)), of_group=True)

    def _next(self, solution: Sequence[SolutionBlock]) -> _Next:
        """What follows the last block of a solution; it runs code."""
        if sum(block.kind != "execution" for block in solution) >= self.max_rounds:
            return _Next(None, MAX_ROUNDS)
        if solution[-1].kind != "code":
            return _Next(None, MALFORMED if solution[-1].kind == "" else "")
        code = [block.content for block in solution if block.kind == "code"]
        try:
            execution = runner.run(code, self.limits, self.isolation)
        except SandboxError as problem:
            return _Next(None, f"{INFRASTRUCTURE}: {problem}")
        if execution.status in SHOWN:
            return _Next(execution.output, "", execution.status)
        return _Next(None, f"exec_{execution.status}", execution.status)

    def blocks(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[SolutionBlock]:
        """The ended blocks of the answer that a prompt may begin and these tokens go on with."""
        ids = [*prompt, *tokens]
        start = len(ids) - ids[::-1].index(self.tokenizer.control[Marker.ASSISTANT])
        return ended_blocks(self.tokenizer.decode_pieces(ids[start:]))


def _execution(output: str) -> list[Piece]:
    """The block that shows an output, markers in it broken: the text form of a solution must not mistake them."""
    return [Marker.EXECUTION, text_form([output]), Marker.END_OF_BLOCK]
