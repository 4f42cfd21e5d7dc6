"""Data files to typed examples. Every complaint names the file, the row and the key.

A file is a json array or jsonl; rows follow the schemas in dataset/README.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from src.data.rows import FOREIGN, FOREIGN_IN_MESSAGE, VERDICTS, Row, Schema, level_number, read_rows
from src.errors import UserError


class Instruction(NamedTuple):
    """A problem with one or more reference solutions. `where` it stands is for messages, here and below."""

    instruction: str
    outputs: list[str]
    where: str = ""


class Chat(NamedTuple):
    """A conversation: every answer of the assistant is learnt but those of weight 0. The content of a
    message is a text, or a list of {"type": text | code | execution, "content": text} blocks."""

    where: str
    messages: list[dict[str, object]]


class Pair(NamedTuple):
    """A problem with solutions that should score higher (chosen) and lower (rejected). prefix is a partial solution
    that both sides continue; it is given, and nothing is learnt from it."""

    instruction: str
    chosen: list[str]
    rejected: list[str]
    prefix: str = ""
    where: str = ""


class StepLabels(NamedTuple):
    """A problem with a solution in steps and what is known of each: 0 wrong to 1 right, None = not known. An outcome
    row is one whose whole solution is a single step."""

    instruction: str
    steps: list[str]
    labels: list[float | None]
    where: str = ""

    @property
    def values(self) -> dict[str, object]:
        """The row as a file holds it."""
        return {"instruction": self.instruction, "steps": self.steps, "labels": self.labels}


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
    answer_type: str | None = None
    tolerance: float | None = None
    others: Mapping[str, object] = {}  # what else the row holds, for rewards of a user's own
    where: str = ""

    @property
    def answer_fields(self) -> dict[str, object]:
        """How the label is compared, as rows say it; nothing where it is compared by its shape."""
        return {name: value for name in ("answer_type", "tolerance") if (value := getattr(self, name))}


OF_PROMPT = Prompt._fields[:-2]  # the keys of a row that are known
OUTCOMES = ("right", "wrong", "unparsed", "timeout", "error")  # what a grader may say of a sample
UNDECIDED = ("timeout", "error")  # of these: its own failures, which say nothing of the sample


class Sample(NamedTuple):
    """One line of samples.jsonl, as far as later stages need it."""

    id: str
    sample: int
    prompt: str
    response: str
    outcome: str | None
    values: dict[str, object]

    @property
    def problem(self) -> Prompt:
        """The problem that was solved, as far as the sample says; without a label "" stands for it."""
        label, kind, tolerance = (self.values.get(key) for key in ("label", "answer_type", "tolerance"))
        return Prompt(self.id, self.prompt, str(label or ""), None, None, answer_type=kind,
                      tolerance=None if tolerance is None else float(tolerance))

    @property
    def finished(self) -> bool:
        """Whether the response came to its end; one of which nothing is said did."""
        return (self.values.get("finish") or "stop") == "stop"


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


INSTRUCTIONS = Schema("solver_train.py learns from 'instruction' and 'output', or from 'messages': dataset/prepare.py "
                      "makes such rows", FOREIGN | VERDICTS)
PAIRS = Schema("expected pairs, 'instruction', 'chosen' and 'rejected': data_build.py pairs makes them of samples")
STEP_LABELS = Schema("expected outcomes, 'instruction', 'output' and 'correct', which data_build.py outcome makes of "
                     "samples, or 'instruction', 'steps' and 'labels', which data_build.py process does")
PROMPTS = Schema("expected problems, 'instruction' and 'label': dataset/prepare.py makes them of published files")
SAMPLES = Schema("expected samples, as solver_evaluate.py writes them", foreign={})
_MESSAGE = Schema(foreign=FOREIGN_IN_MESSAGE)
VOTES = Schema("expected votes: data_build.py vote makes them of samples", foreign={})


def read_instructions(path: str, columns: Mapping[str, str] = {}) -> Iterator[Instruction | Chat]:
    """Rows `{"instruction", "input"?, "output": text or list}` or `{"messages": [{"role", "content"}, ...]}`. Raises
    UserError."""
    for row in read_rows(path, INSTRUCTIONS, columns):
        if row.get("messages") is None:
            yield Instruction(row.instruction(), row.texts("output"), row.where)
        elif row.get("instruction") is not None:
            raise UserError(f"{row.where}: found both 'messages' and 'instruction'; leave out what is not to be learnt")
        else:
            yield Chat(row.where, read_messages(row))


def read_messages(row: Row) -> list[dict[str, object]]:
    """{"role", "content"} of every message, and "weight": 0 with those that are not to be learnt.

    A content is a text or a list of {"type": "text" | "code" | "execution", "content"} blocks; parts {"type": "text",
    "text"} are joined, and a reasoning_content becomes the <think> part of the text. Raises UserError, also where
    nothing is left to learn.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.where}: 'messages' must be a non-empty list of {{'role', 'content'}}")
    read = [_message(inside) for inside in _objects(row, messages, "message", _MESSAGE)]
    if not any(x["role"] == "assistant" and x["content"] and x.get("weight") != 0 for x in read):
        raise UserError(f"{row.where}: the assistant says nothing in 'messages' that is to be learnt")
    return read


def _objects(row: Row, values: list[object], what: str, schema: Schema) -> list[Row]:
    """The elements of a list as rows, which say where they stand. Raises UserError for one that is no object."""
    found = []
    for number, value in enumerate(values, 1):
        where = f"{row.where}, {what} {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where} is a {type(value).__name__}; expected an object")
        found.append(Row(where, value, schema))
        found[-1].check_foreign()
    return found


def _message(message: Row) -> dict[str, object]:
    role, content, thinking = message.text("role"), _content(message), message.get("reasoning_content")
    if thinking is not None:
        thinking = message.text("reasoning_content").strip("\n")
        if role != "assistant" or not isinstance(content, str):
            raise UserError(f"{message.where}: 'reasoning_content' belongs to a text of the assistant's")
    if thinking:  # as the templates of DeepSeek-R1 and Qwen3 write it
        content = f"<think>\n{thinking}\n</think>\n\n{content}"
    weight = message.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise UserError(f"{message.where}: 'weight' is {weight!r}; expected 0, which leaves it unlearnt, or 1")
    if weight and role != "assistant":
        raise UserError(f"{message.where}: 'weight' is {weight!r}, but of the {role} nothing is learnt; leave it out")
    return {"role": role, "content": content} | ({} if weight is None or weight else {"weight": 0})


def _content(message: Row) -> str | list[dict[str, str]]:
    """What a message says: a text, or blocks of texts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message.text("content")
    inside = _objects(message, parts, "block", Schema(foreign={}))
    for part in inside:
        kind = part.text("type")
        if part.get("text") is None and part.get("content") is None:
            raise UserError(f"{part.where}: key 'content' is missing in a block of type {kind!r}; expected a text "
                            "under 'text' (type 'text') or under 'content' (type 'text', 'code' or 'execution')")
        if part.get("text") is not None and (kind != "text" or part.get("content") is not None):
            found = ", ".join(key for key in part.values if part.get(key) is not None)
            raise UserError(f"{part.where}: expected the 'text' of a part of type 'text', found type {kind!r} and "
                            f"{found}")
    if inside and all(part.get("text") is not None for part in inside):
        return "".join(part.text("text") for part in inside)
    return [{"type": part.text("type"), "content": part.text("content")} for part in inside]


def read_pairs(path: str, columns: Mapping[str, str] = {}) -> Iterator[Pair]:
    """Rows `{"instruction", "chosen", "rejected", "prefix"?}`, each side a text or list. Raises UserError."""
    for row in read_rows(path, PAIRS, columns):
        prefix = row.text("prefix") if row.get("prefix") is not None else ""
        pair = Pair(row.instruction(), row.texts("chosen"), row.texts("rejected"), prefix, row.where)
        if same := set(pair.chosen) & set(pair.rejected):
            raise UserError(f"{row.where}: the same text is chosen and rejected: {min(same)[:60]!r}")
        yield pair


def read_step_labels(path: str, columns: Mapping[str, str] = {}) -> Iterator[StepLabels]:
    """Outcome rows `{"instruction", "output", "correct": bool}` and labelled steps `{"instruction", "steps":
    [text, ...], "labels": [0 to 1 or null, ...]}`. Raises UserError.

    A row none of whose steps has a label is an error: it could teach nothing.
    """
    for row in read_rows(path, STEP_LABELS, columns):
        if row.get("steps") is not None:
            yield _step_labels(row)
            continue
        output, correct = row.text("output"), row.get("correct")
        if not isinstance(correct, bool):
            raise UserError(f"{row.where}: 'correct' is {correct!r}, not true or false; {row.schema.source}")
        if not output.strip():
            raise UserError(f"{row.where}: 'output' must be a non-empty string")
        yield StepLabels(row.instruction(), [output], [float(correct)], row.where)


def _step_labels(row: Row) -> StepLabels:
    steps, labels = row.get("steps"), row.get("labels")
    lengths = [len(side) if isinstance(side, list) else repr(side)[:60] for side in (steps, labels)]
    if not isinstance(steps, list) or not isinstance(labels, list) or not steps or len(steps) != len(labels):
        raise UserError(f"{row.where}: expected lists of equal length under 'steps' and 'labels', found {lengths[0]} "
                        f"and {lengths[1]}")
    for number, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip():
            raise UserError(f"{row.where}: step {number} is {step!r}; expected a text that is not empty")
        if label is not None and (not isinstance(label, int | float) or not 0 <= label <= 1):
            raise UserError(f"{row.where}: label {number} is {label!r}; expected 0 to 1, or null for not judged")
    if all(label is None for label in labels):
        raise UserError(f"{row.where}: every label is null; leave out a row that judges nothing")
    known = [None if x is None else float(x) for x in labels]
    return StepLabels(row.instruction(), steps, known, row.where)


def read_prompts(path: str, columns: Mapping[str, str] = {}, *, need_label: bool) -> list[Prompt]:
    """Rows `{"instruction", "id"?, "label"?, "level"?, "subject"?, "split"?, "answer_type"?, "tolerance"?}`.

    Ids default to the row number from 0.

    Raises UserError, also for an id that stands twice and, with need_label, for a row without a label.
    """
    prompts, seen = [], {}
    for index, row in enumerate(read_rows(path, PROMPTS, columns)):
        tolerance = row.get("tolerance")
        if tolerance is not None and (not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf):
            raise UserError(f"{row.where}: 'tolerance' is {tolerance!r}; expected a number, 0 or more")
        prompt = Prompt(
            id=row.optional_text("id") or str(index), instruction=row.instruction(), label=_label(row, need_label),
            level=level_number(row.get("level"), row.where), subject=row.optional_text("subject"),
            split=row.optional_text("split"), answer_type=row.optional_text("answer_type"),
            tolerance=None if tolerance is None else float(tolerance),
            others={name: row.get(name) for name in row.values if name not in OF_PROMPT},
            where=row.where)
        if prompt.id in seen:
            raise UserError(f"{row.where}: id {prompt.id!r} stands already at {seen[prompt.id]}")
        seen[prompt.id] = row.where
        prompts.append(prompt)
    return prompts


def _label(row: Row, needed: bool) -> str | None:
    """The answer as a text: true and false only where they are the type of the answer. Raises UserError."""
    value = row.get("label")
    if isinstance(value, bool) and row.get("answer_type") == "true_false":
        return str(value)
    if isinstance(value, bool):
        raise UserError(f"{row.where}: 'label' is {value}; expected the answer of the problem, or 'answer_type': "
                        "'true_false'")
    label = row.optional_text("label")
    if needed and "####" in (label or ""):
        raise UserError(f"{row.where}: 'label' holds a whole solution (####), which no answer would equal; "
                        f"dataset/prepare.py gsm8k makes the label of it")
    shown = "".join(filter(str.isprintable, label or "")).strip()
    if needed and shown.lower() in ("", "nan"):
        raise UserError(f"{row.where}: key 'label' is missing, empty or NaN; grading needs the answer of every row")
    return label


def read_instruction_rows(path: str) -> list[dict[str, object]]:
    """Rows with an "instruction", an "input" joined to it, and whatever else they hold. Raises UserError."""
    return [{key: row.get(key) for key in row.values if key != "input"} | {"instruction": row.instruction()}
            for row in read_rows(path, Schema())]


def read_votes(path: str) -> list[Vote]:
    """Rows `{"id", "prompt", "answer": text or null, "confidence", "positives", "negatives"}`. Raises UserError."""
    found = []
    for row in read_rows(path, VOTES):
        confidence, sides = row.get("confidence"), [row.get(x) for x in ("positives", "negatives")]
        texts = all(isinstance(side, list) and all(isinstance(x, str) for x in side) for side in sides)
        if not isinstance(confidence, int | float) or not 0 <= confidence <= 1 or not texts:
            raise UserError(f"{row.where}: expected a 'confidence' from 0 to 1 and lists of texts under 'positives' "
                            f"and 'negatives'; {row.schema.source}")
        vote = row.text("id"), row.text("prompt"), row.optional_text("answer"), float(confidence)
        found.append(Vote(*vote, *sides))
    return found


def read_samples(path: str) -> list[Sample]:
    """samples.jsonl; a row without an id takes its place in the file. Raises UserError."""
    samples, seen = [], set()
    for index, row in enumerate(read_rows(path, SAMPLES)):
        number = 0 if row.get("sample") is None else row.get("sample")
        if not isinstance(number, int | float) or number % 1:
            raise UserError(f"{row.where}: 'sample' is {number!r}; expected a whole number")
        _check_sample(row)
        texts = ("finish", "answer", "answer_type", "label")
        sample = Sample(
            id=row.optional_text("id") or str(index), sample=int(number), response=row.text("response"),
            prompt=row.text("prompt") if row.get("prompt") is not None else "", outcome=row.optional_text("outcome"),
            values={key: row.optional_text(key) if key in texts else row.get(key) for key in row.values})
        if (sample.id, sample.sample) in seen:
            raise UserError(f"{row.where}: id {sample.id!r}, sample {sample.sample} stands twice")
        seen.add((sample.id, sample.sample))
        samples.append(sample)
    return samples


def _check_sample(row: Row) -> None:
    """Raise UserError for what later stages would count or compare, and is of a kind that they cannot."""
    outcome, steps = row.get("outcome"), row.get("step_scores")
    if outcome not in (None, "", *OUTCOMES):
        raise UserError(f"{row.where}: 'outcome' is {outcome!r}; expected one of {', '.join(OUTCOMES)}")
    numbers = {key: row.get(key) for key in ("token_count", "logprob", "score", "tolerance")}
    if isinstance(steps, list):
        numbers |= {f"step_scores[{n}]": 0 if score is None else score for n, score in enumerate(steps)}
    elif steps is not None:
        raise UserError(f"{row.where}: 'step_scores' is a {type(steps).__name__}; expected a list of numbers")
    for key, value in numbers.items():
        if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300):
            raise UserError(f"{row.where}: {key!r} is {value!r:.60}; expected a number below 1e300")


def match_samples(samples: Sequence[Sample], prompts: Sequence[Prompt], source: str) -> list[Sample]:
    """Samples with the id and the instruction of their problem: found by id, or by place where a row names none. Raises
    UserError for a sample of no problem, or whose prompt does not hold it: rows of two files may have the same ids. And
    for two samples of one number, by id and by place. `source` names the samples' file."""
    by_id = {prompt.id: prompt for prompt in prompts}
    matched: dict[tuple[str, int], Sample] = {}
    for index, sample in enumerate(samples):
        if sample.values.get("id") is None:
            prompt = prompts[index] if index < len(prompts) else None
        else:
            prompt = by_id.get(sample.id)
        if prompt is None:
            raise UserError(f"{source}: sample id {sample.id!r} is not among the {len(prompts)} problems of the label "
                            "file")
        if sample.prompt and " ".join(prompt.instruction.split()) not in " ".join(sample.prompt.split()):
            raise UserError(f"{source}: sample {sample.id!r}/{sample.sample} is of the prompt {sample.prompt[:60]!r}, "
                            f"but problem {prompt.id!r} of the label file is {prompt.instruction[:60]!r}; give the "
                            "label file of these samples")
        if (prompt.id, sample.sample) in matched:
            raise UserError(f"{source}: sample {sample.sample} of problem {prompt.id!r} stands there twice, one time "
                            "without an id, by its place in the file; give every row its 'id'")
        sample = sample._replace(id=prompt.id, prompt=sample.prompt or prompt.instruction)
        matched[prompt.id, sample.sample] = sample
    return [*matched.values()]
