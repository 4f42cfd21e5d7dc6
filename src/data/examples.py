"""Data files to typed examples. Every complaint names the file, the row and the key.

A file is a json array or jsonl; rows follow the schemas in dataset/README.md.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from src import jsonfile
from src.data import tables
from src.errors import UserError


class Row(NamedTuple):
    """One json object and where it stands: `where` is `FILE, row N` (or `line N`), counted from 1."""

    where: str
    values: dict[str, object]


class Instruction(NamedTuple):
    """A problem with one or more reference solutions."""

    instruction: str
    outputs: list[str]


class Chat(NamedTuple):
    """A conversation: every answer of the assistant is learnt. `where` it stands is for messages.

    The content of a message is a text, or a list of {"type": text | code | execution, "content": text} blocks.
    """

    where: str
    messages: list[dict[str, object]]


class Pair(NamedTuple):
    """A problem with solutions that should score higher (chosen) and lower (rejected).

    prefix is a partial solution that both sides go on from; it is given, and nothing is learnt from it.
    """

    instruction: str
    chosen: list[str]
    rejected: list[str]
    prefix: str = ""


class Judged(NamedTuple):
    """A problem with a solution in steps and what is known of each: 0 wrong to 1 right, None = not judged.

    An outcome row is one whose whole solution is a single step.
    """

    instruction: str
    steps: list[str]
    labels: list[float | None]


class Prompt(NamedTuple):
    """A problem to be solved; label is its answer where known, id names it in samples.jsonl.

    split names the part of the file it belongs to; answer_type and tolerance (absolute) say how its label is compared
    by a task of typed answers.
    """

    id: str
    instruction: str
    label: str | None
    level: int | None
    subject: str | None
    split: str | None = None
    answer_type: str = ""
    tolerance: float = 0.0


class Sample(NamedTuple):
    """One line of samples.jsonl, as far as later stages need it."""

    id: str
    sample: int
    prompt: str
    response: str
    outcome: str | None
    values: dict[str, object]


class Vote(NamedTuple):
    """Samples of one problem by their answer: those of the majority, and the others.

    confidence is the majority's share of all samples. Where no sample has an answer there is none: answer None,
    confidence 0, and every sample negative.
    """

    id: str
    prompt: str
    answer: str | None
    confidence: float
    positives: list[str]
    negatives: list[str]


def read_rows(path: str) -> list[Row]:
    """The objects of a json array, a jsonl or parquet file, or a saved `datasets` directory.

    Raises UserError if it is missing, torn or empty.
    """
    if tables.is_table(Path(path)) and Path(path).exists():
        rows = [Row(f"{path}, row {n}", values) for n, values in enumerate(tables.read_table(Path(path)), 1)]
    else:
        rows = [Row(where, values) for where, values in jsonfile.read_rows(path)]
    if not rows:
        raise UserError(f"{path} holds no rows; expected a json array or one json object a line")
    return rows


def _text(row: Row, key: str) -> str:
    """A string under `key`; an empty one is allowed."""
    if key not in row.values:
        raise UserError(f"{row.where}: key {key!r} is missing; found {', '.join(row.values) or 'no keys'}")
    value = row.values[key]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {key!r} is a {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        raise UserError(
            f"{row.where}: {key!r} holds a lone surrogate at character {problem.start}; it is not valid Unicode"
        ) from None
    return value


def _texts(row: Row, key: str) -> list[str]:
    """A string or a list of strings under `key`, as a list of at least one non-empty string."""
    value = row.values.get(key)
    values = value if isinstance(value, list) else [_text(row, key)]
    if not values or not all(isinstance(text, str) and text for text in values):
        raise UserError(f"{row.where}: {key!r} must be a non-empty string or a list of them")
    return [_text(Row(row.where, {key: text}), key) for text in values]


def _optional_text(row: Row, key: str) -> str | None:
    """A string or number under `key` as text; None where the key is absent or null."""
    value = row.values.get(key)
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{row.where}: {key!r} is a {type(value).__name__}; expected a string")
    return None if value is None else str(value)


def read_instructions(path: str) -> list[Instruction | Chat]:
    """Rows `{"instruction", "output": text or list}` or `{"messages": [{"role", "content"}, ...]}`.

    Raises UserError.
    """
    return [
        _chat(row)
        if "messages" in row.values
        else Instruction(_text(row, "instruction"), _texts(row, "output"))
        for row in read_rows(path)
    ]


def _chat(row: Row) -> Chat:
    """A conversation in which the assistant says something. Raises UserError."""
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.where}: 'messages' must be a non-empty list of {{'role', 'content'}}")
    read = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UserError(
                f"{row.where}: message {number} is a {type(message).__name__}; expected an object"
            )
        inside = Row(f"{row.where}, message {number}", message)
        read.append({"role": _text(inside, "role"), "content": _content(inside)})
    if not any(message["role"] == "assistant" and message["content"] for message in read):
        raise UserError(
            f"{row.where}: the assistant says nothing in 'messages'; there is nothing to learn from it"
        )
    return Chat(row.where, read)


def _content(message: Row) -> str | list[dict[str, str]]:
    """What a message says: a text, or blocks of texts."""
    blocks = message.values.get("content")
    if not isinstance(blocks, list):
        return _text(message, "content")
    read = []
    for number, block in enumerate(blocks, 1):
        if not isinstance(block, dict):
            raise UserError(
                f"{message.where}: block {number} is a {type(block).__name__}; expected an object"
            )
        inside = Row(f"{message.where}, block {number}", block)
        read.append({"type": _text(inside, "type"), "content": _text(inside, "content")})
    return read


def read_pairs(path: str) -> list[Pair]:
    """Rows `{"instruction", "chosen", "rejected", "prefix"?}`, each side a text or list. Raises UserError."""
    pairs = []
    for row in read_rows(path):
        prefix = _text(row, "prefix") if "prefix" in row.values else ""
        pair = Pair(_text(row, "instruction"), _texts(row, "chosen"), _texts(row, "rejected"), prefix)
        same = set(pair.chosen) & set(pair.rejected)
        if same:
            raise UserError(f"{row.where}: the same text is chosen and rejected: {min(same)[:60]!r}")
        pairs.append(pair)
    return pairs


def read_judged(path: str) -> list[Judged]:
    """Outcome rows `{"instruction", "output", "correct": bool}` or judged steps `{"instruction", "steps": [text, ...],
    "labels": [0 to 1 or null, ...]}`, by the keys of the first row. Raises UserError.

    A row none of whose steps is judged is an error: it could teach nothing.
    """
    rows = read_rows(path)
    read = _judged_steps if "steps" in rows[0].values else _judged_outcome
    return [read(row) for row in rows]


def _judged_outcome(row: Row) -> Judged:
    correct = row.values.get("correct")
    if not isinstance(correct, bool):
        raise UserError(
            f"{row.where}: 'correct' is {correct!r}; expected true or false beside 'output', or 'steps' and 'labels'"
        )
    (output,) = _texts(Row(row.where, {"output": _text(row, "output")}), "output")
    return Judged(_text(row, "instruction"), [output], [float(correct)])


def _judged_steps(row: Row) -> Judged:
    steps, labels = row.values.get("steps"), row.values.get("labels")
    lengths = [len(side) if isinstance(side, list) else repr(side) for side in (steps, labels)]
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps or len(steps) != len(labels):
        raise UserError(
            f"{row.where}: expected lists of equal length under 'steps' and 'labels', "
            f"found {lengths[0]} and {lengths[1]}"
        )
    for number, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip():
            raise UserError(f"{row.where}: step {number} is {step!r}; expected a text that is not empty")
        _text(Row(row.where, {f"step {number}": step}), f"step {number}")
        if label is not None and (not isinstance(label, int | float) or not 0 <= label <= 1):
            raise UserError(
                f"{row.where}: label {number} is {label!r}; expected 0 to 1, or null for not judged"
            )
    if all(label is None for label in labels):
        raise UserError(f"{row.where}: every label is null; leave out a row that judges nothing")
    return Judged(_text(row, "instruction"), steps, [None if x is None else float(x) for x in labels])


def read_prompts(path: str, *, need_label: bool) -> list[Prompt]:
    """Rows `{"instruction", "id"?, "label"?, "level"?, "subject"?, "split"?, "answer_type"?, "tolerance"?}`.

    Ids default to the row number from 0.

    Raises UserError, also for an id that stands twice and, with need_label, for a row without a label.
    """
    prompts, seen = [], {}
    for index, row in enumerate(read_rows(path)):
        prompt = Prompt(
            id=_optional_text(row, "id") or str(index),
            instruction=_text(row, "instruction"),
            label=_optional_text(row, "label"),
            level=int(level) if (level := _optional_text(row, "level")) and level.isdigit() else None,
            subject=_optional_text(row, "subject"),
            split=_optional_text(row, "split"),
            answer_type=_optional_text(row, "answer_type") or "",
            tolerance=_tolerance(row),
        )
        if need_label and not prompt.label:
            raise UserError(
                f"{row.where}: key 'label' is missing or empty; grading needs the answer of every row"
            )
        if prompt.id in seen:
            raise UserError(f"{row.where}: id {prompt.id!r} stands already at {seen[prompt.id]}")
        seen[prompt.id] = row.where
        prompts.append(prompt)
    return prompts


def _tolerance(row: Row) -> float:
    """How far a number may be from its label; 0 where nothing is said."""
    value = row.values.get("tolerance")
    if value is not None and (not isinstance(value, int | float) or not 0 <= value < math.inf):
        raise UserError(f"{row.where}: 'tolerance' is {value!r}; expected a number, 0 or more")
    return float(value or 0)


def read_instruction_rows(path: str) -> list[dict[str, object]]:
    """Rows with an "instruction" and whatever else they hold. Raises UserError."""
    rows = read_rows(path)
    for row in rows:
        _text(row, "instruction")
    return [row.values for row in rows]


def read_votes(path: str) -> list[Vote]:
    """Rows `{"id", "prompt", "answer": text or null, "confidence", "positives", "negatives"}`. Raises UserError."""
    found = []
    for row in read_rows(path):
        confidence, sides = (
            row.values.get("confidence"),
            [row.values.get(x) for x in ("positives", "negatives")],
        )
        texts = all(isinstance(side, list) and all(isinstance(x, str) for x in side) for side in sides)
        if not isinstance(confidence, int | float) or not 0 <= confidence <= 1 or not texts:
            raise UserError(
                f"{row.where}: expected a 'confidence' from 0 to 1 and lists of texts under 'positives' and "
                f"'negatives'; build the file with data_build.py vote"
            )
        found.append(
            Vote(
                _text(row, "id"),
                _text(row, "prompt"),
                _optional_text(row, "answer"),
                float(confidence),
                *sides,
            )
        )
    return found


def read_samples(path: str) -> list[Sample]:
    """samples.jsonl; a row without an id takes its place in the file. Raises UserError."""
    samples, seen = [], set()
    for index, row in enumerate(read_rows(path)):
        number = row.values.get("sample", 0)
        sample = Sample(
            id=_optional_text(row, "id") or str(index),
            sample=number if isinstance(number, int) else 0,
            prompt=_text(row, "prompt") if "prompt" in row.values else "",
            response=_text(row, "response"),
            outcome=_optional_text(row, "outcome"),
            values=row.values,
        )
        if (sample.id, sample.sample) in seen:
            raise UserError(f"{row.where}: id {sample.id!r}, sample {sample.sample} stands twice")
        seen.add((sample.id, sample.sample))
        samples.append(sample)
    return samples


def match_samples(samples: Sequence[Sample], prompts: Sequence[Prompt], source: str) -> list[Sample]:
    """Samples with the id and the instruction of their problem: found by id, or by place where a row names none.

    Raises UserError for a sample of no problem; `source` names the samples' file.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    matched = []
    for index, sample in enumerate(samples):
        if sample.values.get("id") is None:
            prompt = prompts[index] if index < len(prompts) else None
        else:
            prompt = by_id.get(sample.id)
        if prompt is None:
            raise UserError(
                f"{source}: sample id {sample.id!r} is not among the {len(prompts)} problems of the label file"
            )
        matched.append(sample._replace(id=prompt.id, prompt=sample.prompt or prompt.instruction))
    return matched
