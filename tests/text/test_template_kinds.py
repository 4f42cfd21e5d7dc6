"""Templates of every kind that models came with, token for token as transformers puts conversations in them."""

import re
from datetime import date
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from src.data.encoding import (
    encode_conversation,
    encode_prompt,
    encode_response,
    encode_steps,
)
from src.errors import UserError
from src.text.extend import say_ends
from src.text.tokenizer import Tokenizer, read_template_args
from tests.reference import shared
from tests.text.files import (
    CONTROL,
    byte_level,
    write_json,
    write_merges,
    write_sentencepiece,
    write_tokenizer_json,
)

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}"
# an assistant's message as <think>, its thoughts, </think>, and its answer; `keeps` says where the thoughts stay
THINKS = """{% for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set parts = m.content.split('</think>') %}
    {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
    {%- set answer = parts[-1].lstrip('\n') %}
    {{- '<|im_start|>assistant\n' }}
    {%- if KEEPS %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
    {{- answer + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}"""
SWITCH = "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
# dropped: earlier thoughts; opened: all thoughts, and the prompt opens them; both: the prompt opens what the last keeps
DROPPED = THINKS.replace("KEEPS", "loop.last") + ASK + SWITCH + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
OPENED = THINKS.replace("KEEPS", "false") + OPENS
BOTH = THINKS.replace("KEEPS", "loop.last") + OPENS
SILENT = THINKS.replace("KEEPS", "false") + ASK
MERGED = """{% for m in messages %}
{%- if m.role == 'user' and loop.index0 == 1 and messages[0].role == 'system' %}
    {{- '<|im_start|>user\n' + messages[0].content + '\n\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}"""
TOOLS = "{% if tools %}{{ 'Tools: ' + tools | tojson }}{% endif %}" + CHATML
GENERATION = "{% for m in messages %}{% generation %}" + TURN + "{% endgeneration %}{% endfor %}"
GUARDED = "{% if not day is defined %}{% set day = '26 Jul 2024' %}{% endif %}{{ 'Day: ' + day + '\n' }}" + CHATML
DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML
ROLES = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant in turn') }}{% endif %}{% endfor %}""" + CHATML
TODAY = date.today().isoformat()
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "thoughts dropped": (DROPPED, {}),
    "thoughts dropped, off": (DROPPED, {"enable_thinking": False}),
    "prompt opens": (OPENED, {}),
    "prompt opens, thoughts dropped": (BOTH, {}),
    "thoughts never written": (SILENT, {}),
    "system merged": (MERGED + ASK, {}),
    "tools": (TOOLS + ASK, {}),
    "generation": (GENERATION + ASK, {}),
    "guarded day": (GUARDED + ASK, {}),
    "given day": (GUARDED + ASK, {"day": "1 Jan 2025"}),
    "strftime_now": (DATED + ASK, {"strftime_now": TODAY}),
    "roles": (ROLES + ASK, {}),
}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PLAIN = [message("user", "1+1?"), message("assistant", "It is 2."), message("user", "Why?")]
PLAIN += [message("assistant", "So."), message("user", "Thanks")]
THOUGHT = [*PLAIN]
THOUGHT[1] = message("assistant", "<think>\nEasy: 1.\n</think>\n\nIt is 2.")
THOUGHT[3] = message("assistant", "<think>\nHm.\n</think>\n\nSo.")


def opened(folder: Path, source: str, args: dict[str, object] | None = None) -> Tokenizer:
    write_merges(folder, chat_template=source)
    return Tokenizer(folder, "file", args)


def learnt(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Each answer as it is learnt: the ids before it, and its own."""
    found = []
    for tokens, _, _, mask in encode_conversation(tokenizer, messages):
        starts = [place for place in range(1, len(mask)) if mask[place] and not mask[place - 1]]
        for start in starts:
            end = next((place for place in range(start, len(mask)) if not mask[place]), len(mask))
            found.append((tokens[:start], tokens[start:end]))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", ["plain", "thoughts"])
def test_every_answer_is_learnt_behind_the_prompt_that_transformers_makes(tmp_path: Path, kind: str, said: str) -> None:
    source, args = KINDS[kind]
    if said == "thoughts" and args == {"enable_thinking": False}:
        pytest.skip("refused, below")
    messages = PLAIN if said == "plain" else THOUGHT
    if kind == "system merged":
        messages = [message("system", "Be brief."), *messages]
    tokenizer = opened(tmp_path, source, args)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    known = {name: value for name, value in args.items() if name != "strftime_now"}

    def ids(some: list[dict[str, str]], **more: object) -> list[int]:
        return theirs.apply_chat_template(some, return_dict=False, **known, **more)

    places = [place for place, each in enumerate(messages) if each["role"] == "assistant"]
    found = learnt(tokenizer, messages)
    assert [before for before, _ in found] == [ids(messages[:place], add_generation_prompt=True) for place in places]
    for (before, answer), place in zip(found, places, strict=True):
        content = messages[place]["content"]
        if kind.startswith("prompt opens"):  # the prompt has the opening, once
            content = content.removeprefix("<think>\n")
            assert tokenizer.decode(before).endswith("<think>\n")
        if kind in ("thoughts dropped", "prompt opens, thoughts dropped") and said == "plain":
            content = ids(messages[: place + 1])[len(before) :]  # what the template says of no thoughts
            assert answer == content[: len(answer)] and tokenizer.decode(content).startswith(tokenizer.decode(answer))
            continue
        assert answer == [*tokenizer.encode(content), tokenizer.eos_id]
        made = ids(messages[: place + 1])
        if "</think>" in tokenizer.decode(made) or said == "plain" and kind != "prompt opens":
            assert made[: len(before) + len(answer)] == before + answer  # nothing is in the template's words alone


def test_conversations_are_as_few_sequences_as_their_contexts_allow(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(encode_conversation(opened(tmp_path, CHATML + ASK), THOUGHT)) == 1
    found = encode_conversation(opened(tmp_path / "a", DROPPED), THOUGHT)
    assert [sum(each.answer_mask) > 0 and not each.answer_mask[0] for each in found] == [True, True]
    whole = encode_conversation(opened(tmp_path / "a", DROPPED), THOUGHT, "all")
    assert [each.answer_mask.count(False) for each in whole] == [1, 1]
    barred = [THOUGHT[0], THOUGHT[1] | {"weight": 0}, *THOUGHT[2:]]
    first, second = encode_conversation(opened(tmp_path / "a", DROPPED), barred, "all")
    assert first.answer_mask == [place > 0 and not own for place, own in enumerate(found[0].answer_mask)]
    assert second == found[1]  # its context holds the answer that is not to be learnt


BEGUN = "Easy.\n</think>\n\nIt is 2."


@pytest.mark.parametrize("source", [OPENED, BOTH])
@pytest.mark.parametrize("own", ["", "<think>\n", "<think>", " \n<think>\n"])
def test_a_prompt_that_opens_thoughts_has_the_opening_once(tmp_path: Path, source: str, own: str) -> None:
    tokenizer = opened(tmp_path, source)
    prompt = encode_prompt(tokenizer, "1+1?")
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    expected = [*prompt, *tokenizer.encode(BEGUN), tokenizer.eos_id]
    encoded = encode_response(tokenizer, "1+1?", own + BEGUN)
    assert (encoded.tokens, encoded.response_start) == (expected, len(prompt))
    assert encode_response(tokenizer, "1+1?", own + BEGUN, finished=False).tokens == expected[:-1]
    cut = encode_response(tokenizer, "1+1?", own + "Easy", finished=False)
    assert cut.tokens == [*prompt, *tokenizer.encode("Easy")]
    steps = encode_steps(tokenizer, "1+1?", [own + "Easy.\n</think>", "It is 2."], [1, 1])
    assert tokenizer.decode(steps.tokens) == tokenizer.decode(expected)
    begun = encode_response(tokenizer, "1+1?", "sy.\n</think>\n\nIt is 2.", prefix=own + "Ea")
    assert tokenizer.decode(begun.tokens) == tokenizer.decode(expected)
    assert encode_prompt(tokenizer, "1+1?", own + "Ea") == begun.tokens[: begun.response_start]


def test_an_answer_without_thoughts_stands_where_the_prompt_ends(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, OPENED)
    encoded = encode_response(tokenizer, "1+1?", "It is 2.")
    assert encoded.tokens[encoded.response_start :] == [*tokenizer.encode("It is 2."), tokenizer.eos_id]


@pytest.mark.parametrize("output", ["<think>\nEasy", "<think>", "<think>a</think>b</think>c"])
def test_thoughts_are_not_put_before_thoughts(tmp_path: Path, output: str) -> None:
    tokenizer = opened(tmp_path, DROPPED)
    encoded = encode_response(tokenizer, "1+1?", output, finished=False)
    assert encoded.tokens[encoded.response_start :] == tokenizer.encode(output)


def test_thoughts_where_the_prompt_has_ended_them_are_refused(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, DROPPED, {"enable_thinking": False})
    with pytest.raises(UserError, match="message 2 holds <think>, but chat template file ends thoughts before"):
        encode_conversation(tokenizer, THOUGHT)
    empty = encode_response(tokenizer, "1+1?", "<think>\n</think>\nIt is 2.")
    assert empty == encode_response(tokenizer, "1+1?", "It is 2.")


def test_thoughts_that_a_file_calls_special_are_text(tmp_path: Path) -> None:
    model = byte_level([*CONTROL, "<think>", "</think>"])
    model.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": OPENED})
    tokenizer = Tokenizer(tmp_path, "file")
    begin, end = (model.token_to_id(tag) for tag in ("<think>", "</think>"))
    encoded = encode_response(tokenizer, "1+1?", "<think>\na</think>b")
    assert encoded.tokens.count(begin) == encoded.tokens.count(end) == 1
    assert tokenizer.decode(encoded.tokens).endswith("assistant\n<think>\na</think>b")


@pytest.mark.parametrize(
    "text, args",
    [
        ("", {}),
        ("{}", {}),
        ('{"enable_thinking": false, "n": [1, null]}', {"enable_thinking": False, "n": [1, None]}),
        ("enable_thinking=false", {"enable_thinking": False}),
        ("a=True,b=False,c=None,d=none", {"a": True, "b": False, "c": None, "d": "none"}),
        ("a=1, b=x y,c=", {"a": 1, "b": "x y", "c": ""}),
        ("day=July 26, 2024,n=2.5", {"day": "July 26, 2024", "n": 2.5}),
    ],
)
def test_template_arguments_are_json_or_names_with_values(text: str, args: dict[str, object]) -> None:
    assert read_template_args(text) == args


@pytest.mark.parametrize("text", ["enable_thinking", "{", "a=1,a=2", "=1", "1a=2", "[1]", '{"a": 1, "a": 2}'])
def test_template_arguments_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--template_args"):
        read_template_args(text)


@pytest.mark.parametrize(
    "source, args, said",
    [
        (DROPPED, {"enable_thinkin": False}, "takes no 'enable_thinkin' .*what can be given is: enable_thinking"),
        (CHATML + ASK, {"x": 1}, "takes no 'x' .*what can be given is: none"),
        (DROPPED, {"messages": []}, "takes no 'messages'"),
        (CHATML + ASK, {"add_generation_prompt": True}, "takes no 'add_generation_prompt'"),
        (DATED + ASK, {}, "'strftime_now' is undefined; --template_args strftime_now=2024-07-26 says"),
        (DATED + ASK, {"strftime_now": "today"}, "chat template file: Invalid isoformat"),
    ],
)
def test_template_arguments_without_a_place_are_refused(
    tmp_path: Path, source: str, args: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        opened(tmp_path, source, args)


def test_arguments_need_a_template(tmp_path: Path) -> None:
    write_merges(tmp_path)
    for name in ("none", "code"):
        with pytest.raises(UserError, match=f"--template_args x: --chat_template {name} has no template"):
            Tokenizer(tmp_path, name, {"x": 1})


# Mistral's versions, told by what the vocabulary holds

SYSTEM, *CHAT = [message("system", "Be brief."), *PLAIN]
CONTROLS = {"v1": [], "v3": ["[INST]", "[/INST]"], "v7": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]}


@pytest.mark.parametrize("version", CONTROLS)
@pytest.mark.parametrize("has_system", [False, True])
def test_mistral_by_its_vocabulary(tmp_path: Path, version: str, has_system: bool) -> None:
    """Built by the rules of mistral-common's tokenizers: control ids, and texts with the vocabulary's own space."""
    path = write_sentencepiece(tmp_path, control_symbols=CONTROLS[version], vocab_size=430)
    tokenizer, pieces = Tokenizer(tmp_path, "mistral"), SentencePieceProcessor(model_file=str(path))
    begin, end, own, closed = (
        [pieces.piece_to_id(token)] for token in ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    )
    expected = [pieces.bos_id()]
    if has_system and version == "v7":
        expected += own + pieces.encode("Be brief.") + closed
    for place, (role, content) in enumerate(each.values() for each in CHAT):
        if has_system and (version, place) in (("v1", 0), ("v3", len(CHAT) - 1)):
            content = "Be brief.\n\n" + content
        if role == "assistant":
            expected += [*pieces.encode(content), pieces.eos_id()]
        else:
            text = pieces.encode(content)
            expected += pieces.encode(f"[INST] {content} [/INST]") if version == "v1" else begin + text + end
    messages = [SYSTEM, *CHAT] if has_system else CHAT
    assert tokenizer.encode_rendered(tokenizer.chat.prompt(messages)) == expected
    found = learnt(tokenizer, messages)
    assert [answer for _, answer in found] == [[*pieces.encode(t), pieces.eos_id()] for t in ("It is 2.", "So.")]
    assert len(encode_conversation(tokenizer, messages)) == 1 + (has_system and version == "v3")


@pytest.mark.parametrize("version", CONTROLS)
@pytest.mark.parametrize("reader", ["tokenizer.json", "LlamaTokenizer", "llama.cpp"])
def test_an_export_of_mistral_s_template_gives_the_ids_of_training(tmp_path: Path, version: str, reader: str) -> None:
    path = write_sentencepiece(tmp_path, control_symbols=CONTROLS[version], user_defined_symbols=[], vocab_size=430)
    if reader != "tokenizer.json":  # transformers' own class puts no space after control tokens
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(tmp_path / "tokenizer_config.json", names | {"tokenizer_class": "LlamaTokenizer"})
    tokenizer = Tokenizer(tmp_path, "mistral")
    expected = tokenizer.encode_rendered(tokenizer.chat.prompt([SYSTEM, *CHAT[:3]]))
    say_ends(tmp_path, "mistral", {}, for_llama_cpp=reader == "llama.cpp")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template([SYSTEM, *CHAT[:3]], tokenize=False, add_generation_prompt=True)
    if reader != "llama.cpp":
        assert theirs.encode(text, add_special_tokens=False) == expected
        return
    pieces, ids = SentencePieceProcessor(model_file=str(path)), []
    for part in re.split("|".join(map(re.escape, tokenizer.control)), text):  # it puts a space before each
        ids += pieces.encode(part)
    assert ids == [index for index in expected if index not in tokenizer.control.values()]


def test_mistral_without_the_vocabulary_s_space(tmp_path: Path) -> None:
    added = [{"content": token, "special": True} for token in CONTROLS["v7"]]
    decoder = {str(500 + place): token for place, token in enumerate(added)}
    write_tokenizer_json(tmp_path, added_tokens_decoder=decoder)
    tokenizer = Tokenizer(tmp_path, "mistral")
    assert tokenizer.chat.prompt([SYSTEM, *CHAT[:3]]) == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]1+1?[/INST]It is 2.</s>[INST]Why?[/INST]"
    )


# The folders of reports


@pytest.mark.parametrize("name", ["TK1_prompt_opens_think/r1", "TK1_prompt_opens_think/qwq"])
def test_tk1_prompts_that_open_thoughts(name: str) -> None:
    folder = shared(f"reports/{name}")
    tokenizer, theirs = Tokenizer(folder, "file"), PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = theirs.apply_chat_template(PLAIN[:1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, "1+1?") == prompt
    for own in ("", "<think>\n"):
        encoded = encode_response(tokenizer, "1+1?", own + BEGUN)
        assert encoded.tokens == [*prompt, *tokenizer.encode(BEGUN), tokenizer.eos_id]
    for messages in (PLAIN, THOUGHT):
        for place, (before, _) in zip((1, 3), learnt(tokenizer, messages), strict=True):
            assert before == theirs.apply_chat_template(
                messages[:place], add_generation_prompt=True, return_dict=False
            )


@pytest.mark.parametrize("args", [{}, {"enable_thinking": False}])
def test_tk2_turns_whose_thoughts_are_dropped_later(args: dict[str, object]) -> None:
    folder = shared("reports/TK2_qwen3_multi_turn/tokenizer")
    tokenizer, theirs = Tokenizer(folder, "file", args), PreTrainedTokenizerFast.from_pretrained(folder)
    messages = PLAIN if args else THOUGHT
    for place, (before, answer) in zip((1, 3), learnt(tokenizer, messages), strict=True):
        prompt = theirs.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False, **args)
        whole = theirs.apply_chat_template(messages[: place + 1], return_dict=False, **args)
        assert before == prompt and before + answer == whole[: len(before + answer)]
        assert answer[-1] == tokenizer.eos_id
    first, second = tokenizer.chat.turns(messages[:4])
    assert second.is_anew and not first.is_anew
