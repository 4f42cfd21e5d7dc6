"""Solutions with code (LCE: natural language, code, execution; Wang et al. 2023, MathCoder): messages made of blocks.

With the chat template "code" a model reads and writes this form: a problem is the user's text block, a response the
blocks of the assistant's message. As text, nothing between the parts:

    <|assistant|><|text|>So<|endofblock|><|code|>print(2)<|endofblock|><|endofmessage|>

Only the eight markers, spelled exactly, part the text; any other `<|` belongs to what surrounds it. A program may
print a marker all the same, so the form to turn into ids is the list of pieces, in which a marker and a text that
looks like one are two things.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from src.errors import UserError


class Marker(StrEnum):
    """The special tokens, in the order in which they extend a vocabulary."""

    USER = "<|user|>"
    SYSTEM = "<|system|>"
    ASSISTANT = "<|assistant|>"
    TEXT = "<|text|>"
    CODE = "<|code|>"
    EXECUTION = "<|execution|>"
    END_OF_BLOCK = "<|endofblock|>"
    END_OF_MESSAGE = "<|endofmessage|>"


ROLES = {marker.name.lower(): marker for marker in (Marker.SYSTEM, Marker.USER, Marker.ASSISTANT)}
KINDS = {marker.name.lower(): marker for marker in (Marker.TEXT, Marker.CODE, Marker.EXECUTION)}
ANY_MARKER = re.compile("(" + "|".join(re.escape(marker) for marker in Marker) + ")")

Piece = Marker | str  # a str that is no Marker is content, whatever it spells
Learnt = Literal["assistant_no_execution", "assistant", "all"]
CODE_FORM = "code"  # the name among chat templates


@dataclass(frozen=True)
class SolutionBlock:
    """kind: "text", "code" or "execution"."""

    kind: str
    content: str


def message_pieces(rows: Sequence[Mapping[str, object]]) -> list[Piece]:
    """Make the pieces of a training row's messages, [{"role", "content": text or [{"type", "content"}, ...]}, ...].
    Raises UserError naming the message."""
    parts: list[Piece] = []
    for number, row in enumerate(rows, start=1):
        role, content = row.get("role"), row.get("content")
        if role not in ROLES:
            raise UserError(f"message {number}: role {role!r}; expected one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "content": content}]
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise UserError(f'message {number}: content is no list of {{"type", "content"}} blocks')
        parts.append(ROLES[role])
        for block in content:
            kind, text = block.get("type"), block.get("content")
            if kind not in KINDS:
                raise UserError(f"message {number}: {kind!r} is no kind of block; expected one of {', '.join(KINDS)}")
            if not isinstance(text, str):
                raise UserError(f"message {number}: content of a {kind} block is {type(text).__name__}, expected text")
            parts += [KINDS[kind], text, Marker.END_OF_BLOCK]
        parts.append(Marker.END_OF_MESSAGE)
    return parts


def prompt_pieces(problem: str) -> list[Piece]:
    """Make the pieces of a problem, up to where the assistant's blocks begin."""
    return [*message_pieces([{"role": "user", "content": problem}]), Marker.ASSISTANT]


def answer_pieces(answer: str) -> list[Piece]:
    """Split a response or its beginning, which may stop inside a block; without any marker it is a block of text.
    Raises UserError for one that begins another message: what follows would not be the assistant's."""
    if not ANY_MARKER.search(answer):
        return [Marker.TEXT, answer, Marker.END_OF_BLOCK]
    parts = split_text(answer)
    for part in parts:
        if isinstance(part, Marker) and part in ROLES.values():
            raise UserError(f"a response holds {part}, which begins another message; make it a conversation "
                            '("messages"), or break the marker')
    return parts


def pieces_of_steps(texts: Sequence[str]) -> list[list[Piece]]:
    """Split the steps of a response, none of them empty, which together are what answer_pieces() reads; blocks may go
    on from one step to the next."""
    parts = [answer_pieces(text) if ANY_MARKER.search(text) else [text] for text in texts]
    if not any(isinstance(part, Marker) for step in parts for part in step):
        parts[0].insert(0, Marker.TEXT)
        parts[-1].append(Marker.END_OF_BLOCK)
    return parts


def last_text(answer: str) -> str:
    """Find the content of an answer's last block of text, where its result is; without markers it is all text."""
    if not ANY_MARKER.search(answer):
        return answer
    _, found, rest = answer.rpartition(Marker.TEXT)
    return ANY_MARKER.split(rest)[0] if found else ""


def learnt(parts: Sequence[Piece], what: Learnt, kept: Sequence[bool]) -> list[bool]:
    """Say for each piece whether it has a loss.

    what: all pieces, those of the assistant's messages, or of these without executions, which the interpreter writes,
    markers included. kept: for each message of the assistant, whether it counts at all.
    """
    found, role, kind, answers, is_kept = [], None, None, iter(kept), True
    for part in parts:
        marker = part if isinstance(part, Marker) else None  # a content may spell one
        role = marker if marker in ROLES.values() else role
        kind = marker if marker in KINDS.values() else kind
        is_kept = next(answers) if marker == Marker.ASSISTANT else is_kept or marker in ROLES.values()
        inside = role == Marker.ASSISTANT and marker != Marker.ASSISTANT  # the role itself is part of the prompt
        chosen = what == "all" or (inside and (what == "assistant" or kind != Marker.EXECUTION))
        found.append(chosen and is_kept)
        if marker == Marker.END_OF_BLOCK:
            kind = None
    return found


def split_text(text: str) -> list[Piece]:
    """Split the text form into its pieces, empty contents left out."""
    parts = [Marker(part) if part in set(Marker) else part for part in ANY_MARKER.split(text)]
    return [part for part in parts if part]


def text_form(parts: Iterable[Piece]) -> str:
    """Join pieces to the text form. What spells a marker in a content is broken, for split_text() would mistake it."""
    return "".join(part if isinstance(part, Marker) else ANY_MARKER.sub(lambda found: f"<| {found[0][2:]}", part)
                   for part in parts)


def ended_blocks(parts: Iterable[Piece]) -> list[SolutionBlock]:
    """Collect the ended blocks of an answer, whatever lies between them; kind "" is one that no marker began."""
    found, kind, content = [], "", ""
    for part in parts:
        if part == Marker.END_OF_BLOCK and isinstance(part, Marker):
            found.append(SolutionBlock(kind, content))
            kind = content = ""
        elif isinstance(part, Marker):
            kind, content = part.name.lower() if part in KINDS.values() else "", ""
        else:
            content += part
    return found
