"""Vocabulary files of four kinds with one small interface: the only door to the tokenizer libraries.

The kind is read off the content: Llama 2 and Llama 3 both call their file tokenizer.model. Encoding here knows plain
text only; text/tokenizer.py puts control tokens (<s>, <|im_end|>, ...) around texts and keeps them out of texts.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from src.errors import UserError
from src.jsonfile import check_file, read_json


class Added(NamedTuple):
    """A token besides the pieces that merging makes. A control token never stands for text; the others do.

    eats_left, eats_right: white space next to the token belongs to it (Hugging Face's lstrip and rstrip).
    """

    id: int
    control: bool
    eats_left: bool = False
    eats_right: bool = False


# What the three classes of vocabularies have alike.
# size: ids are 0 .. size-1. added: the tokens that the file itself, or its published description, sets apart; encode()
# finds those of them that are not control tokens. renames: config files give other names to ids that are in the file
# (InternLM2's unused pieces, Llama 3's reserved tokens). bos, eos: the names that begin and end a sequence unless a
# config file says otherwise; None where the file does not tell. adds_bos: whether sequences begin with bos by default.
# stops: further tokens that end an answer. puts_space: a space is put before a sequence; after_control, after_added:
# and before what follows such a token in it. start: the text, or the ids, begin a sequence and do not continue one.


class SentencePiece:
    """Llama 1 and 2, Mistral, Gemma, InternLM2."""

    renames = True
    adds_bos = after_control = True
    after_added = False
    stops = ()
    # protobuf merges what is appended: normalizer_spec (field 3) { add_dummy_prefix (field 3): false,
    # remove_extra_whitespaces (field 4): false }; the latter would take the space before the first word away
    _GOES_ON = b"\x1a\x04\x18\x00\x20\x00"

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is no sentencepiece model."""
        content = path.read_bytes()
        try:
            self._model = SentencePieceProcessor(model_proto=content)
            self._continued = SentencePieceProcessor(model_proto=content + self._GOES_ON)
            pieces = [self._model.id_to_piece(index) for index in range(self._model.vocab_size())]
        except (RuntimeError, OSError, ValueError):
            raise UserError(f"{path} is no tokenizer: expected a sentencepiece model, a tiktoken file, tokenizer.json, "
                            "or vocab.json with merges.txt; it may be truncated") from None
        self.size = len(pieces)
        self.added = {piece: Added(index, control=True)
                      for index, piece in enumerate(pieces) if self._model.is_control(index)}
        self.bos, self.eos = (pieces[index] if index >= 0 else None
                              for index in (self._model.bos_id(), self._model.eos_id()))
        self.puts_space = self._model.encode("a") != self._continued.encode("a")

    def proto(self) -> ModelProto:
        """The file as a message, which says how pieces are made."""
        return ModelProto.FromString(self._model.serialized_model_proto())

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text."""
        return (self._model if start else self._continued).encode(text)

    def decode(self, ids: Sequence[int], *, start: bool) -> str:
        """The text of ids."""
        return (self._model if start else self._continued).decode(list(ids))

    def token_id(self, token: str) -> int | None:
        """The id of a piece; the unknown piece stands for nothing."""
        index = self._model.piece_to_id(token)
        return None if self._model.is_unknown(index) and token != self._model.id_to_piece(index) else index

    def spelling(self, index: int) -> str:
        """The piece of an id."""
        return self._model.id_to_piece(index)


class _Ranks(NamedTuple):
    """What a tiktoken file leaves out: how text is cut before merging, and the tokens after the last rank."""

    pattern: str
    nfc: bool
    control: tuple[str, ...]
    bos: str | None
    eos: str
    stops: tuple[str, ...]


# How the tokenizers of Llama 3, Qwen and others cut text before merging; {digits} says how many go together.
CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
       r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT_2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_RESERVED = tuple(f"<|reserved_special_token_{index}|>" for index in range(248))
_LLAMA_3 = _Ranks(
    pattern=CUT.format(digits="{1,3}"), nfc=False,
    # the names of Llama 3.1; Llama 3 has reserved ones for eom_id, python_tag and finetune_right_pad_id
    control=("<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:2], "<|finetune_right_pad_id|>", _RESERVED[2],
             "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *_RESERVED[3:]),
    bos="<|begin_of_text|>", eos="<|end_of_text|>", stops=("<|eot_id|>",),
)
_QWEN = _Ranks(
    pattern=CUT.format(digits=""), nfc=True,
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))),
    bos=None, eos="<|endoftext|>", stops=("<|im_end|>",),
)
# Known by their number of ranks: Meta's llama3/tokenizer.py and Qwen v1's tokenization_qwen.py hold the rest.
_TIKTOKEN = {128000: _LLAMA_3, 151643: _QWEN}


class Tiktoken:
    """Llama 3 (tokenizer.model) and Qwen v1 (qwen.tiktoken): lines of a base64 token and its rank.

    ranks: the id of each token's bytes, in order; pattern: how text is cut before merging; nfc: it is composed first.
    """

    renames = True
    puts_space = after_control = after_added = False

    def __init__(self, path: Path) -> None:
        """Raises UserError for a damaged file, or one whose pattern is not known."""
        ranks = _read_ranks(path)
        if len(ranks) not in _TIKTOKEN:
            raise UserError(f"{path} holds {len(ranks)} tiktoken ranks; known are {' and '.join(map(str, _TIKTOKEN))} "
                            "(Llama 3, Qwen v1), because the file does not tell how text is cut; give the "
                            "tokenizer.json instead")
        facts = _TIKTOKEN[len(ranks)]
        control = {token: len(ranks) + index for index, token in enumerate(facts.control)}
        self._encoding = tiktoken.Encoding(path.name, pat_str=facts.pattern, mergeable_ranks=ranks,
                                           special_tokens=control)
        self.ranks, self.pattern, self.nfc = ranks, facts.pattern, facts.nfc
        self.size: int = self._encoding.n_vocab
        self.added = {token: Added(index, control=True) for token, index in control.items()}
        self.bos, self.eos, self.stops = facts.bos, facts.eos, facts.stops
        self.adds_bos = facts.bos is not None

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode(self, ids: Sequence[int], *, start: bool) -> str:
        """The text of ids; bytes that form no character become U+FFFD."""
        return self._encoding.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        """The id of a control token."""
        return self.added[token].id if token in self.added else None

    def spelling(self, index: int) -> str:
        """The bytes of an id as text."""
        return self._encoding.decode([index])


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a tiktoken file, which are 0 .. n-1 and hold every byte. Raises UserError that names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            piece, index = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise UserError(f"{path}, line {number}: expected a base64 token and its rank; the file is "
                            "damaged") from None
        if piece in ranks or index != len(ranks):
            raise UserError(f"{path}, line {number}: found rank {index}, token {piece!r}; expected rank {len(ranks)} "
                            "and a token that did not stand before; the file is damaged")
        ranks[piece] = index
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} has no token for byte {missing[0]}; the file is damaged")
    return ranks


# Steps of a tokenizer.json that put a space before a text, or take it away again -> what they are without it
_SPACES = {"Prepend": {"prepend": ""}, "Metaspace": {"prepend_scheme": "never"}, "Strip": {"start": 0},
           "ByteLevel": {"add_prefix_space": False}}


def steps(step: dict[str, object] | None) -> list[dict[str, object]]:
    """The steps of a tokenizer.json's normalizer, pre-tokenizer or decoder."""
    if step is None or step["type"] != "Sequence":
        return [] if step is None else [step]
    parts = (part for key in ("normalizers", "pretokenizers", "decoders") for part in step.get(key, ()))
    return [inner for part in parts for inner in steps(part)]


class HfTokenizers:
    """A tokenizer.json, or vocab.json with merges.txt, run by the `tokenizers` library."""

    eos = None
    stops = ()
    renames = False

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        """Takes over a model of the library; from_json and from_merges open files."""
        model.no_truncation()  # a file may carry the settings of whoever saved it
        model.no_padding()
        model.encode_special_tokens = True  # text that spells a control token stays text
        self._model = self._continued = model
        self.added = {token.content: Added(index, token.special, token.lstrip, token.rstrip)
                      for index, token in model.get_added_tokens_decoder().items()}
        ids = model.get_vocab(with_added_tokens=True).values()
        self.size = max(ids) + 1
        text, sequence = model.encode("a", add_special_tokens=False).tokens, model.encode("a").tokens
        self.adds_bos = sequence[: len(text)] != text  # the file may put tokens around a sequence
        self.bos = sequence[0] if self.adds_bos else None
        self.puts_space = self.after_control = self.after_added = "".join(text).startswith(("▁", "Ġ"))
        if self.puts_space:
            document = json.loads(model.to_str())
            found = [each for key in ("normalizer", "pre_tokenizer", "decoder") for each in steps(document[key])]
            if any(step.get("prepend_scheme") == "first" for step in found):
                self.after_control = self.after_added = False
            for step in found:
                without = _SPACES.get(str(step["type"]), {})
                step |= {key: value for key, value in without.items() if key in step}
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(document))
            self._continued.encode_special_tokens = True

    @classmethod
    def from_json(cls, path: Path) -> "HfTokenizers":
        """Open a tokenizer.json. Raises UserError when it is damaged or two tokens share an id."""
        content = path.read_bytes()
        try:
            model = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as problem:
            raise UserError(f"{path} is no readable tokenizer.json ({problem})") from None
        _check_unique(path, model.get_vocab(with_added_tokens=True))
        return cls(model)

    @classmethod
    def from_merges(cls, path: Path, tokenizer_class: object) -> "HfTokenizers":
        """Open vocab.json and the merges.txt next to it (GPT-2's byte-level BPE).

        tokenizer_class, from tokenizer_config.json, tells how text is cut. Raises UserError for a damaged file, a
        merge of unknown pieces, or a class that is not known.
        """
        cut = _MERGES.get(str(tokenizer_class).removesuffix("Fast"))
        if cut is None:
            raise UserError(f"{path}: tokenizer_config.json beside it names tokenizer_class {tokenizer_class!r}; "
                            f"expected one of {', '.join(_MERGES)}, which tells how text is cut; or give the "
                            "tokenizer.json")
        vocab = read_json(path)
        for token, index in vocab.items():
            if type(index) is not int or index < 0:
                raise UserError(f"{path}: token {token!r} has id {index!r}; expected a whole number")
        _check_unique(path, vocab)
        missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys())
        if missing:
            raise UserError(f"{path} has no token for the byte {missing[0]!r}; expected byte-level BPE")
        return cls(byte_level_bpe(vocab, _read_merges(path.with_name("merges.txt"), vocab), cut))

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text."""
        return (self._model if start else self._continued).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, start: bool) -> str:
        """The text of ids."""
        return (self._model if start else self._continued).decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of a piece."""
        return self._model.token_to_id(token)

    def to_json(self) -> str:
        """The text of a tokenizer.json that does the same."""
        return self._model.to_str()

    def spelling(self, index: int) -> str:
        """The piece of an id; empty for one that the file leaves out."""
        return self._model.id_to_token(index) or ""


class PreTokenizer(NamedTuple):
    """How byte-level BPE cuts text before merging: by each pattern in turn; the pieces between its matches are kept.

    nfc: text is composed first. ignore_merges: a piece that is a token is not merged from bytes.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False


_MERGES = {"Qwen2Tokenizer": PreTokenizer((_QWEN.pattern,), nfc=True), "GPT2Tokenizer": PreTokenizer((GPT_2_CUT,))}


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], cut: PreTokenizer, control: Sequence[str] = (),
    user_defined: Sequence[str] = (), bos: str | None = None,
) -> tokenizers.Tokenizer:
    """GPT-2's kind of tokenizer. control, user_defined: tokens of the vocabulary that are not merged from bytes. bos:
    the one of them that is put before a sequence."""
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=cut.ignore_merges))
    if cut.nfc:
        model.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in cut.patterns]
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in user_defined])
    if bos is not None:
        model.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, vocab[bos])])
    return model


def _read_merges(path: Path, vocab: Mapping[str, object]) -> list[tuple[str, str]]:
    """The pairs of merges.txt in order. Raises UserError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; vocab.json alone does not say how pieces merge") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; the file is damaged") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or number == 1 and line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if any(piece not in vocab for piece in (left, right, left + right)):
            raise UserError(f"{path}, line {number}: {line[:60]!r} merges pieces that vocab.json does not have")
        merges.append((left, right))
    if not merges:
        raise UserError(f"{path} holds no merges; expected one pair of pieces a line")
    return merges


def _check_unique(path: Path, vocab: Mapping[str, object]) -> None:
    """Raise UserError when two tokens have one id, or there are none."""
    seen: dict[object, str] = {}
    for token, index in vocab.items():
        if index in seen:
            raise UserError(f"{path}: {seen[index]!r} and {token!r} both have id {index}; the file is damaged")
        seen[index] = token
    if not seen:
        raise UserError(f"{path} holds no tokens")


Vocabulary = SentencePiece | Tiktoken | HfTokenizers


def open_vocabulary(path: Path, tokenizer_class: object) -> Vocabulary:
    """Open a vocabulary file of any kind, recognised by its content. Raises UserError."""
    check_file(path)
    with path.open("rb") as file:
        head = file.read(1024)
    if head.lstrip().startswith(b"{"):
        is_whole = isinstance(read_json(path).get("model"), dict)
        return HfTokenizers.from_json(path) if is_whole else HfTokenizers.from_merges(path, tokenizer_class)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return Tiktoken(path)
    return SentencePiece(path)
