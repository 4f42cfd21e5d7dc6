"""Where the final answer stands in a response: the named extractions that a task chooses from, at the end of the file.

Most are groups of rules, most trusted first. Inside a group the mark that stands last in the response wins. A mark
with nothing after it ends the search: that response has no answer. A name ends in its version.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from src.grading.letters import leading_letters
from src.grading.normalize import plain
from src.grading.published_rules import weak_to_strong_answer
from src.grading.words import NUMBER, altered, digits_for_words, scaled
from src.text.blocks import last_text


class Found(NamedTuple):
    """What one rule saw: where its last mark starts, and the text that belongs to it ("" if the answer is cut off)."""

    position: int
    text: str


class Extraction(NamedTuple):
    """The answer of a response and the rule that found it."""

    answer: str | None  # None: no mark of the task, or a mark without an answer
    rule: str  # the rule that decided, "none" if no rule saw its mark


THINKS = re.compile(r"<(?:think(?:ing)?|thought|reasoning)>|\[THINK\]|◁think▷", re.IGNORECASE)
THOUGHT = re.compile(r"</(?:think(?:ing)?|thought|reasoning)>|\[/THINK\]|◁/think▷", re.IGNORECASE)
TAG = re.compile(r"<answer>", re.IGNORECASE)
TAG_END = re.compile(r"</answer>", re.IGNORECASE)
ENDED = re.compile(  # the end of a turn in the chat templates of today, which some programs leave in their samples
    r"</s>|<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return)\|>|<end_of_turn>|<eos>|<\|end▁of▁sentence\|>"
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BETWEEN_BOXES = re.compile(  # what makes neighbours of boxes one list; the names in front of them are not read
    r"(?:\([a-h]\)|[\s$,;:.&/()|~*-]|\\[()\[\],;!\\ ]|\\(?:q?quad|to|mid)(?![a-z])|\\text\s*\{|\}|^\d\d?"
    r"|\b(?:and|or|either|maybe|possibly|perhaps|alternatively|also|else|even|it|is|be|could|can|might|may|otherwise)\b"
    r"){0,80}",
    re.IGNORECASE | re.MULTILINE,
)
HEDGE = re.compile(  # or, inside one sentence, a word that leaves open which of them it is
    r"(?:(?![.!?]\s|\n\s*\n).)*\b(?:or|else|otherwise|alternatively|maybe|perhaps|possibly|vs|versus)\b"
    r"(?:(?![.!?]\s|\n\s*\n).)*",
    re.IGNORECASE | re.DOTALL,
)
HOPE = re.compile(r"final answer is:?((?:(?!final answer is).){0,2000}?)\.?\s*I hope", re.IGNORECASE | re.DOTALL)
HASHES = re.compile(r"####[ \t:#]*([^\n]*)")
LABEL = re.compile(r"[\s*_]*(?:the )?(?:final )?answer(?: is)?[\s:*_]*", re.IGNORECASE)  # in a #### line
TITLE = re.compile(  # markdown's heading of the fourth level
    r"[\s*_]*(?:(?:step|part|case|phase|stage|method|approach|section|question|problem|option|solution)s?"
    r"\s*(?:[#\d:.*)]|[A-Za-z]\b|[ivx]+\b|$)|\d+[.):]\s*[*_]*[A-Za-z])",
    re.IGNORECASE,
)
BELOW = re.compile(r"[\W_]{0,6}\d[\d., /]{0,20}[\W_]{0,6}")  # all that stands below a heading: a number
SENTENCE_START = re.compile(r"[\s*_]*[A-Za-z]{3}")
ANSWER_HEADING = re.compile(r"^(?:#+|\*\*)[ \t]*(?:final[ \t]+)?answer[ \t:*]*\n", re.IGNORECASE | re.MULTILINE)
ANSWER_IS = re.compile(
    r"\bans(?:wer)?(?:[*_]{0,3}\s+is\b|\W{0,3}[:=])[\s:*_}]*|^A[ \t]*:[ \t]*", re.IGNORECASE | re.MULTILINE
)
NEXT_PROBLEM = re.compile(
    r"^\W{0,4}(?:(?:Q|Question|Problem)\s{0,2}(\d{0,3})|Instruction|Human|User)\W{0,2}:", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\[])")
MATH = re.compile(r"(?<![\\$])\$(?!\$)((?:[^$\\]|\\.){1,400})\$(?!\$)|\\\(((?:(?!\\\)).){1,400})\\\)", re.DOTALL)
CHOICE_IS = re.compile(
    r"\b(?:answer\s+(?:would|must|should|will|has to|can only)\s+be|(?:option|choice)\s+is)\b[\s:*_]*", re.IGNORECASE
)
WRONG = re.compile(r"\b(?:wrong|false|incorrect|impossible|cannot|except|eliminated?)\b|n['’]t\b", re.IGNORECASE)
CORRECT = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|choose|select|pick)\s+\(?([A-J])\)?(?![A-Za-z'+\d^])"
    r"|(?<![A-Za-z])([A-J])\)? is (?:the )?(?:correct|right|answer)\b"
)
EXPLICIT = re.compile(  # marks of an answer, wherever they stand
    rf"{BOX.pattern}|####(?!{TITLE.pattern})|{ANSWER_IS.pattern}|{ANSWER_HEADING.pattern}",
    re.IGNORECASE | re.MULTILINE,
)
NEGATES = re.compile("[Nn](?:['’]t|ot|ever)|[Dd](?:oubt|eny)|[Ff]alse|[Tt]rue|[Ww]rong|[Ii]ncorrect")
DISBELIEVED = re.compile(  # right in front of "answer is"
    r"(?:(?:n['’]t|\bnot|\bnever|\bcannot)(?: (?:think|believe|say|claim|true|correct|so|the case))?"
    r"|(?<!\bno )(?<!\bnot )\b(?:doubt|deny|false|untrue|wrong|incorrect))"
    r"(?: that)?(?: (?:the|my|our))?(?: (?:final|correct|right))? $",
    re.IGNORECASE,
)
UNFINISHED = re.compile(r"\$(?![\d.\s-])[^$]*$|\\\((?:(?!\\\)).)*$", re.DOTALL)  # a formula, no sum of money
FINISHED = re.compile(r"[.!?]\W{0,4}$")
EMPHASIS = re.compile(  # of markdown, where it ends a word or, if it cannot be a product, begins one
    r"(?<=[^\s*_`^\\])(?:[*_]{2,3}|`|[*_](?!\s*[-+\d({\\]|\s+[A-Za-z]\b))(?=[\s.,;:!?)%]|$)"
    r"|(?<!\S)(?:[*_]{2,3}|`)(?=[^\W_]|[$\\(\[{-])"
)
LISTED = re.compile(r"\s*,?\s*(?:and)?\s*")  # between the formulas of a list
CHOICE = re.compile(r"(?<![A-Za-z])(?:or|either|maybe|possibly|not|one of(?= [$\\\d]))(?![A-Za-z])", re.IGNORECASE)


def last_match(pattern: re.Pattern[str], text: str, hint: str = "") -> re.Match[str] | None:
    """The last match of the pattern in the text; hint: small letters that every match has."""
    if hint not in text.lower():  # 10 times faster than the search, which mostly finds nothing
        return None
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def last_box(text: str) -> Found | None:
    r"""Content of the last \boxed{...}, \fbox{...} or \boxed 5; "" if the box is cut off. Boxes side by side are one
    list: a choice between answers is none of them."""
    marks = list(BOX.finditer(text))
    if not marks:
        return None
    contents: list[str] = []
    following = len(text)
    for mark in reversed(marks):
        content, end = box_content(text, mark.end())
        between = text[end:following] if contents else ""
        if end > following or len(between) > 200:
            break
        if not BETWEEN_BOXES.fullmatch(between) and not HEDGE.fullmatch(between):
            break
        if content not in contents:
            contents.insert(0, content)
        following = mark.start()
    return Found(marks[-1].start(), ", ".join(contents))


def box_content(text: str, start: int) -> tuple[str, int]:
    """What a box that opens at start holds ("" if it is cut off), and where it ends."""
    if not text.startswith("{", start):
        bare = re.compile(r"[^\s$.,;]*").match(text, start)
        return bare.group(), bare.end()
    depth = 0
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1 : match.start()].strip(), match.end()
    return "", len(text)


def after_hashes(text: str) -> Found | None:
    """The line of the last #### that is no heading of markdown, or the one below it."""
    marks = list(HASHES.finditer(text))
    for mark in reversed(marks):
        label = LABEL.match(mark.group(1))
        line = mark.group(1)[label.end() if label else 0 :]
        if not line.strip(" \t*_"):
            return Found(mark.start(), statement(text[mark.end() :]))
        if not is_title(line, text, mark.end()):
            return Found(mark.start(), statement(line))
        if mark is marks[-1] and BELOW.fullmatch(text[mark.end() :]):
            return Found(mark.start(), statement(text[mark.end() :]))
    return None


def is_title(line: str, text: str, end: int) -> bool:
    """Whether the line after ####, which ends at end in the text, is markdown's heading of what follows."""
    if TITLE.match(line):
        return True
    if not SENTENCE_START.match(line) or end >= len(text.rstrip()):
        return False
    if not re.search(r"\d", line) and digits_for_words(line) == line:
        return True
    return any(pattern.search(text, end) for pattern in (BOX, ANSWER_IS))


def after_answer_is(text: str) -> Found | None:
    """The statement after the last "answer is", "Answer:" or line that starts with "A:"."""
    mark = last_match(ANSWER_IS, text)
    if mark is None:
        return None
    before = text[max(0, mark.start() - 60) : mark.start()]
    if NEGATES.search(before) and DISBELIEVED.search(before):
        return Found(mark.start(), "")
    said = statement(text[mark.end() :])
    return Found(mark.start(), said.rstrip("}. ") if said.count("}") > said.count("{") else said)


def statement(text: str) -> str:
    """The first sentence of a text, without the mark-up in it and the full stop around it."""
    text = text.strip().lstrip(":*_ ")
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if text.startswith(opening):
            inside, found, _ = text[2:].partition(closing)
            return inside.strip().rstrip(".") if found else ""
    if UNFINISHED.match(text):
        return ""
    line = text if "\\begin" in text[:200] else text.partition("\n")[0]
    line = SENTENCE_END.split(EMPHASIS.sub("", line), maxsplit=1)[0].strip(" \t*")
    return line if line.endswith("...") else line.rstrip(" *.")


def last_sentence(text: str) -> str | None:
    """The last sentence, if the response ends as a finished one and does not waver between answers."""
    text = text.rstrip()
    if not FINISHED.search(text[-10:]):
        return None
    sentence = SENTENCE_END.split(text[-1000:].rpartition("\n")[2])[-1]
    return None if CHOICE.search(sentence) else sentence


def last_number(text: str) -> Found | None:
    """The last number of a finished response, unless the words next to it make it another."""
    sentence = last_sentence(text)
    if sentence is None:
        return None
    sentence = scaled(sentence.replace("$", ""))
    mark = last_match(NUMBER, sentence)
    if mark is None or altered(sentence[: mark.start()], sentence[mark.end() :]):
        return None
    return Found(len(text), mark.group())


def last_statement(text: str) -> Found | None:
    """What the last sentence of a finished response says: the end of its last inline formula, or its last number."""
    sentence = last_sentence(text)
    if sentence is None or "$$" in sentence:  # a display is a step of a derivation, not a conclusion
        return None
    formulas = list(MATH.finditer(sentence))
    if not formulas:
        return last_number(text)
    said, following = [], formulas[-1].end()
    for found in reversed(formulas):
        name, _, value = (found[1] or found[2]).rpartition("=")
        if said and (name != said[0][0] or not LISTED.fullmatch(sentence, found.end(), following)):
            break
        said.insert(0, (name, value.strip(" .")))
        following = found.start()
    return Found(len(text), ", ".join(value for _, value in said))


def chosen_otherwise(text: str) -> Found | None:
    """The letters after the last "the answer must be" or "the option is" that names any."""
    for mark in reversed(list(CHOICE_IS.finditer(text))):
        if letters := leading_letters(statement(text[mark.end() :])):
            return Found(mark.start(), letters)
    return None


def last_letter(text: str) -> Found | None:
    """The only choice that the last sentence of a finished response names in brackets or as an option, or that is all
    of it."""
    sentence = last_sentence(text) or ""
    bare = re.fullmatch(r"\W{0,9}(?:(?i:option|choice)\s+)?([A-Z]|\([a-z]\))\W{0,9}", text.rstrip().rpartition("\n")[2])
    if WRONG.search(sentence):
        return None
    named = re.findall(r"(?<![A-Za-z])\(([A-Ja-j])\)", sentence)
    named += ["".join(letters) for letters in CORRECT.findall(sentence)]
    named = named or ([bare.group(1).strip("()")] if bare else [])
    letters = {name.upper() for name in named}
    return Found(len(text), letters.pop()) if len(letters) == 1 else None


def own_part(response: str) -> str:
    """What the model says to the problem: nothing after the end of its turn, no thoughts, only what it marks as
    <answer> if it does, and nothing after its own answer from the next problem on that it made up."""
    text = response
    if "<" in text and (end := ENDED.search(text)):
        text = text[: end.start()]
    lower = text.lower()
    if any(word in lower for word in ("think", "thought", "reasoning")):
        if thought := last_match(THOUGHT, text):
            text = text[thought.end() :]
        if thinks := THINKS.search(text):  # to the end
            text = text[: thinks.start()]
    if "<answer>" in lower and (tag := last_match(TAG, text)):
        ended = TAG_END.search(text, tag.end())
        return tagged(text[tag.end() : ended.start()].strip() if ended else "")
    openers = ("Q", "Problem", "Instruction", "Human", "User")  # one of them is in every match of NEXT_PROBLEM
    if not any(word in text for word in openers):
        return text
    if NEXT_PROBLEM.search(text) and (answered := EXPLICIT.search(text)):
        before = NEXT_PROBLEM.search(text, 0, answered.start())
        mark = NEXT_PROBLEM.search(text, answered.end())
        if mark and not (before and before[1] and mark[1]):  # the parts that a solution numbers are its own
            return text[: mark.start()]
    return text


def tagged(inside: str) -> str:
    """What stands between <answer> and </answer>, as a response: an answer, several lines of them, or a solution."""
    lines = [line for line in inside.split("\n") if line.strip()]
    if len(lines) > 1 and not re.search(r"[A-Za-z]{2}|\\[\[\]]|\$\$|####", inside):
        return "Answer: " + ", ".join(lines)
    lettered = re.match(r"\W{0,3}[A-Ja-j][.):]", inside)
    if lettered or "\\begin" in inside or not re.search(r"[.!?\n]\s*[A-Za-z]", inside):
        return "Answer: " + inside
    return inside if EXPLICIT.search(inside) or FINISHED.search(inside[-10:]) else inside + "."


RULES: dict[str, Callable[[str], Found | None]] = {
    "hashes": after_hashes,
    "box": last_box,
    # Minerva's form: "The final answer is X. I hope it is correct."; a cut before "I hope" does not count here
    "hope": lambda text: (mark := last_match(HOPE, text, "hope")) and Found(mark.start(), statement(mark[1])),
    "heading": lambda text: ((mark := last_match(ANSWER_HEADING, text, "answer"))
                             and Found(mark.start(), statement(text[mark.end() :]))),
    "answer-is": after_answer_is,
    "option-is": chosen_otherwise,
    "last-number": last_number,
    "last-statement": last_statement,
    "last-letter": last_letter,
}
GROUPS = {
    "gsm8k/last-number@5": ("hashes", "box hope heading", "answer-is", "last-number"),
    "gsm8k/hashes@5": ("hashes",),
    "math/last-box@5": ("box hope heading", "hashes answer-is", "last-statement"),
    "choice/letter@5": ("box hope heading", "hashes answer-is option-is", "last-letter"),
}
PUBLISHED_MARKS = {"weak-to-strong/hashes@1": "####", "weak-to-strong/answer-is@1": "The answer is:"}
EXTRACTIONS = (*GROUPS, *PUBLISHED_MARKS)


def extract(extraction: str, response: str) -> Extraction:
    """The final answer of a response and the rule that found it: the first group with a mark in the response decides.
    extraction: one of EXTRACTIONS. Of a solution with code the last block of text is read."""
    response = last_text(response)
    if mark := PUBLISHED_MARKS.get(extraction):
        answer = weak_to_strong_answer(response, mark)
        return Extraction(answer or None, mark if answer else "none")
    text = own_part(plain(response))
    read = leading_letters if extraction == "choice/letter@5" else str
    for group in GROUPS[extraction]:
        found = [(place.position, read(place.text), name) for name in group.split() if (place := RULES[name](text))]
        if found:
            _, answer, name = max(found)
            return Extraction(answer or None, name)
    return Extraction(None, "none")
