"""src/data/encoding.py: prompts and responses as ids, with and without a template."""

from pathlib import Path

import pytest
import transformers

from src.data.encoding import Encoded, encode_conversation, encode_prompt, encode_response, encode_steps
from src.errors import UserError
from src.text.chat import BUILT_IN, find_source
from src.text.tokenizer import Tokenizer
from tests.text.files import WRITERS, write_merges, write_tokenizer_json
from tests.tiny import write_tokenizer


def test_prompt_and_response_are_tokenised_apart(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    encoded = encode_response(tokenizer, "1+2=", "3")
    prompt = [tokenizer.bos_id, *tokenizer.encode("1+2=")]
    assert encode_prompt(tokenizer, "1+2=") == prompt
    assert encoded.tokens == [*prompt, *tokenizer.encode("3"), tokenizer.eos_id]
    assert encoded.response_start == len(prompt)
    assert encoded.n_response == len(tokenizer.encode("3")) + 1
    unfinished = encode_response(tokenizer, "1+2=", "3", finished=False)
    assert unfinished.tokens == encoded.tokens[:-1]


def test_a_vocabulary_without_bos_puts_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_merges(tmp_path))
    assert encode_prompt(tokenizer, "12") == tokenizer.encode("12")
    with pytest.raises(UserError, match="^f.json, row 2: an instruction is empty and .* has no BOS"):
        encode_prompt(tokenizer, "", where="f.json, row 2")


def test_a_chat_template_is_all_that_stands_around_texts(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_merges(tmp_path), "qwen")
    text, start, end = tokenizer.encode, tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    system = [start, *text("system\nYou are a helpful assistant."), end, *text("\n")]
    prompt = [*system, start, *text("user\n1+2="), end, *text("\n"), start, *text("assistant\n")]
    encoded = encode_response(tokenizer, "1+2=", "3")
    assert encode_prompt(tokenizer, "1+2=") == prompt
    assert encoded == Encoded([*prompt, *text("3"), end], len(prompt))
    assert encode_response(tokenizer, "1+2=", "3", finished=False).tokens == encoded.tokens[:-1]
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    (conversation,) = encode_conversation(tokenizer, messages)
    assert conversation.tokens == encoded.tokens
    assert conversation.answer_mask == [False] * len(prompt) + [True] * encoded.n_response


@pytest.mark.parametrize("kind", WRITERS)
def test_steps_stand_in_the_template_as_the_whole_answer_does(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    n_templates = 0
    for name in ("none", *BUILT_IN):
        try:
            tokenizer = Tokenizer(tmp_path, name)
        except UserError as problem:
            assert "which --chat_template" in str(problem) or "bos_token" in str(problem)  # of another vocabulary
            continue
        n_templates += 1
        for answer in ("It is 2", " It is 2 ", "x <|im_end|> <", ""):
            whole, single = encode_response(tokenizer, "1+1=", answer), encode_steps(tokenizer, "1+1=", [answer], [1.0])
            assert single.tokens == whole.tokens and single.targets[-1] == 1.0, (name, answer)
        steps = encode_steps(tokenizer, "1+1=", ["It", "is <", "2"], [0.0, 0.5, 1.0])
        joined = encode_response(tokenizer, "1+1=", "It\n\nis <\n\n2")
        assert tokenizer.decode(steps.tokens) == tokenizer.decode(joined.tokens), name
        ends = [place for place, label in enumerate(steps.targets, steps.response_start) if label == label]
        read = [tokenizer.decode(steps.tokens[steps.response_start : end + 1]).strip(" ") for end in ends]
        assert read == ["It\n\n", "It\n\nis <\n\n", "It\n\nis <\n\n2"], name
        cut = encode_steps(tokenizer, "1+1=", ["It", "is"], [0.0, 1.0], finished=False)
        assert cut.tokens[-1] != tokenizer.eos_id and len(cut.targets) == cut.n_response
    assert n_templates > 2


@pytest.mark.parametrize("name", ["llama-2", "mistral", "qwen", "deepseek", "gemma", "internlm2"])
def test_an_unfinished_answer_ends_where_transformers_would_continue_it(tmp_path: Path, name: str) -> None:
    write_tokenizer_json(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, chat_template=find_source(name, tmp_path))
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "It\n\nis"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    tokenizer = Tokenizer(tmp_path, name)
    for encoded in (encode_response(tokenizer, "1+1=", "It\n\nis", finished=False),
                    encode_response(tokenizer, "1+1=", "is", prefix="It\n\n", finished=False),
                    encode_steps(tokenizer, "1+1=", ["It", "is"], [0.0, 1.0], finished=False)):
        assert tokenizer.decode(encoded.tokens, show_control=True) == expected


def test_scdpo_19_a_partial_answer_in_a_chat_template_belongs_to_the_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_merges(tmp_path), "qwen")
    bare, text = encode_prompt(tokenizer, "1+2="), tokenizer.encode
    encoded = encode_response(tokenizer, "1+2=", "3", prefix="12\n\n")
    prompt = [*bare, *text("12\n\n")]
    assert encoded == Encoded([*prompt, *text("3", start=False), tokenizer.eos_id], len(prompt))
    assert encode_prompt(tokenizer, "1+2=", "12\n\n") == prompt
    with pytest.raises(UserError, match="chat template qwen changes the partial answer"):
        encode_prompt(tokenizer, "1+2=", "1<|im_end|>")


def test_a_conversation_needs_a_template_and_an_answer(tmp_path: Path) -> None:
    path, question = write_merges(tmp_path), [{"role": "user", "content": "1+2="}]
    with pytest.raises(UserError, match="messages need a --chat_template"):
        encode_conversation(Tokenizer(path), question)
    with pytest.raises(UserError, match="holds no message of the assistant"):
        encode_conversation(Tokenizer(path, "qwen"), question)
