"""src/data/encoding.py: solutions with code as ids, and which of them are learnt."""

from pathlib import Path

import pytest

from src.data.encoding import (
    Encoded,
    encode_conversation,
    encode_prompt,
    encode_response,
    encode_steps,
    split_steps,
)
from src.data.examples import read_instructions
from src.errors import UserError
from src.text.blocks import Marker, split_text
from src.text.tokenizer import Tokenizer
from src.training.sft import sft_dataset
from tests.text.files import write_json

PROMPT = "<|user|><|text|>What is 6 x 7?<|endofblock|><|endofmessage|><|assistant|>"
SIX = (  # blocks
    "<|text|>Multiply:<|endofblock|><|code|>print(6*7)<|endofblock|><|execution|>42\n<|endofblock|>"
    "<|text|> Once more:<|endofblock|><|code|>print(7*6)<|endofblock|><|execution|> 42\n<|endofblock|>"
)
END = "<|text|>#### 42<|endofblock|>"
EXECUTIONS = ["<|execution|>42\n<|endofblock|>", "<|execution|> 42\n<|endofblock|>"]


def messages(answer: str) -> list[dict[str, object]]:
    blocks = [
        {"type": kind.strip("<|>"), "content": rest.removesuffix("<|endofblock|>")}
        for kind, rest in (
            part.split("|>", 1) for part in answer.replace("<|endofblock|>", "<|endofblock|>\0").split("\0") if part
        )
    ]
    return [{"role": "user", "content": "What is 6 x 7?"}, {"role": "assistant", "content": blocks}]


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, show_control=True)


def learnt(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The texts of the stretches that carry loss."""
    stretches, before = [], False
    for token, here in zip(encoded.tokens, encoded.supervised, strict=True):
        if here and not before:
            stretches.append([])
        if here:
            stretches[-1].append(token)
        before = here
    return [shown(tokenizer, ids) for ids in stretches]


def test_prompt_and_response_are_the_text_form(code_tokenizer: Tokenizer) -> None:
    encoded = encode_response(code_tokenizer, "What is 6 x 7?", SIX + END)
    assert encoded.tokens[: encoded.response_start] == encode_prompt(code_tokenizer, "What is 6 x 7?")
    assert shown(code_tokenizer, encoded.tokens) == PROMPT + SIX + END + "<|endofmessage|>"


def test_markers_are_one_id_each_and_content_that_spells_one_is_text(code_tokenizer: Tokenizer) -> None:
    parts = code_tokenizer.encode_pieces([Marker.TEXT, "<|text|>", Marker.END_OF_BLOCK])
    assert [len(part) for part in parts] == [1, len(parts[1]), 1]
    assert len(parts[1]) > 1
    assert not set(parts[1]) & set(code_tokenizer.control.values())


def test_a_prefix_and_the_rest_are_the_whole_answer(code_tokenizer: Tokenizer) -> None:
    whole = encode_response(code_tokenizer, "What is 6 x 7?", SIX + END)
    cut = SIX.index("<|text|> Once")
    rest = encode_response(code_tokenizer, "What is 6 x 7?", SIX[cut:] + END, prefix=SIX[:cut])
    assert rest.tokens == whole.tokens
    assert rest.response_start > whole.response_start
    assert rest.tokens[: rest.response_start] == encode_prompt(code_tokenizer, "What is 6 x 7?", SIX[:cut])
    assert learnt(code_tokenizer, rest) == learnt(code_tokenizer, whole)[1:]


def test_an_answer_without_markers_is_one_block_of_text(code_tokenizer: Tokenizer) -> None:
    encoded = encode_response(code_tokenizer, "Q", "plain 3")
    assert shown(code_tokenizer, encoded.tokens).endswith(
        "<|assistant|><|text|>plain 3<|endofblock|><|endofmessage|>"
    )
    assert encoded.answer_mask is None


@pytest.mark.parametrize("step_end", ["\n", "\n\n"])
@pytest.mark.parametrize("answer", [SIX + END, SIX.replace("Multiply:", "a\n\nb") + END, "plain 3", "6 x 7\n\n42"])
def test_a_verifier_reads_steps_in_the_tokens_of_the_whole_answer(
    code_tokenizer: Tokenizer, answer: str, step_end: str
) -> None:
    """They may end inside a block; none is a marker spelled out in letters."""
    steps = split_steps(answer, step_end)
    found = encode_steps(code_tokenizer, "Q", steps, [1.0] * len(steps), step_end=step_end)
    assert found.tokens == encode_response(code_tokenizer, "Q", step_end.join(steps)).tokens
    ends = [place + 1 for place, target in enumerate(found.targets) if target == 1.0]
    texts = [shown(code_tokenizer, found.tokens[found.response_start :][:end]) for end in ends]
    opening = "" if "<|" in answer else "<|text|>"
    assert texts[:-1] == [opening + step_end.join(steps[: n + 1]) + step_end for n in range(len(steps) - 1)]
    assert texts[-1].endswith("<|endofblock|><|endofmessage|>")


@pytest.mark.parametrize(
    ("loss_on", "stretches"),
    [
        ("all", [(PROMPT + SIX + END + "<|endofmessage|>").removeprefix("<|user|>")]),
        ("assistant", [SIX + END + "<|endofmessage|>"]),
        (
            "assistant_no_execution",
            [
                "<|text|>Multiply:<|endofblock|><|code|>print(6*7)<|endofblock|>",
                "<|text|> Once more:<|endofblock|><|code|>print(7*6)<|endofblock|>",
                END + "<|endofmessage|>",
            ],
        ),
    ],
)
def test_scdpo_03_the_label_mask_of_each_mode(
    tmp_path: Path, code_tokenizer: Tokenizer, loss_on: str, stretches: list[str]
) -> None:
    file = write_json(tmp_path / "rows.json", [{"messages": messages(SIX + END)}])
    rows = read_instructions(str(file))
    data = sft_dataset(rows, code_tokenizer, max_seq_len=512, source="rows", loss_on=loss_on)
    ((encoded,),) = data.samples
    assert learnt(code_tokenizer, encoded) == stretches
    assert shown(code_tokenizer, encoded.tokens) == PROMPT + SIX + END + "<|endofmessage|>"


def test_scdpo_03_executions_of_a_text_answer_carry_no_loss_either(code_tokenizer: Tokenizer) -> None:
    encoded = encode_response(code_tokenizer, "What is 6 x 7?", SIX + END)
    lost = [token for token, here in zip(encoded.tokens, encoded.supervised, strict=True) if not here]
    text = shown(code_tokenizer, lost[encoded.response_start :])
    assert text == "".join(EXECUTIONS)


def test_blocks_need_their_form(tmp_path: Path, toy_tokenizer: Tokenizer, code_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="needs a|need a --chat_template"):
        encode_conversation(toy_tokenizer, messages(SIX))
    with pytest.raises(UserError, match="--chat_template code needs; put the markers"):
        Tokenizer(toy_tokenizer.path, "code")
    bad = write_json(tmp_path / "bad.json", [{"messages": [{"role": "assistant", "content": [{"type": "code"}]}]}])
    with pytest.raises(UserError, match=r"row 1, message 1, block 1: key 'content' is missing"):
        list(read_instructions(str(bad)))
    odd = write_json(
        tmp_path / "odd.json", [{"messages": [{"role": "assistant", "content": [{"type": "x", "content": "y"}]}]}]
    )
    with pytest.raises(UserError, match="row 1: message 1: 'x' is no kind of block"):
        sft_dataset(read_instructions(str(odd)), code_tokenizer, max_seq_len=64, source="odd")


def test_split_text_gives_the_pieces_back() -> None:
    assert "".join(split_text(PROMPT + SIX)) == PROMPT + SIX
