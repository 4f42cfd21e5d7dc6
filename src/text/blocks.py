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
class Block:
    """kind: "text", "code" or "execution"."""

    kind: str
    content: str


@dataclass(frozen=True)
class Message:
    """role: "system", "user" or "assistant". A message that is not ended can be continued: a prompt, or the first steps
    of a solution."""

    role: str
    blocks: tuple[Block, ...]
    ended: bool = True


def pieces(messages: Iterable[Message]) -> list[Piece]:
    """The parts of the text form in order. Raises UserError if a message other than the last is not ended."""
    parts: list[Piece] = []
    for number, message in enumerate(messages, start=1):
        if parts and parts[-1] != Marker.END_OF_MESSAGE:
            raise UserError(f"message {number} follows one that is not ended; only the last may be left open")
        parts.append(ROLES[message.role])
        for block in message.blocks:
            parts += [KINDS[block.kind], block.content, Marker.END_OF_BLOCK]
        if message.ended:
            parts.append(Marker.END_OF_MESSAGE)
    return parts


def render(messages: Iterable[Message]) -> str:
    """The text form. Raises UserError if a content holds a marker, which the text form cannot tell from a real one."""
    parts = pieces(messages)
    for part in parts:
        if not isinstance(part, Marker) and (found := ANY_MARKER.search(part)):
            place = part[max(0, found.start() - 20) : found.end() + 20]
            raise UserError(
                f"a block holds the marker {found[0]} as text, in {place!r}; drop the row, or encode its pieces"
            )
    return "".join(parts)


def prompt_pieces(problem: str) -> list[Piece]:
    """A problem, up to where the assistant's blocks begin."""
    return pieces([Message("user", (Block("text", problem),)), Message("assistant", (), ended=False)])


def answer_pieces(answer: str) -> list[Piece]:
    """A response or its beginning, which may stop inside a block; one without any marker is a block of text."""
    return split_text(answer) if ANY_MARKER.search(answer) else [Marker.TEXT, answer, Marker.END_OF_BLOCK]


def last_text(answer: str) -> str:
    """The content of an answer's last block of text, where its result stands; an answer without markers is all text."""
    if not ANY_MARKER.search(answer):
        return answer
    _, found, rest = answer.rpartition(Marker.TEXT)
    return ANY_MARKER.split(rest)[0] if found else ""


def learnt(parts: Sequence[Piece], what: Learnt, kept: Sequence[bool]) -> list[bool]:
    """For each piece whether it is one to learn: all, what stands in the assistant's messages, or of that what the
    model writes itself - an execution is the interpreter's, markers included. Nothing of its messages not kept is."""
    found, role, kind, answers, is_kept = [], None, None, iter(kept), True
    for part in parts:
        if isinstance(part, Marker):
            role = part if part in ROLES.values() else role
            kind = part if part in KINDS.values() else kind
            is_kept = next(answers) if part == Marker.ASSISTANT else is_kept or part in ROLES.values()
        inside = role == Marker.ASSISTANT and part != Marker.ASSISTANT
        chosen = what == "all" or (inside and (what == "assistant" or kind != Marker.EXECUTION))
        found.append(chosen and is_kept)
        if part == Marker.END_OF_BLOCK:
            kind = None
    return found


def split_text(text: str) -> list[Piece]:
    """The pieces of a text form."""
    parts = [Marker(part) if part in set(Marker) else part for part in ANY_MARKER.split(text)]
    return [part for part in parts if part]


def parse(text: str) -> list[Message]:
    """The messages of a text form; render gives the text back. Raises UserError, with the place, if it is none."""
    return parse_pieces(split_text(text))


def parse_pieces(parts: Sequence[Piece]) -> list[Message]:
    """The messages of a list of pieces; empty content may be missing. Raises UserError if they are out of order."""
    reader = _Reader(parts)
    messages = []
    while not reader.at_end():
        if messages and not messages[-1].ended:
            reader.complain("the end")
        messages.append(reader.message())
    return messages


def ended_blocks(parts: Iterable[Piece]) -> list[Block]:
    """The blocks of an answer that are ended, whatever stands between them; kind "" is one that no marker began."""
    found, kind, content = [], "", ""
    for part in parts:
        if part == Marker.END_OF_BLOCK and isinstance(part, Marker):
            found.append(Block(kind, content))
            kind = content = ""
        elif isinstance(part, Marker):
            kind, content = part.name.lower() if part in KINDS.values() else "", ""
        else:
            content += part
    return found


class _Reader:
    """A place in a list of pieces."""

    def __init__(self, parts: Sequence[Piece]) -> None:
        self.parts, self.index = parts, 0

    def at_end(self) -> bool:
        return self.index == len(self.parts)

    def take(self, wanted: Iterable[Marker]) -> Marker | None:
        """The next piece if it is a wanted marker."""
        part = None if self.at_end() else self.parts[self.index]
        if not isinstance(part, Marker) or part not in wanted:
            return None
        self.index += 1
        return part

    def message(self) -> Message:
        role = self.take(ROLES.values()) or self.complain("a role")
        blocks = []
        while kind := self.take(KINDS.values()):
            blocks.append(Block(kind.name.lower(), self.content()))
        ended = self.take([Marker.END_OF_MESSAGE]) is not None
        if not ended and not self.at_end():
            self.complain(f"a block or {Marker.END_OF_MESSAGE}")
        return Message(role.name.lower(), tuple(blocks), ended)

    def content(self) -> str:
        """The text up to the end of its block."""
        texts = []
        while not self.at_end() and not isinstance(self.parts[self.index], Marker):
            texts.append(self.parts[self.index])
            self.index += 1
        if not self.take([Marker.END_OF_BLOCK]):
            self.complain(Marker.END_OF_BLOCK)
        return "".join(texts)

    def complain(self, expected: str) -> None:
        """Raise UserError at the present place."""
        found = "the end" if self.at_end() else repr(self.parts[self.index][:40])
        place = sum(map(len, self.parts[: self.index]))
        raise UserError(f"solution with code, character {place}: found {found}, expected {expected}")


def from_messages(rows: Sequence[Mapping[str, object]]) -> list[Message]:
    """The training form: [{"role", "content": text or [{"type", "content"}, ...]}, ...]. Raises UserError naming the
    message."""
    messages = []
    for number, row in enumerate(rows, start=1):
        role, content = row.get("role"), row.get("content")
        if role not in ROLES:
            raise UserError(f"message {number}: role {role!r}; expected one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "content": content}]
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise UserError(f'message {number}: content is no list of {{"type", "content"}} blocks')
        blocks = (_block(block.get("type"), block.get("content"), f"message {number}") for block in content)
        messages.append(Message(role, tuple(blocks)))
    return messages


def from_flat(rows: Sequence[Mapping[str, object]]) -> list[Message]:
    """The run-time form: [{"role": "system" | "user" | "text" | "code" | "execution", "content"}, ...], in which the
    blocks of one answer follow each other. Raises UserError naming the row, also for one that marks a failure."""
    messages: list[Message] = []
    for number, row in enumerate(rows, start=1):
        role, content = row.get("role"), row.get("content")
        if role in ("system", "user"):
            messages.append(Message(role, (_block("text", content, f"row {number}"),)))
            continue
        block = _block(role, content, f"row {number}")
        if messages and messages[-1].role == "assistant":
            block_list = (*messages.pop().blocks, block)
        else:
            block_list = (block,)
        messages.append(Message("assistant", block_list))
    return messages


def _block(kind: object, content: object, place: str) -> Block:
    """A block of checked values."""
    if kind not in KINDS:
        raise UserError(f"{place}: {kind!r} is no kind of block; expected one of {', '.join(KINDS)}")
    if not isinstance(content, str):
        raise UserError(f"{place}: content of a {kind} block is {type(content).__name__}, expected text")
    return Block(str(kind), content)
