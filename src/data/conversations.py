"""Conversations: what their messages say, and which of the assistant's are to be learnt."""

from src.data.rows import FOREIGN_IN_MESSAGE, Row, Schema
from src.errors import UserError

_MESSAGE = Schema(foreign=FOREIGN_IN_MESSAGE)


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
    return {"role": role, "content": content} | ({} if _is_learnt(message, role) else {"weight": 0})


def _is_learnt(message: Row, role: str) -> bool:
    """Whether the weight of a message, if there is one, says what is done without it. Raises UserError."""
    weight = message.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise UserError(f"{message.where}: 'weight' is {weight!r}; expected 0, which leaves it unlearnt, or 1")
    if weight and role != "assistant":
        raise UserError(f"{message.where}: 'weight' is {weight!r}, but of the {role} nothing is learnt; leave it out")
    return weight is None or bool(weight)


def _content(message: Row) -> str | list[dict[str, str]]:
    """What a message says: a text, or blocks of texts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message.text("content")
    inside = _objects(message, parts, "block", Schema(foreign={}))
    for part in inside:
        kind = part.text("type")
        if part.get("text") is None and part.get("content") is None:
            raise UserError(
                f"{part.where}: key 'content' is missing in a block of type {kind!r}; expected a text under 'text' "
                f"(type 'text') or under 'content' (type 'text', 'code' or 'execution')"
            )
        if part.get("text") is not None and (kind != "text" or part.get("content") is not None):
            found = ", ".join(key for key in part.values if part.get(key) is not None)
            raise UserError(
                f"{part.where}: expected the 'text' of a part of type 'text', found type {kind!r} and {found}"
            )
    if inside and all(part.get("text") is not None for part in inside):
        return "".join(part.text("text") for part in inside)
    return [{"type": part.text("type"), "content": part.text("content")} for part in inside]
