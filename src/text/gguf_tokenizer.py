"""The tokenizer in a GGUF file's metadata as the files that Tokenizer and transformers open, and back.

llama.cpp knows two kinds that our families have: "gpt2", byte-level BPE whose pre-tokenizer it knows by name, and
"llama", sentencepiece's BPE by scores.
"""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from src.errors import UserError
from src.jsonfile import parse, write_json
from src.text.chat import find_source
from src.text.tokenizer import Tokenizer, read_config, read_stops
from src.text.vocabulary import CUT, GPT_2_CUT, PreTokenizer, SentencePiece, Tiktoken, byte_level_bpe, steps

_SPACE = "▁"  # what sentencepiece writes for one
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # its types of pieces


class _Token(NamedTuple):
    """What the metadata says of an id; types are sentencepiece's."""

    text: str
    kind: int
    score: float = -1000.0  # of what is never made by merging


_DIGIT, _CJK = r"\p{N}", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_LETTERS = (  # of DeepSeek LLM
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Pre-tokenizers by tokenizer.ggml.pre, as the released tokenizer.json files of these models have them.
_CUTS: dict[str, PreTokenizer] = {
    "llama-bpe": PreTokenizer((CUT.format(digits="{1,3}"),), ignore_merges=True),
    "qwen2": PreTokenizer((CUT.format(digits=""),), nfc=True),
    "gpt-2": PreTokenizer((GPT_2_CUT,)),
    "smollm": PreTokenizer((_DIGIT, GPT_2_CUT)),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
    "deepseek-llm": PreTokenizer(("[\r\n]", rf"\s?[{_LETTERS}]+", _MARKS, r"\s+$", _CJK, _DIGIT)),
    "tekken": PreTokenizer((rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
                            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), ignore_merges=True),
}
_ADDS_BOS = ("llama-bpe", "tekken")  # where the file does not say
_ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_G = "tokenizer.ggml."
_KEYS = {"model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token",
         "add_space_prefix", "remove_extra_whitespaces"}
_IDS = {"bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "cls"}  # in llama.cpp's spelling
_ENDS = ("eos", "eot", "eom")  # llama.cpp ends a response at each of them
_UNREAD = {"token_type_count", "add_sep_token"} | {f"{name}_token_id" for name in (
    "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle")}


class _Said:
    """The tokenizer's keys of a file, each with the type that it must have. Raises UserError that names the key."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self.values = {key.removeprefix(_G): value for key, value in metadata.items() if key.startswith(_G)}
        self.source = source
        for key in self.values.keys() - _KEYS - _UNREAD - {f"{name}_token_id" for name in _IDS}:
            raise UserError(f"{source}: {_G}{key} is not implemented")

    def get(self, key: str, default: object, kind: type) -> object:
        """A value, or the default."""
        value = self.values.get(key, default)
        if value is not None and type(value) is not kind:
            raise UserError(f"{self.source}: {_G}{key}={str(value)[:100]!r}; expected a {kind.__name__}")
        return value

    def array(self, key: str, kind: type, n: int | None = None, default: object = None) -> list:
        """A list with values of one type, n of them."""
        values = self.get(key, default, list)
        if values is None:
            raise UserError(f"{self.source}: key '{_G}{key}' is missing")
        if any(type(value) is not kind for value in values):
            raise UserError(f"{self.source}: {_G}{key} holds other values than {kind.__name__}")
        if n is not None and len(values) != n:
            raise UserError(f"{self.source}: {_G}{key} has {len(values)} entries for {n} tokens")
        return values


def write_tokenizer(metadata: Mapping[str, object], folder: Path, n_rows: int, source: str) -> None:
    """Write the tokenizer of a GGUF file whose embedding has n_rows; nothing where it has none. Raises UserError for a
    kind, a pre-tokenizer or a key that is not implemented, and for damaged values."""
    said = _Said(metadata, source)
    model = said.get("model", None, str)
    if model is None and not said.values:
        return
    if model not in ("gpt2", "llama"):
        raise UserError(f"{source}: {_G}model={model!r} is not implemented; expected 'gpt2' or 'llama', or another "
                        "tokenizer with --tokenizer_file")
    tokens = said.array("tokens", str)
    if len(tokens) > n_rows or len(set(tokens)) < len(tokens):
        what = "some twice" if len(tokens) <= n_rows else f"for {n_rows} rows of the embedding"
        raise UserError(f"{source}: {_G}tokens names {len(tokens)} tokens, {what}; the file is damaged")
    types = said.array("token_type", int, len(tokens), [NORMAL] * len(tokens))  # sentencepiece's, or 0
    for index in (index for index, kind in enumerate(types) if not 0 <= kind <= BYTE):
        raise UserError(f"{source}: {_G}token_type of token {index} is {types[index]}; expected 0 to {BYTE}")
    default = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {name: said.get(f"{name}_token_id", default.get(name), int) for name in _IDS}
    for name, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f"{source}: {_G}{name}_token_id={index} is none of {len(tokens)} tokens")
    if model == "gpt2":
        pre = said.get("pre", None, str)
        if (pre := _ALSO.get(pre, pre)) not in _CUTS:
            raise UserError(f"{source}: {_G}pre={pre!r} is not implemented; expected one of "
                            f"{', '.join([*_CUTS, *_ALSO])}, or another tokenizer with --tokenizer_file")
        adds_bos = said.get("add_bos_token", pre in _ADDS_BOS, bool) and ids["bos"] is not None
        text = _byte_level(said, tokens, types, _CUTS[pre], tokens[ids["bos"]] if adds_bos else None)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        adds_bos = said.get("add_bos_token", True, bool)
        (folder / "tokenizer.model").write_bytes(_sentencepiece(said, tokens, types, ids))
    config: dict[str, object] = {
        "add_bos_token": adds_bos, "add_eos_token": said.get("add_eos_token", False, bool),
        "clean_up_tokenization_spaces": False}
    if model == "gpt2":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # of the other an export has a tokenizer.json that is one
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named_ids = {key: ids[name] for key, name in named.items() if ids[name] is not None}
    # sentencepiece knows its own; a name would make it a control token, which is not shown
    config |= {key: tokens[index] for key, index in named_ids.items() if types[index] != UNKNOWN}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", special_ids(ids))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    try:
        Tokenizer(folder)
    except UserError as problem:
        raise UserError(f"{source}: its tokenizer does not open ({problem})") from None


def special_ids(ids: Mapping[str, int | None]) -> dict[str, object]:
    """Ids by llama.cpp's names as a config.json says them; what may end a response is one id or several."""
    ends = list(dict.fromkeys(ids[name] for name in _ENDS if ids[name] is not None))
    said = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    said["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {key: value for key, value in said.items() if value is not None}


def _byte_level(said: _Said, tokens: list[str], types: list[int], cut: PreTokenizer, bos: str | None) -> str:
    """The contents of a tokenizer.json. bos: the token that is put before a sequence."""
    vocab = {token: index for index, token in enumerate(tokens) if not _is_padding(token, index, types[index])}
    merges = [tuple(merge.split(" ")) for merge in said.array("merges", str)]
    for pair in merges:
        if len(pair) != 2 or any(piece not in vocab for piece in (*pair, "".join(pair))):
            raise UserError(f"{said.source}: {_G}merges has {' '.join(pair)[:60]!r}, no two tokens that make one")
    control, user_defined = ([tokens[index] for index, kind in enumerate(types) if kind == wanted]
                             for wanted in (CONTROL, USER_DEFINED))
    return byte_level_bpe(vocab, merges, cut, control, user_defined, bos).to_str()


def _is_padding(token: str, index: int, kind: int) -> bool:
    """Whether a token stands for a row of the embedding that no text uses, as converters name them."""
    return kind == UNUSED and token == f"[PAD{index}]"


def _sentencepiece(said: _Said, tokens: list[str], types: list[int], ids: Mapping[str, int | None]) -> bytes:
    """The bytes of a sentencepiece model."""
    if said.get("remove_extra_whitespaces", False, bool):
        raise UserError(f"{said.source}: {_G}remove_extra_whitespaces=true is not implemented")
    scores = said.array("scores", float, len(tokens))
    n = len(tokens)
    while n and _is_padding(tokens[n - 1], n - 1, types[n - 1]) and n - 1 not in ids.values():
        n -= 1
    proto = ModelProto()
    for text, score, kind in zip(tokens[:n], scores, types, strict=False):
        # llama.cpp looks for user-defined tokens in plain text, sentencepiece where spaces are escaped
        text = text.replace(" ", _SPACE) if kind == USER_DEFINED else text
        proto.pieces.add(piece=text, score=score, type=kind or NORMAL)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = TrainerSpec.BPE, n, BYTE in types[:n]
    for name, field in (("unknown", "unk"), ("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        setattr(trainer, f"{field}_id", -1 if ids[name] is None else ids[name])
        if ids[name] is not None:
            setattr(trainer, f"{field}_piece", proto.pieces[ids[name]].piece)
    normalizer.name, normalizer.add_dummy_prefix = "identity", said.get("add_space_prefix", True, bool)
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return proto.SerializeToString(deterministic=True)


def tokenizer_metadata(folder: Path, n_rows: int) -> dict[str, object]:
    """What a GGUF file says of the tokenizer in a directory, of a model whose embedding has n_rows.

    Ends of a response are those of generation_config.json, the tokenizer's own first. Raises UserError for a tokenizer
    that llama.cpp has no form for.
    """
    tokenizer = Tokenizer(folder)
    config = read_config(folder)
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, SentencePiece):
        metadata, tokens = _from_sentencepiece(tokenizer.path.read_bytes(), str(tokenizer.path))
    elif isinstance(vocabulary, Tiktoken):
        metadata, tokens = _from_ranks(vocabulary)
    else:
        document = parse(vocabulary.to_json(), str(tokenizer.path))
        if (kind := document["model"]["type"]) != "BPE":
            raise UserError(f"{tokenizer.path}: a model of type {kind} has no form in a GGUF file; expected BPE")
        convert = _from_merged if document["model"].get("byte_fallback") else _from_byte_level
        metadata, tokens = convert(document, str(tokenizer.path))
    is_spm = metadata[f"{_G}model"] == "llama"
    control = tokenizer.control.items()
    apart = {facts.id: (text, USER_DEFINED) for text, facts in tokenizer.added.items() if not facts.control}
    for index, (text, kind) in (apart | {index: (text, CONTROL) for text, index in control}).items():
        known = tokens.get(index, _Token("", NORMAL))
        if known.kind != UNKNOWN:  # sentencepiece has no text for it, whatever config files say
            plain = text.replace(_SPACE, " ") if is_spm and kind == USER_DEFINED else text
            tokens[index] = _Token(plain, kind, known.score)
    if max(tokens) >= n_rows:
        raise UserError(f"{tokenizer.path} has token {max(tokens)}, but the model has {n_rows} rows: it is of another")
    table = [tokens.get(index, _Token(f"[PAD{index}]", UNUSED)) for index in range(n_rows)]
    metadata[f"{_G}tokens"] = [token.text for token in table]
    metadata[f"{_G}token_type"] = [token.kind for token in table]
    if is_spm:
        metadata[f"{_G}scores"] = [token.score for token in table]
    for key, name in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        text = config.get(key, vocabulary.bos if name == "bos" else None)
        index = tokenizer.control.get(text, vocabulary.token_id(text)) if isinstance(text, str) else None
        if index is not None:
            metadata[f"{_G}{name}_token_id"] = index
    ends = dict.fromkeys([tokenizer.eos_id, *read_stops(folder, tokenizer.vocab_size), *sorted(tokenizer.stop_ids)])
    if len(ends) > len(_ENDS):
        raise UserError(f"{folder} ends responses at {len(ends)} tokens, {list(ends)}; a GGUF file has room for "
                        f"{len(_ENDS)}")
    metadata |= {f"{_G}{name}_token_id": index for name, index in zip(_ENDS, ends, strict=False)}
    metadata[f"{_G}add_bos_token"] = tokenizer.bos_id is not None
    metadata[f"{_G}add_eos_token"] = False
    with contextlib.suppress(UserError):  # there is none
        metadata["tokenizer.chat_template"] = find_source("file", folder)
    return metadata


def spaces_apart(folder: Path) -> str:
    """Which spaces llama.cpp puts otherwise than the tokenizer in a directory; empty where it puts the same."""
    vocabulary = Tokenizer(folder).vocabulary
    if isinstance(vocabulary, SentencePiece | Tiktoken):
        return ""
    for step in steps(parse(vocabulary.to_json(), str(folder))["pre_tokenizer"]):
        if step.get("prepend_scheme") == "first":
            return ("puts a space before a text but none after a control token; llama.cpp does both or, as the file "
                    "says, neither: chats have the same ids there, a plain prompt needs a space before it")
        if step.get("prepend_scheme") == "always":
            return ("puts no space before a text that begins with one, and llama.cpp does: there what begins with a "
                    "space, at first or after a control token, has other ids")
    return ""


def _from_sentencepiece(model: bytes, source: str) -> tuple[dict[str, object], dict[int, _Token]]:
    """Metadata and tokens of a sentencepiece model."""
    proto = ModelProto.FromString(model)
    kind, normal = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (TrainerSpec.BPE, TrainerSpec.CHAR):  # one of single characters merges nothing
        raise UserError(f"{source}: a sentencepiece model of type {kind} has no form in a GGUF file")
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        what = "a table that replaces characters" if normal.precompiled_charsmap else "the removal of repeated spaces"
        raise UserError(f"{source}: its normalizer has {what}, which llama.cpp does not apply")
    tokens = {index: _Token(one.piece.replace(_SPACE, " ") if one.type == USER_DEFINED else one.piece, one.type,
                            one.score) for index, one in enumerate(proto.pieces)}
    return {f"{_G}model": "llama", f"{_G}pre": "default", f"{_G}add_space_prefix": normal.add_dummy_prefix}, tokens


# Printable bytes stand for themselves in GPT-2's letters for bytes, the others for the characters from 256 on.
_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_OF_BYTES = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + at) for at, byte in enumerate(_HIDDEN)}


def spelled(token: bytes) -> str:
    """A token as byte-level BPE writes it."""
    return "".join(_OF_BYTES[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token, by rank: what lower ranks make of its bytes. A token of which they leave more than
    two parts has none: only a whole piece of text becomes it."""
    merges = []
    for token, rank in ranks.items():
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            if min(pairs) >= rank:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _from_ranks(vocabulary: Tiktoken) -> tuple[dict[str, object], dict[int, _Token]]:
    """Metadata and tokens of a tiktoken file."""
    (pre,) = (name for name, cut in _CUTS.items() if cut.patterns == (vocabulary.pattern,))
    merges = [f"{spelled(left)} {spelled(right)}" for left, right in merges_of(vocabulary.ranks)]
    tokens = {rank: _Token(spelled(token), NORMAL) for token, rank in vocabulary.ranks.items()}
    return {f"{_G}model": "gpt2", f"{_G}pre": pre, f"{_G}merges": merges}, tokens


def _from_byte_level(document: Mapping[str, object], source: str) -> tuple[dict[str, object], dict[int, _Token]]:
    """Metadata and tokens of a tokenizer.json with byte-level BPE, whose pre-tokenizer llama.cpp knows by name."""
    patterns: list[str] = []
    for step in steps(document["pre_tokenizer"]):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits":
            patterns.append(_DIGIT if step["individual_digits"] else rf"{_DIGIT}+")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT_2_CUT] if step["use_regex"] else []
        else:
            raise UserError(f"{source}: its pre-tokenizer's step {kind} has no form in a GGUF file")
    model, normal = document["model"], [step["type"] for step in steps(document["normalizer"])]
    names = [name for name, cut in _CUTS.items()
             if (cut.patterns, cut.ignore_merges) == (tuple(patterns), model["ignore_merges"])
             and (not normal or cut.nfc and normal == ["NFC"])]
    if not names:
        raise UserError(f"{source}: llama.cpp has no pre-tokenizer that cuts text as it does ({normal + patterns})")
    metadata = {f"{_G}model": "gpt2", f"{_G}pre": names[0]}
    metadata[f"{_G}merges"] = [" ".join(pair) for pair in model["merges"]]
    return metadata, {index: _Token(text, NORMAL) for text, index in model["vocab"].items()}


def _from_merged(document: Mapping[str, object], source: str) -> tuple[dict[str, object], dict[int, _Token]]:
    """Metadata and tokens of a tokenizer.json made of a sentencepiece model: scores are the ranks of its merges."""
    model = document["model"]
    found = [*steps(document["normalizer"]), *steps(document["pre_tokenizer"])]
    kinds = {step["type"] for step in found}
    of_space = {"String": " "}
    in_words = not any(_SPACE in "".join(pair)[1:] for pair in model["merges"])  # cuts before spaces change nothing
    for step in found:
        is_known = {
            "Prepend": step.get("prepend") == _SPACE,
            "Replace": step.get("pattern") == of_space and step.get("content") == _SPACE,
            "Metaspace": step.get("replacement") == _SPACE and (in_words or not step.get("split")),
            "Split": "Replace" in kinds and step.get("pattern") == of_space and not step.get("invert"),  # Gemma's
        }
        if not is_known.get(str(step["type"])):
            raise UserError(f"{source}: its step {str(step)[:100]} has no form in a GGUF file")
    if not kinds & {"Replace", "Metaspace"}:
        raise UserError(f"{source}: it keeps spaces, which llama.cpp replaces with {_SPACE}")
    if model["ignore_merges"]:
        raise UserError(f"{source}: its model's ignore_merges=true has no form in a GGUF file with byte_fallback")
    # a prefix of llama.cpp stands after every control token, as that of "first" does not
    prefix = "Prepend" in kinds or any(step.get("prepend_scheme") == "always" for step in found)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    tokens: dict[int, _Token] = {}
    for text, index in model["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = UNKNOWN if text == model["unk_token"] else BYTE if is_byte else NORMAL
        tokens[index] = _Token(text, kind, float(-ranks.get(text, len(ranks))))
    return {f"{_G}model": "llama", f"{_G}pre": "default", f"{_G}add_space_prefix": prefix}, tokens
