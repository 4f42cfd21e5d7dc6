"""Benchmarks as data: how a problem is put, where a response ends, and which rules find and compare its answer.

A rule's name ends in its version: what a rule decides never changes under the same name, so a score can be compared
with another one that names the same rules. A task of one's own is a json file with the fields of Task.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from src.errors import UserError
from src.grading.answer_types import EQUALITIES
from src.grading.extract import EXTRACTIONS
from src.jsonfile import read_json

INSTRUCTION = "{instruction}"  # where the problem stands in a template


def check_template(template: str, what: str) -> None:
    """Raise UserError unless the problem stands in the template exactly once."""
    if template.count(INSTRUCTION) != 1:
        raise UserError(f"{what} holds {INSTRUCTION} {template.count(INSTRUCTION)} times; expected it once, in "
                        f"{template[:80]!r}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark. An empty extraction (task none) means that nothing is graded."""

    name: str
    prompt: str = INSTRUCTION
    stop: tuple[str, ...] = ()
    extraction: str  # a name of extract.EXTRACTIONS
    equality: str  # a name of answer_types.EQUALITIES

    def __post_init__(self) -> None:
        check_template(self.prompt, f"task {self.name}: prompt")
        if not self.extraction:
            return
        for kind, known in (("extraction", EXTRACTIONS), ("equality", EQUALITIES)):
            name = getattr(self, kind)
            if name not in known:
                raise UserError(f"task {self.name}: no {kind} rule {name!r}; expected {', '.join(known)}")

    @property
    def graded(self) -> bool:
        """Whether answers are looked for at all."""
        return bool(self.extraction)

    def text(self, instruction: str) -> str:
        """The problem as the task puts it."""
        return self.prompt.replace(INSTRUCTION, instruction)

    def rules(self) -> dict[str, str]:
        """What results.json says about how answers were found and compared."""
        return {"extraction": self.extraction, "equality": self.equality}


RULES = (  # names, extraction, equality
    ("GSM8K SVAMP ASDiv MAWPS", "gsm8k/last-number@5", "exact@5"),
    ("MATH MATH-500 AIME24 AIME25 AMC23 HMMT Minerva", "math/last-box@5", "exact@5"),
    ("AQuA choice GPQA MMLU ARC CommonsenseQA", "choice/letter@5", "choice@5"),
    ("OlympiadBench OlympicArena BBH AGIEval", "math/last-box@5", "typed@5"),
    ("GSM8K-strict toy", "gsm8k/hashes@5", "exact@5"),
    ("none", "", ""),
)
TASKS = {name.lower(): Task(name=name, extraction=extraction, equality=equality)
         for names, extraction, equality in RULES for name in names.split()}
# the formats and comparisons of a published code base, to reproduce its numbers
TASKS |= {f"{name}-weak-to-strong".lower(): Task(
    name=f"{name}-weak-to-strong", prompt="Question: {instruction}\nAnswer:", stop=("Question", "Answer"),
    extraction=f"weak-to-strong/{extraction}@1", equality="minerva-strings@1")
    for name, extraction in (("GSM8K", "hashes"), ("MATH", "answer-is"))}


def find_task(name: str) -> Task:
    """The task of this name, in any case, or of this json file. Raises UserError."""
    if name.endswith(".json"):
        return read_task(name)
    task = TASKS.get(name.lower())
    if task is None:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1)
        hint = f"did you mean {TASKS[near[0]].name}?" if near else "or give a .json file"
        raise UserError(f"no task {name!r}; known tasks: {', '.join(task.name for task in TASKS.values())}; {hint}")
    return task


def read_task(path: str) -> Task:
    """A task of one's own. Raises UserError for a key that Task does not have, or one that is missing or no text."""
    values = {key: value for key, value in read_json(path).items() if value is not None}
    known = {field.name for field in fields(Task)}
    if not {"extraction", "equality"} <= values.keys() <= known:
        raise UserError(f"task file {path} holds {', '.join(values) or 'nothing'}; expected extraction and equality, "
                        f"and perhaps {', '.join(sorted(known - {'extraction', 'equality'}))}")
    stop = values.pop("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"task file {path}: 'stop' is {stop!r}; expected a list of texts")
    for key, value in values.items():
        if not isinstance(value, str):
            raise UserError(f"task file {path}: {key!r} is a {type(value).__name__}; expected text")
    return Task(**{"name": Path(path).stem} | values | {"stop": tuple(stop)})
