"""src/serving/server_client.py: what is a completion, and what only looks like one."""

import json
import math

import pytest

from src.serving.server_client import BadReply, Reply, Token, read_reply

CHOICE = {"index": 0, "text": " #### 4", "finish_reason": "stop", "logprobs": None}
DEEP = b"[" * 100_000 + b"]" * 100_000


def reply(**changes: object) -> dict[str, object]:
    """A good reply but for these changes of its choice."""
    return {"choices": [CHOICE | changes], "usage": {"completion_tokens": 3}}


def said(**message: object) -> dict[str, object]:
    """A good reply of /chat/completions."""
    return {"choices": [{"index": 0, "message": {"role": "assistant"} | message, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    "values",
    [
        *(reply(finish_reason=finish) for finish in
          ("abort", "content_filter", "tool_calls", "function_call", "eos_token", "error", "", None, "STOP", 0, [],
           ["stop"], {"type": "stop"}, {"type": "abort", "message": "oom"}, True, "\ud83d")),
        *(reply(text=text) for text in (None, 7, True, [" #### 4"], {"text": "4"}, "\ud83d #### 4", "4 \udfff")),
        *(reply(index=index) for index in (1, -1, "0", [0], 10**30)),
        *(reply() | {"usage": usage} for usage in
          ("5", 5, 1.5, [], [5], {"completion_tokens": "5"}, {"completion_tokens": -1}, {"completion_tokens": 10**30},
           {"completion_tokens": 5.5}, {"completion_tokens": True}, {"completion_tokens": [5]})),
        *(reply() | {"choices": choices} for choices in
          (None, [], {}, "text", 4, [None], ["4"], [[CHOICE]], [CHOICE, CHOICE], [CHOICE, CHOICE | {"index": 1}])),
        *(said(content=content) for content in (None, 4, ["4"], {"text": "4"}, [{"type": "text"}], "\udc00")),
        *(reply() | {"error": error} for error in ("overloaded", {"message": "model overloaded", "code": 503}, ["x"])),
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "message": "4", "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "message": {"reasoning_content": ["a"], "content": "4"}, "finish_reason": "stop"}]},
        {"object": "error", "message": "model not loaded"},
        {}, None, [], [reply()], 4, "4", True,
    ],
    ids=lambda values: json.dumps(values)[:80],
)
def test_what_is_no_completion(values: object) -> None:
    with pytest.raises(BadReply) as problem:
        read_reply(json.dumps(values).encode())
    str(problem.value).encode()  # failures.jsonl can hold it
    assert len(str(problem.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"\0", b"\xff\xfe", b"<html>bad gateway</html>", b"{", b'{"choices": [', b"nothing", DEEP,
        b'{"choices": ' + DEEP + b"}", b'{"a":' * 100_000, b"9" * 10_000,
        b'{"choices": [{"index": ' + b"9" * 9_000 + b"}]}",
        b'data: {"choices": []}\n\ndata: [DONE]\n\n', json.dumps(reply()).encode()[:-1],
        *(b'{"choices": [{"index": 0, "text": ' + b"[" * n + b"]" * n + b', "finish_reason": "stop"}]}'
          for n in range(100, 1000, 100)),
    ],
    ids=lambda data: repr(data)[:40],
)
def test_what_is_no_reply(data: bytes) -> None:
    with pytest.raises(BadReply) as problem:
        read_reply(data)
    assert len(str(problem.value)) < 500


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (reply(), Reply(" #### 4", 3, "stop")),
        (reply(finish_reason="length", text=""), Reply("", 3, "length")),
        (reply() | {"usage": None}, Reply(" #### 4", None, "stop")),
        (reply() | {"usage": {}, "error": None}, Reply(" #### 4", None, "stop")),
        (reply(text="\0 \U0001f600", index=None), Reply("\0 \U0001f600", 3, "stop")),
        (said(content="4", tool_calls=[]), Reply("4", None, "stop")),
        (said(content="4", reasoning_content="2+2"), Reply("<think>\n2+2\n</think>\n\n4", None, "stop")),
        (said(content="4", reasoning=""), Reply("4", None, "stop")),
        (said(content=None, reasoning="2+"), Reply("<think>\n2+", None, "stop")),
    ],
)
def test_what_is_a_completion(values: object, expected: Reply) -> None:
    assert read_reply(json.dumps(values).encode()) == expected


TOKENS = (Token(" a", -0.5), Token("\n\n", -1.0), Token("b", 0.0))


@pytest.mark.parametrize(
    ("logprobs", "tokens"),
    [
        ({"tokens": [" a", "\n\n", "b"], "token_logprobs": [-0.5, -1.0, 0]}, TOKENS),
        ({"content": [{"token": token.text, "logprob": token.logprob} for token in TOKENS]}, TOKENS),
        ({"token_logprobs": [-0.5, -1.0]}, (Token("", -0.5), Token("", -1.0))),
        ({"tokens": ["a"], "token_logprobs": [-0.5, -1.0]}, (Token("", -0.5), Token("", -1.0))),
        *((odd, ()) for odd in (
            None, {}, [], "x", 4, {"token_logprobs": None}, {"token_logprobs": [None, -1.0]},
            {"token_logprobs": ["-1"]}, {"token_logprobs": [math.nan]}, {"token_logprobs": [-math.inf]},
            {"token_logprobs": [-(10**400)]}, {"token_logprobs": [3.0]},
            {"token_logprobs": [True]},
            {"content": [None]}, {"content": [{"token": "a"}]})),
    ],
)
def test_logprobs_of_either_protocol_or_none(logprobs: object, tokens: tuple[Token, ...]) -> None:
    found = read_reply(json.dumps(reply(logprobs=logprobs)).encode())
    assert found.tokens == tokens
    assert found.logprob == (sum(token.logprob for token in tokens) if tokens else None)


def test_the_first_part_of_a_completion_takes_its_tokens_along() -> None:
    whole = Reply(" a\n\nb", 3, "length", TOKENS)
    assert whole.first(4) == Reply(" a\n\n", 2, "length", TOKENS[:2]) and whole.first(4).logprob == -1.5
    assert whole.first(3) == Reply(" a\n", 2, "length", TOKENS[:2])  # a token that is cut was drawn
    assert whole.first(5) == whole.first(99) == whole
    assert Reply(" a\n\nb", 3, "length").first(4) == Reply(" a\n\n", None, "length")
    assert Reply("xa\n\nb", 3, "length", TOKENS).first(4) == Reply("xa\n\n", None, "length")
