"""What a solver is asked: which problems of a file, in which words, after which demonstrations."""

import hashlib
import json
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from src.data.examples import Prompt
from src.data.rows import Row, Schema
from src.errors import UserError
from src.grading.tasks import INSTRUCTION, Task, check_template
from src.jsonfile import read_json, read_text

BUNDLED = Path(__file__).parent / "few_shot"  # gsm8k8, minerva4: problems and solutions of our own wording
BETWEEN = "\n\n"  # demonstrations
KEYS = ("split", "level", "subject")


class Prompting(NamedTuple):
    """How a problem becomes a prompt: demonstrations first, then the template with the problem in its place."""

    prompt: str  # the template
    demonstrations: str
    stop: tuple[str, ...]

    def text(self, instruction: str) -> str:
        """The prompt of one problem."""
        return self.demonstrations + self.prompt.replace(INSTRUCTION, instruction)

    def facts(self) -> dict[str, object]:
        """What samples depend on, as a log directory remembers it."""
        digest = hashlib.sha256(json.dumps([self.demonstrations, self.prompt]).encode()).hexdigest()
        return {"prompting": digest[:16], "stop": list(self.stop)}


def make_prompting(task: Task, few_shot: str = "", prompt_template: str = "") -> Prompting:
    r"""The task's own words, or those of the demonstrations, or the template given, which wins.

    few_shot names a bundled set or a json file {"prompt"?, "stop"?, "demonstrations": [{"instruction", "output"}]}.
    prompt_template is a file, or a text in which \n is a new line. Raises UserError.
    """
    template, stop, rows = task.prompt, task.stop, []
    if few_shot:
        values = _read_few_shot(few_shot)
        template, rows = values.get("prompt", template), values["demonstrations"]
        stop = (*stop, *(text for text in values.get("stop", ()) if text not in stop))
    if prompt_template:
        is_file = INSTRUCTION not in prompt_template and os.path.isfile(prompt_template)  # False for too long a name
        template = read_text(prompt_template) if is_file else prompt_template.replace("\\n", "\n")
    check_template(template, "--prompt_template" if prompt_template else f"the prompt of {few_shot or task.name}")
    gap = "" if template[-1].isspace() else " "
    shots = [template.replace(INSTRUCTION, row["instruction"]) + gap + row["output"] + BETWEEN for row in rows]
    return Prompting(template, "".join(shots), stop)


def _read_few_shot(name: str) -> dict[str, object]:
    """The object of a bundled or own file of demonstrations. Raises UserError."""
    bundled = {path.stem: path for path in BUNDLED.glob("*.json")}
    if name not in bundled and not Path(name).exists():
        raise UserError(f"--few_shot {name} is neither a file nor one of {', '.join(sorted(bundled))}")
    values = {key: value for key, value in read_json(bundled.get(name, name)).items() if value is not None}
    rows, prompt, stop = values.get("demonstrations"), values.get("prompt", ""), values.get("stop", [])
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) and isinstance(prompt, str)
            and isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
        raise UserError(f'--few_shot {name}: expected {{"prompt": text?, "stop": [text, ...]?, "demonstrations": '
                        '[{"instruction": text, "output": text}, ...]}')
    shots = [Row(f"--few_shot {name}, demonstration {n}", row, Schema()) for n, row in enumerate(rows, 1)]
    for shot in shots:
        shot.check_foreign()
    return values | {"demonstrations": [{"instruction": shot.instruction(), "output": shot.text("output")}
                                        for shot in shots]}


def select_prompts(prompts: Sequence[Prompt], split: str) -> list[Prompt]:
    """The prompts that a split names: "level=4-5,subject=Geometry", or "dev" for those whose `split` field says dev.

    All conditions must hold; a value may list alternatives with |. Empty = all. Raises UserError for a condition that
    does not parse, for an alternative that none of the prompts is, or if nothing is left.
    """
    chosen = list(prompts)
    for condition in filter(None, split.split(",")):
        key, sign, value = condition.partition("=")
        key, value = (key.strip(), value.strip()) if sign else ("split", key.strip())
        if key not in KEYS or not value:
            raise UserError(f"--split {split!r}: {condition!r} is no condition; expected NAME, level=4, level=1-3 or "
                            "subject=Algebra")
        for wanted in (alternatives := value.split("|")):
            if not any(_is(getattr(prompt, key), wanted) for prompt in prompts):
                found = sorted({str(getattr(prompt, key)) for prompt in prompts})
                raise UserError(f"--split {split!r}: no problem has {key} {wanted}; found {', '.join(found)[:200]}")
        chosen = [prompt for prompt in chosen if any(_is(getattr(prompt, key), wanted) for wanted in alternatives)]
    if not chosen:
        raise UserError(f"--split {split!r}: no problem meets all these conditions")
    return chosen


def _is(value: str | int | None, wanted: str) -> bool:
    """Whether a field is what is wanted, or lies in a range of numbers."""
    span = re.fullmatch(r"\s*(\d+)-(\d+)\s*", wanted)
    if span and isinstance(value, int):
        return int(span[1]) <= value <= int(span[2])
    return value is not None and str(value).lower() == wanted.strip().lower()
