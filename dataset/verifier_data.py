"""Published data for verifiers: judged steps, preferred answers, and rephrased problems to sample from.

Every builder takes one raw row and yields the rows that it gives; the sources are named with each.
"""

import re
from collections.abc import Iterator

from dataset.benchmarks import optional
from dataset.raw import LeftOut, RawRow, Row
from src.errors import UserError

SHEPHERD_MARK = "ки"
ANSWER_HEADING = "# Answer"
ASSISTANT = "\n\nAssistant:"


def prm800k_rows(raw: RawRow) -> Iterator[Row]:
    """PRM800K, phase 1 or 2 (Lightman et al. 2023): one row for the solution the labeller followed, one for each
    alternative step, whose prefix carries no label of its own (null).

    Ratings -1, 0, 1 become 0, 1, 1 (a neutral step is not wrong), a missing rating null. Quality-control and
    screening questions, which several labellers saw, are left out.
    """
    if raw.fields.get("is_quality_control_question") or raw.fields.get("is_initial_screening_question"):
        raise LeftOut("of quality control or screening")
    question, judged = raw.fields.get("question"), raw.fields.get("label")
    if not isinstance(question, dict) or not isinstance(judged, dict) or not isinstance(judged.get("steps"), list):
        raise UserError(f"{raw.place}: expected 'question' and 'label' with 'steps', found {', '.join(raw.fields)}")
    problem = RawRow(f"{raw.place} question", question).text("problem")
    prefix: list[str] = []
    labels: list[int | None] = []
    alternatives = 0
    for number, step in enumerate(judged["steps"]):
        place = f"{raw.place} step {number}"
        completions, chosen, followed = step_parts(step, place)
        for index, completion in enumerate(completions):
            if index != chosen and completion.get("rating") is not None:
                alternatives += 1
                text = RawRow(place, completion).text("text")
                yield {"instruction": problem, "steps": [*prefix, text],
                       "labels": [*[None] * len(prefix), rating_label(completion, place)]}
        if followed is None:  # the labeller gave up here
            break
        prefix.append(RawRow(place, followed).text("text"))
        labels.append(rating_label(followed, place))
    if any(label is not None for label in labels):
        yield {"instruction": problem, "steps": prefix, "labels": labels}
    elif not alternatives:
        raise LeftOut("without a rating")


def step_parts(step: object, place: str) -> tuple[list[Row], int | None, Row | None]:
    """The completions of a step of PRM800K, which of them was chosen, and the step that the labeller went on from."""
    completions = (step.get("completions") or []) if isinstance(step, dict) else None
    if not isinstance(completions, list) or not all(isinstance(completion, dict) for completion in completions):
        raise UserError(f"{place}: expected an object with a list of objects under 'completions'")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if chosen is not None and chosen not in range(len(completions)):
        raise UserError(f"{place}: 'chosen_completion' is {chosen!r}; expected the number of one of {len(completions)}")
    if human is not None and not isinstance(human, dict):
        raise UserError(f"{place}: 'human_completion' is a {type(human).__name__}; expected an object")
    return completions, chosen, human if chosen is None else completions[int(chosen)]


def prm800k_solutions(raw: RawRow) -> Iterator[Row]:
    """PRM800K's solutions that are good to the end, for fine-tuning (Sun et al. 2024): every step that the labeller
    went on from is rated 1 or written by the labeller, and the last, rated 1, holds the answer."""
    rows = list(prm800k_rows(raw))  # refuses what is not as published
    problem, right = str(rows[0]["instruction"]), RawRow(f"{raw.place} question", raw.fields["question"])
    steps: list[str] = []
    solutions: list[str] = []
    for number, step in enumerate(raw.fields["label"]["steps"]):
        completions, chosen, followed = step_parts(step, f"{raw.place} step {number}")
        good = [str(each["text"]) for each in completions if each.get("rating") == 1]
        solutions += ["\n\n".join([*steps, text]) for text in good if ANSWER_HEADING in text]
        if followed is None or chosen is not None and followed.get("rating") != 1:
            break
        steps.append(str(followed["text"]))
    if not solutions:
        raise LeftOut("without a good solution to the end")
    yield {"instruction": problem, "output": [with_answer_apart(text) for text in dict.fromkeys(solutions)],
           "label": right.text("ground_truth_answer")}


def with_answer_apart(solution: str) -> str:
    """A solution whose last two paragraphs are "# Answer" and the answer."""
    return "\n\n".join(part.strip() for part in re.split(f"({ANSWER_HEADING})", solution, maxsplit=1)).strip()


def rating_label(completion: dict[str, object], place: str) -> int | None:
    """1 for a rating of 0 or 1, 0 for -1, None where nobody rated."""
    rating = completion.get("rating")
    if rating not in (None, -1, 0, 1):
        raise UserError(f"{place}: rating {rating!r}; expected -1, 0, 1 or null")
    return None if rating is None else int(rating >= 0)


def math_shepherd_rows(raw: RawRow) -> Iterator[Row]:
    """Math-Shepherd (Wang et al. 2024): `input` marks every step's end, `label` has + or - in the marks' place.

    A last step without a mark is not judged (null).
    """
    text, judged = raw.text("input"), raw.text("label")
    pieces = text.split(SHEPHERD_MARK)
    labels: list[int | None] = []
    place = 0
    for piece in pieces[:-1]:
        place += len(piece)
        verdict = judged[place:place + 1]
        if not judged.startswith(piece, place - len(piece)) or verdict not in ("+", "-"):
            raise UserError(f"{raw.place}: 'label' does not repeat 'input' with + or - for mark {len(labels) + 1}")
        labels.append(int(verdict == "+"))
        place += 1
    if judged[place:].strip() != pieces[-1].strip():
        raise UserError(f"{raw.place}: 'label' does not repeat 'input' behind mark {len(labels)}")
    question, step, first = pieces[0].partition("Step 1:")
    if not step or not labels:
        raise UserError(f"{raw.place}: expected 'input' to hold 'Step 1:' and a mark {SHEPHERD_MARK} behind each step")
    steps = [step + first, *pieces[1:-1]]
    if pieces[-1].strip():
        steps, labels = [*steps, pieces[-1]], [*labels, None]
    if not all(piece.strip() for piece in steps):
        raise UserError(f"{raw.place}: a step in 'input' is empty")
    yield {"instruction": question.strip(), "steps": [piece.strip() for piece in steps], "labels": labels}


def processbench_rows(raw: RawRow) -> Iterator[Row]:
    """ProcessBench (Zheng et al. 2024): `label` is the first wrong step, -1 for none; later steps are not judged."""
    steps, wrong = raw.fields.get("steps"), raw.fields.get("label")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise UserError(f"{raw.place}: expected a list of texts under 'steps', found {str(steps)[:60]!r}")
    if isinstance(wrong, bool) or wrong not in range(-1, len(steps)):  # -1.0 where a column was nullable
        raise UserError(f"{raw.place}: 'label' is {wrong!r}; expected -1 or the number of one of {len(steps)} steps")
    right = len(steps) if wrong == -1 else wrong
    labels = [1 if number < right else 0 if number == right else None for number in range(len(steps))]
    row: Row = {"instruction": raw.text("problem"), "steps": steps, "labels": labels}
    yield row | optional(raw, id="id")


# Where a step of MetaMathQA ends: lines, sentences but for abbreviations, displayed formulas; none within a formula
STEP_BREAK = re.compile(
    r"(\$[^$]*\$|\\\[.*?\\\])|\n\s*|(?<=\.)(?<!\bMrs\.)(?<!\bProf\.)(?<!\b[MDS][rst]\.)[ ]+"
    r"|(?<=\.\$)[ ]+|(?<=\\\])[ ]+", re.DOTALL)


def metamath_steps(raw: RawRow) -> Iterator[Row]:
    """MetaMathQA with every sentence a paragraph and the answer under "# Answer", as Sun et al. 2024 train on it; what
    comes from GSM8K counts as easy: level 1."""
    (row,) = metamath_rows(raw)
    if "label" not in row:
        raise LeftOut("without an answer")
    solution = re.sub(r"####[^\n]*\s*\Z", "", raw.text("response").rpartition("The answer is")[0]).strip()
    steps = STEP_BREAK.sub(lambda found: " ".join(found[1].split()) if found[1] else "\n\n", solution)
    easy = {"level": 1} if raw.text("type").startswith("GSM") else {}
    yield row | {"output": [f"{steps}\n\n{ANSWER_HEADING}\n\n{row['label']}".strip()]} | easy


def metamath_rows(raw: RawRow) -> Iterator[Row]:
    """MetaMathQA (Yu et al. 2024): a rephrased problem, its solution, and the original it came from."""
    solution = raw.text("response")
    row: Row = {"instruction": raw.text("query"), "output": [solution], "original": raw.text("original_question")}
    answer = re.search(r"(?s:.*)The answer is:?\s*(.+?)\s*$", solution)  # the last: a step may say so, too
    if answer:
        row["label"] = answer[1]
    yield row


def hh_rlhf_rows(raw: RawRow) -> Iterator[Row]:
    """hh-rlhf (Bai et al. 2022): two dialogues that differ in the last answer, and say something there."""
    sides = {}
    for name in ("chosen", "rejected"):
        dialogue = raw.text(name)
        before, turn, answer = dialogue.rpartition(ASSISTANT)
        if not turn:
            raise UserError(f"{raw.place}: {name!r} has no turn {ASSISTANT.strip()!r}")
        sides[name] = before + turn, answer.strip()
    (prompt, chosen), (other, rejected) = sides["chosen"], sides["rejected"]
    if prompt != other:
        raise LeftOut("whose dialogues part before the last answer")
    if not chosen or not rejected:
        raise LeftOut("with an empty answer")
    if chosen == rejected:
        raise LeftOut("with equal answers")
    yield {"instruction": prompt, "chosen": chosen, "rejected": rejected}
