"""Where the final answer stands in a response: the named extractions that a task chooses from.

Most are groups of rules, most trusted first. Inside a group the mark that stands last in the response wins. A mark
with nothing behind it ends the search: that response has no answer. A name ends in its version.
"""

import re
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from src.evaluation.minerva import weak_to_strong_answer


class Found(NamedTuple):
    """What one rule saw: where its last mark starts, and the text that belongs to it ("" if the answer is cut off)."""

    position: int
    text: str


class Rule(NamedTuple):
    """One way to find an answer in a response."""

    name: str
    find: Callable[[str], Found | None]


class Extraction(NamedTuple):
    """The answer of a response and the rule that found it."""

    answer: str | None  # None: no mark of the task, or a mark without an answer
    rule: str  # the rule that decided, "none" if no rule saw its mark


BOX = re.compile(r"\\(?:boxed|fbox)\s*")
HOPE = re.compile(
    r"final answer is:?((?:(?!final answer is).){0,2000}?)\.?\s*I hope", re.IGNORECASE | re.DOTALL
)
HASHES = re.compile(r"####[ \t:]*([^\n]*)")
ANSWER_HEADING = re.compile(
    r"^#+[ \t]*(?:final[ \t]+)?answer[ \t:*]*\n+([^\n]*)", re.IGNORECASE | re.MULTILINE
)
ANSWER_IS = re.compile(r"\banswer(?:\s+is\b|\W{0,3}:)[\s:*]*|^A[ \t]*:[ \t]*", re.IGNORECASE | re.MULTILINE)
NEXT_PROBLEM = re.compile(r"^\W{0,4}(?:Q|Question|Problem)\W{0,2}:", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\[])")
MATH = re.compile(
    r"(?<![\\$])\$(?!\$)((?:[^$\\]|\\.){1,400})\$(?!\$)|\\\(((?:(?!\\\)).){1,400})\\\)", re.DOTALL
)
NUMBER = re.compile(
    r"(?:(?<![\w)\].])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+(?:\.\d+)?)?|(?<![\w.])-?\.\d+"
)
LETTER_FIRST = re.compile(
    r"[\s$*\\]*(?:(?:text|mathrm|textbf|mathbf)\s*\{)?\s*(?:option |choice )?\(?([A-Z])\)?(?![A-Za-z'])"
)
FINISHED = re.compile(r"[.!?]\W{0,4}$")
CHOICE = re.compile(r"(?<![A-Za-z])(?:or|either|maybe|possibly|not)(?![A-Za-z])", re.IGNORECASE)


def numbers(text: str) -> list[str]:
    """The numbers of a prose text, as written: 27,000 or -3.5 or 1/2."""
    return NUMBER.findall(text)


def braced(text: str, start: int) -> str | None:
    """Content of the brace group that opens at text[start], None if it never closes."""
    depth = 0
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match of the pattern in the text."""
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def last_box(text: str) -> Found | None:
    r"""Content of the last \boxed{...}, \fbox{...} or \boxed 5; "" if the box is cut off."""
    mark = last_match(BOX, text)
    if mark is None:
        return None
    if text[mark.end() : mark.end() + 1] == "{":
        return Found(mark.start(), (braced(text, mark.end()) or "").strip())
    bare = re.match(r"[^\s$.,;]+", text[mark.end() :])
    return Found(mark.start(), bare.group() if bare else "")


def after_hashes(text: str) -> Found | None:
    """The rest of the line behind the last ####."""
    mark = last_match(HASHES, text)
    return mark and Found(mark.start(), statement(mark.group(1)))


def after_heading(text: str) -> Found | None:
    """The line under a heading "# Answer"."""
    mark = last_match(ANSWER_HEADING, text)
    return mark and Found(mark.start(), statement(mark.group(1)))


def hoped_answer(text: str) -> Found | None:
    """Minerva's form: "The final answer is X. I hope it is correct."; a cut before "I hope" does not count here."""
    mark = last_match(HOPE, text)
    return mark and Found(mark.start(), statement(mark.group(1)))


def after_answer_is(text: str) -> Found | None:
    """The statement behind the last "answer is", "Answer:" or line that starts with "A:"."""
    mark = last_match(ANSWER_IS, text)
    return mark and Found(mark.start(), statement(text[mark.end() :]))


def statement(text: str) -> str:
    """The first sentence of a text, without the mark-up and the full stop around it."""
    text = text.strip().lstrip(":* ")
    for opening, closing in (("$$", "$$"), ("\\[", "\\]")):
        if text.startswith(opening):
            inside, found, _ = text[2:].partition(closing)
            return inside.strip().rstrip(".") if found else ""
    line = text if "\\begin" in text[:200] else text.partition("\n")[0]
    return SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*").rstrip(" *.")


def last_sentence(text: str) -> str | None:
    """The last sentence, if the response ends as a finished one and does not waver between answers."""
    text = text.rstrip()
    if not FINISHED.search(text[-10:]):
        return None
    sentence = SENTENCE_END.split(text[-1000:].rpartition("\n")[2])[-1]
    return None if CHOICE.search(sentence) else sentence


def last_number(text: str) -> Found | None:
    """The last number of a finished response."""
    sentence = last_sentence(text)
    found = numbers(sentence.replace("$", "")) if sentence else []
    return Found(len(text), found[-1]) if found else None


def last_statement(text: str) -> Found | None:
    """What the last sentence of a finished response says: the end of its last inline formula, or its last number."""
    sentence = last_sentence(text)
    if sentence is None or "$$" in sentence:  # a display is a step of a derivation, not a conclusion
        return None
    formula = last_match(MATH, sentence)
    if formula:
        return Found(len(text), (formula.group(1) or formula.group(2)).rpartition("=")[2].strip(" ."))
    return last_number(text)


def leading_letters(text: str) -> str:
    """The letters of choices that a statement begins with, as written: "A, C" of "A, C because ..."."""
    found = []
    while match := LETTER_FIRST.match(text):
        found.append(match.group(1))
        rest = re.match(r"\s*\}?\s*(?:,|;|and\b|&)", text[match.end() :])
        if rest is None:
            break
        text = text[match.end() + rest.end() :]
    return ", ".join(found)


def letters_of(find: Callable[[str], Found | None], text: str) -> Found | None:
    """What another rule finds, reduced to the letters it begins with."""
    found = find(text)
    return found and Found(found.position, leading_letters(found.text))


def last_letter(text: str) -> Found | None:
    """The only choice that the last sentence of a finished response names in brackets, or that is all of it."""
    sentence = last_sentence(text) or ""
    bare = re.fullmatch(r"\W*([A-Z])\W*", text.rstrip().rpartition("\n")[2])
    named = set(re.findall(r"\(([A-Z])\)", sentence)) or ({bare.group(1)} if bare else set())
    return Found(len(text), named.pop()) if len(named) == 1 else None


def own_part(response: str) -> str:
    """The response up to the next problem the model made up behind its own answer."""
    for mark in NEXT_PROBLEM.finditer(response):
        if response[: mark.start()].strip():
            return response[: mark.start()]
    return response


Groups = tuple[tuple[Rule, ...], ...]


def by_groups(groups: Groups, response: str) -> Extraction:
    """The answer that the first group with a mark in the response gives."""
    text = own_part(response)
    for group in groups:
        found = [(rule.find(text), rule.name) for rule in group]
        seen = [(place.position, place.text, name) for place, name in found if place is not None]
        if seen:
            _, answer, name = max(seen)
            return Extraction(answer or None, name)
    return Extraction(None, "none")


def by_weak_to_strong(key: str, response: str) -> Extraction:
    """The answer that weak-to-strong-reasoning sees behind its key."""
    answer = weak_to_strong_answer(response, key)
    return Extraction(answer or None, key if answer else "none")


HASH_RULE = Rule("hashes", after_hashes)
NUMBER_GROUPS: Groups = (
    (HASH_RULE,),
    (Rule("box", last_box), Rule("hope", hoped_answer)),
    (Rule("answer-is", after_answer_is),),
    (Rule("last-number", last_number),),
)
MATH_GROUPS: Groups = (
    (Rule("box", last_box), Rule("hope", hoped_answer), Rule("heading", after_heading)),
    (Rule("answer-is", after_answer_is),),
    (Rule("last-statement", last_statement),),
)
CHOICE_GROUPS: Groups = (
    tuple(
        Rule(name, partial(letters_of, find))
        for name, find in (("box", last_box), ("hope", hoped_answer), ("heading", after_heading))
    ),
    (
        Rule("hashes", partial(letters_of, after_hashes)),
        Rule("answer-is", partial(letters_of, after_answer_is)),
    ),
    (Rule("last-letter", last_letter),),
)
EXTRACTIONS: dict[str, Callable[[str], Extraction]] = {
    "gsm8k/last-number@1": partial(by_groups, NUMBER_GROUPS),
    "gsm8k/hashes@1": partial(by_groups, ((HASH_RULE,),)),
    "math/last-box@1": partial(by_groups, MATH_GROUPS),
    "choice/letter@1": partial(by_groups, CHOICE_GROUPS),
    "weak-to-strong/hashes@1": partial(by_weak_to_strong, "####"),
    "weak-to-strong/answer-is@1": partial(by_weak_to_strong, "The answer is:"),
}


def extract(extraction: str, response: str) -> Extraction:
    """The final answer of a response and the name of the rule that found it; extraction is a name of EXTRACTIONS."""
    return EXTRACTIONS[extraction](response)
