"""A conversation with a solver: type a problem, watch the solution come, see its answer and what a verifier thinks."""

from collections.abc import Callable, Sequence
from itertools import count

from src import parallel, runlog
from src.data.encoding import STEP_ENDS, encode_prompt, split_steps
from src.data.examples import Sample
from src.evaluation.evaluator import LocalSolver
from src.evaluation.scoring import score_one
from src.grading.extract import extract
from src.grading.tasks import Task
from src.inference.engine import Request, generate, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder

WINDOW = 64  # tokens of a stream that are decoded at once: to decode all at each would be quadratic


def converse(solver: LocalSolver, sampling: Sampling, task: Task, verifier: Decoder | None) -> None:
    r"""Answer problems until the input ends; in a problem \n is a new line. All ranks call this, rank 0 reads."""
    for number in count():
        typed = parallel.from_first_rank(lambda: runlog.ask("problem> "))
        if typed is None:
            return
        instruction = typed.replace("\\n", "\n").strip()
        if instruction:
            runlog.table(answer_problem(solver, sampling, task, verifier, instruction, str(number)))


def answer_problem(
    solver: LocalSolver, sampling: Sampling, task: Task, verifier: Decoder | None, instruction: str, name: str
) -> str:
    """Stream the solution of one problem to the screen; what is to be said of it as a whole, as lines."""
    prompt = encode_prompt(solver.tokenizer, solver.prompting.text(instruction))
    if len(prompt) >= (context := solver.model.config.max_seq_len):
        return f"no answer: the prompt has {len(prompt)} tokens, the model's context {context}; shorten the problem"
    stream = Stream(solver.tokenizer.decode, sampling.stop, runlog.say)
    (completion,) = generate(
        solver.model, [Request(name, 0, prompt)], sampling, vocabulary=vocabulary_of(solver.tokenizer),
        max_batch_size=1, on_token=lambda _, token: stream.add(token))
    stream.finish(completion.text + "\n")
    lines = [] if completion.finish == "stop" else [f"cut at {len(completion.tokens)} tokens"]
    if task.graded:
        found = extract(task.extraction, completion.text)
        lines.append("no answer found" if found.answer is None else f"answer  {found.answer}   ({found.rule})")
    if verifier is not None and completion.text:
        solution = Sample(name, 0, instruction, completion.text, None, {"finish": completion.finish})
        scored = score_one(verifier, solver.tokenizer, solution)
        if scored is None:
            lines.append(f"no score: longer than the verifier's context of {verifier.config.max_seq_len} tokens")
        elif scored.step_scores:
            steps = split_steps(completion.text, STEP_ENDS[verifier.config.step])
            lines += [f"{p:8.3f}  {step}" for p, step in zip(scored.step_scores, steps, strict=True)]
        else:
            lines.append(f"{scored.score:8.3f}  {completion.text}")
    return "\n".join(lines)


class Stream:
    """Text of tokens as they come, without the half of a character and without what may become a stop string."""

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.decode, self.stop, self.say = decode, stop, say
        self.tokens: list[int] = []  # the newest
        self.left = self.said = 0  # characters in front of theirs, and those that were said

    def add(self, token: int) -> None:
        """Take a token and say what is certain by now."""
        self.tokens.append(token)
        decoded = self.decode(self.tokens)
        text = decoded.rstrip("\ufffd")
        places = [text.find(stop) for stop in self.stop if stop in text]
        # an end that a stop string begins with is withheld
        begun = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        self._say_up_to(text, min(places) if places else len(text) - max(begun, default=0))
        if len(self.tokens) > WINDOW:
            kept = self.decode(self.tokens[-WINDOW // 2 :])
            left = self.left + len(decoded) - len(kept)
            # not within a character, or what is still to be said; a first token loses a space, which has been said
            if kept and not kept.startswith("\ufffd") and decoded.endswith(kept) and left <= self.said:
                self.tokens, self.left = self.tokens[-WINDOW // 2 :], left

    def finish(self, text: str) -> None:
        """Say the rest of the whole text."""
        self.left = 0
        self._say_up_to(text, len(text))

    def _say_up_to(self, text: str, end: int) -> None:
        if self.left + end > self.said:
            self.say(text[self.said - self.left : end])
            self.said = self.left + end
