"""Vocabularies that put a space before a text: where a text goes on from another one, and after control tokens, the ids
are those that transformers makes of the same files."""

from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.data.encoding import encode_conversation, encode_prompt, encode_response, encode_steps
from src.errors import UserError
from src.inference.engine import vocabulary_of
from src.text.blocks import CODE_FORM, Marker
from src.text.extend import add_control_tokens
from src.text.tokenizer import Tokenizer
from tests.text.files import (
    CONTROL,
    CORPUS,
    write_json,
    write_merges,
    write_sentencepiece,
    write_tokenizer_json,
)

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MESSAGES = [
    {"role": role, "content": content}
    for role, content in (
        ("user", "1+1?"), ("assistant", "It is 2."), ("user", "Why? "), ("assistant", "  So.\n\nBe it."), ("user", "!")
    )
]
_SPACED = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
Parts = tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer | None, decoders.Decoder]
KINDS: dict[str, Parts] = {
    **{
        scheme: (None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), _SPACED)
        for scheme in ("always", "first")
    },
    "in words": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always")),
    "prepended": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, _SPACED),
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
}


def write_spaced(folder: Path, kind: str, **config: object) -> Tokenizer:
    """A trained tokenizer.json of one of KINDS, opened with ChatML."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "byte level"))
    model.normalizer, model.pre_tokenizer, model.decoder = KINDS[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte level" else ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*CONTROL, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS[:2] + ["It is. So. Be it. 1+1? Why!"], trainer)
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": CHATML} | config)
    return Tokenizer(folder, "file")


def theirs(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte level"])  # of which a text keeps the space
def test_a_solution_with_code_reads_as_it_was_written(tmp_path: Path, kind: str) -> None:
    write_spaced(tmp_path, kind)
    add_control_tokens(tmp_path, list(Marker), tmp_path)
    tokenizer = Tokenizer(tmp_path, CODE_FORM)
    parts = [Marker.CODE, "So = 1", Marker.END_OF_BLOCK, Marker.EXECUTION, "1\n", Marker.END_OF_BLOCK]
    ids = [index for piece in tokenizer.encode_pieces(parts) for index in piece]
    assert tokenizer.decode_pieces(ids) == parts
    assert vocabulary_of(tokenizer).decode(ids) == "".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    tokenizer, library = write_spaced(tmp_path, kind), theirs(tmp_path)
    whole = library.apply_chat_template(MESSAGES[:4], return_dict=False)
    (found,) = encode_conversation(tokenizer, MESSAGES)
    assert found.tokens == whole[: len(found.tokens)] and len(whole) - len(found.tokens) <= 2  # the last line's end
    prompt = library.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, "1+1?") == prompt
    answer = encode_response(tokenizer, "1+1?", "It is 2.")
    assert answer.tokens == found.tokens[: len(answer.tokens)] and answer.response_start == len(prompt)
    begun = encode_response(tokenizer, "1+1?", " 2.", prefix="It is")
    assert begun.tokens == answer.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_goes_on_begins_without_a_space(tmp_path: Path, kind: str) -> None:
    tokenizer = write_spaced(tmp_path, kind)
    text = "It is 2.\n\nSo it is.\n\nBe it 1"
    for place in (2, 8, 9, 10, 12, len(text) - 1):
        ids = tokenizer.encode(text[:place]) + tokenizer.encode(text[place:], start=False)
        assert tokenizer.decode(ids).removeprefix(" ") == text, place  # ByteLevel gives the space it put back
    steps = text.split("\n\n")
    for own in (tokenizer, Tokenizer(tmp_path)):
        found = encode_steps(own, "1+1?", steps, [1.0] * 3)
        assert own.decode(found.tokens[found.response_start :]).removeprefix(" ") == text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_config_files_add_have_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    size = write_spaced(tmp_path, kind).vocab_size
    # normalised, it would be "▁<think>" where the space is prepended, which stands before no other word
    facts = {"content": "<think>", "special": False, "normalized": False}
    eats = facts | {"content": "</think>", "lstrip": True, "rstrip": True}
    tokenizer = write_spaced(tmp_path, kind, added_tokens_decoder={str(size): facts, str(size + 1): eats})
    library = theirs(tmp_path)
    for text in ("It<think>is", "<think>is", "It<think>", "It<think>\nis<think>2"):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(tokenizer.encode(text)).removeprefix(" ") in (text, text.replace("<think>", "<think> "))
    for text in ("It </think>\n\nis", " </think>", "<think> </think>2", "It\n</think></think> is"):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False), text
    begun = tokenizer.encode("It<think>")
    rest = tokenizer.encode_rendered("is", start=tokenizer.begins_after(begun))
    assert begun + rest == tokenizer.encode("It<think>is")


def test_an_answer_goes_on_from_the_words_of_its_prompt_in_sentencepiece(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": CHATML})
    pieces = SentencePieceProcessor(model_file=str(write_sentencepiece(tmp_path, control_symbols=CONTROL[2:4],
                                                                       user_defined_symbols=[])))
    begin, end = (pieces.piece_to_id(token) for token in CONTROL[2:4])
    user = [begin, *pieces.encode("user\n1+1?"), end, *pieces.encode("\n")]
    found = encode_response(Tokenizer(tmp_path, "file"), "1+1?", "It is 2.")
    assert found.tokens == [*user, begin, *pieces.encode("assistant\nIt is 2."), end]
    assert found.response_start == len(user) + 1 + len(pieces.encode("assistant\n"))


@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"}])
def test_a_text_of_sentencepiece_goes_on_with_its_own_space(tmp_path: Path, options: dict[str, object]) -> None:
    tokenizer, text = Tokenizer(write_sentencepiece(tmp_path, **options)), "So. What is 12 a"
    for place in (2, 3, 5, 8, 11, 14):
        assert tokenizer.decode(tokenizer.encode(text[:place]) + tokenizer.encode(text[place:], start=False)) == text


@pytest.mark.parametrize("said", [True, False])
def test_a_config_that_says_otherwise_of_the_space_is_refused(tmp_path: Path, said: bool) -> None:
    for name, puts_space in (("tokenizer.model", True), ("tokenizer.json", False), ("vocab.json", False)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"add_prefix_space": said}
        if name == "tokenizer.model":
            write_sentencepiece(folder)
            write_json(folder / "tokenizer_config.json", config)
        elif name == "tokenizer.json":
            write_tokenizer_json(folder, **config)
        else:
            write_merges(folder, "GPT2Tokenizer", **config)
        if said == puts_space:
            assert Tokenizer(folder).vocabulary.puts_space == said
            continue
        with pytest.raises(UserError, match=f"add_prefix_space={said}, but {name} puts {'no' if said else 'a'} space"):
            Tokenizer(folder)


def test_an_added_token_that_must_stand_alone_is_refused(tmp_path: Path) -> None:
    write_merges(tmp_path, added_tokens_decoder={"400": {"content": "tool", "single_word": True}}, eos_token="Ġ")
    with pytest.raises(UserError, match="token 'tool' is a single_word, which is implemented for tokenizer.json alone"):
        Tokenizer(tmp_path)
