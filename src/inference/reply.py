"""What a server's reply says: one completion of the OpenAI protocol, or Odd. A reply is foreign data of any kind."""

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

from src import jsonfile
from src.errors import UserError

ENDS = ("stop", "length")  # all other finish reasons (abort, content_filter, tool_calls, null, ...) are no ends
MOST_TOKENS = 2**31
LEAST_LOGPROB = -1e6
SHOWN = 200  # characters of a reply in a message


class Odd(Exception):
    """A reply that holds no completion."""


class Token(NamedTuple):
    """A token that was drawn, as the server spells it, and its log-prob in nats."""

    text: str
    logprob: float


class Reply(NamedTuple):
    """One completion. token_count is None and tokens are empty where the server does not say."""

    text: str
    token_count: int | None
    finish: str  # one of ENDS
    tokens: tuple[Token, ...] = ()

    @property
    def logprob(self) -> float | None:
        """Of all tokens, in nats, None where they are not said."""
        return sum(token.logprob for token in self.tokens) if self.tokens else None

    def first(self, n_characters: int) -> "Reply":
        """The completion up to a place in its text, with the tokens that this took, where they can be told."""
        text, spelled = self.text[:n_characters], "".join(token.text for token in self.tokens)
        if n_characters >= len(self.text):
            return self
        if not spelled.startswith(text):
            return Reply(text, None, self.finish)
        ends = accumulate(len(token.text) for token in self.tokens)
        n_tokens = sum(end < n_characters for end in ends) + 1
        return Reply(text, n_tokens, self.finish, self.tokens[:n_tokens])


def read_reply(data: bytes) -> Reply:
    """The completion in a reply to /completions or /chat/completions. Raises Odd."""
    try:
        values = jsonfile.parse(data, "the reply")
    except UserError as problem:
        kind = "the reply is a stream, which was not asked for" if data.lstrip().startswith(b"data:") else problem
        raise Odd(f"{kind}: {shown(data)}") from None
    if values.get("error"):
        raise Odd(f"the reply is an error: {shown(data)}")
    choices = values.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Odd(f"the reply has not one choice: {shown(data)}")
    choice = choices[0]
    if choice.get("index") not in (0, None):
        raise Odd(f"the one choice has index {choice['index']!r:.50}")
    finish = choice.get("finish_reason")
    if finish not in ENDS:
        raise Odd(f"finish_reason is {finish!r:.{SHOWN}}, which is no end")
    return Reply(_text(choice), _token_count(values.get("usage")), finish, _tokens(choice.get("logprobs")))


def shown(data: bytes) -> str:
    """The beginning of a reply for a message."""
    return repr(data[:SHOWN].decode(errors="replace"))


def _text(choice: Mapping[str, object]) -> str:
    """What was written; thoughts that a server sets apart stand before it in <think>. Raises Odd."""
    if "message" not in choice:
        return _valid(choice.get("text"))
    message = choice["message"]
    if not isinstance(message, dict):
        raise Odd(f"the message is {message!r:.{SHOWN}}")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    if not thoughts:
        return _valid(content)
    begun = f"<think>\n{_valid(thoughts)}"  # cut off within its thoughts there is no content
    return begun if content is None else f"{begun}\n</think>\n\n{_valid(content)}"


def _valid(text: object) -> str:
    if not isinstance(text, str):
        raise Odd(f"the text is {text!r:.{SHOWN}}")
    return text


def _token_count(usage: object) -> int | None:
    """The number of tokens in a completion, None where nothing is said. Raises Odd."""
    if usage is None:
        return None
    count = usage.get("completion_tokens") if isinstance(usage, dict) else -1
    if count is not None and (type(count) is not int or not 0 <= count < MOST_TOKENS):
        raise Odd(f"usage is {usage!r:.{SHOWN}}")
    return count


def _tokens(logprobs: object) -> tuple[Token, ...]:
    """The tokens with their log-probs, in either protocol's form; none where they are not given, or make no sense."""
    if not isinstance(logprobs, dict):
        return ()
    if isinstance(content := logprobs.get("content"), list):
        rows = [row if isinstance(row, dict) else {} for row in content]
        texts, values = [row.get("token") for row in rows], [row.get("logprob") for row in rows]
    else:
        values = logprobs.get("token_logprobs")
        if not isinstance(values, list):
            return ()
        texts = logprobs.get("tokens")
        if not isinstance(texts, list) or len(texts) != len(values):
            texts = [""] * len(values)
    if not all(type(value) in (int, float) and LEAST_LOGPROB < value < 1e-3 for value in values):
        return ()
    return tuple(Token(text if isinstance(text, str) else "", value)
                 for text, value in zip(texts, values, strict=True))  # fmt: skip
