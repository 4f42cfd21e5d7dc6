"""A tokenizer's directory that says more than it came with: control tokens, the ends of responses, a template."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.errors import UserError
from src.jsonfile import read_json, write_json
from src.text.chat import BUILT_IN, find_source
from src.text.gguf_tokenizer import merges_of, spelled
from src.text.tokenizer import VOCABULARY_FILES, Tokenizer, read_config
from src.text.vocabulary import SentencePiece, Tiktoken

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"


def add_control_tokens(folder: Path, tokens: Sequence[str], source: Path) -> int:
    """Give the tokenizer in a folder control tokens after its vocabulary. -> the id of the first.

    They stand in tokenizer_config.json, where transformers finds them too. source: what the folder is a copy of.
    Raises UserError if one is there already.
    """
    tokenizer = Tokenizer(folder)
    known = [token for token in tokens if token in tokenizer.control]
    if known:
        raise UserError(f"{source}: the tokenizer has '{known[0]}' already; nothing is to be added")
    config = _config_of(folder)
    never = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    entries = {str(tokenizer.vocab_size + place): {"content": token, **never, "special": True}
               for place, token in enumerate(tokens)}
    config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | entries
    _write_config(folder, config)
    return tokenizer.vocab_size


def _config_of(folder: Path) -> dict[str, object]:
    """tokenizer_config.json as it stands there; empty where it does not."""
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _write_config(folder: Path, config: Mapping[str, object]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say_ends(
    folder: Path, chat_template: str, ids: Mapping[str, object],
    template_args: Mapping[str, object] | None = None, system_prompt: str = "", *, for_llama_cpp: bool = False,
) -> dict[str, object]:
    """Write what ends a response, and the template of training, where transformers looks for them.

    generation_config.json lists the ids of ends: those that it or, where it says none, the config (`ids`: bos_token_id,
    eos_token_id, pad_token_id) had, and those of training. chat_template and the rest: as in ModelConfig, empty where
    nothing was trained here; a built-in one becomes chat_template.jinja, and so does one with arguments or a system
    prompt, which it then holds as defaults. Whoever reads it, transformers or for_llama_cpp, may put a space after
    control tokens, which a built-in template then leaves out. -> the ids that the config is to have.
    """
    path = folder / GENERATION
    tokenizer, ids = None, dict(ids)
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        try:
            tokenizer = Tokenizer(folder, chat_template or "none", template_args, system_prompt)
        except UserError:  # what nothing here has trained with need not be understood
            if chat_template:
                raise
    named = _config_of(folder).get("tokenizer_class")
    if tokenizer and not named and isinstance(tokenizer.vocabulary, SentencePiece | Tiktoken):
        _name_class(folder, tokenizer)
    said = read_json(path) if path.is_file() else {}
    of_config = said.get("eos_token_id") is None
    ends = (ids if of_config else said).get("eos_token_id")
    said = said if path.is_file() else ids
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer and of_config:  # it may name ids that no text can hold, such as -1
        ends = [end for end in ends if 0 <= end < tokenizer.vocab_size]
    if tokenizer and (chat_template or not ends):
        if not ids:  # Meta's files name none
            ids["bos_token_id"] = tokenizer.bos_id
        missing = tokenizer.stop_ids - {*ends, tokenizer.eos_id}
        ends = [tokenizer.eos_id, *(end for end in ends if end != tokenizer.eos_id), *sorted(missing)]
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if ends:
        said = said | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        write_json(path, said)
    if tokenizer and tokenizer.chat and (chat_template in BUILT_IN or template_args or system_prompt):
        defaults = "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n"
            for name, value in tokenizer.template_args.items()
            if name != "strftime_now"  # transformers has today's
        )
        if system_prompt:
            first = {"role": "system", "content": system_prompt}
            defaults += "{% if not messages or messages[0]['role'] != 'system' %}"
            defaults += f"{{% set messages = [{first!r}] + messages %}}{{% endif %}}\n"
        source = tokenizer.chat.source
        if chat_template in BUILT_IN and _gets_space(folder, tokenizer, for_llama_cpp):
            source = find_source(chat_template, folder, tokenizer.control, gets_space=True)
        (folder / "chat_template.jinja").write_text(defaults + source, encoding="utf-8")
    return ids


def _gets_space(folder: Path, tokenizer: Tokenizer, for_llama_cpp: bool) -> bool:
    """Whether llama.cpp, or else transformers, puts a space after control tokens of this tokenizer by itself; of
    transformers' classes those do that take tokenizer.json as it is."""
    vocabulary = tokenizer.vocabulary
    if vocabulary.puts_space and not for_llama_cpp:
        as_it_is = _config_of(folder).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        if not as_it_is or not (folder / "tokenizer.json").is_file():
            return False
        vocabulary = Tokenizer(folder / "tokenizer.json").vocabulary
    return vocabulary.puts_space and vocabulary.after_control


def _name_class(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer.json of a sentencepiece or tiktoken file that came without a class, and that it is to be
    opened. By itself transformers would take the one for another kind, and give texts without BOS and without the space
    before their first word, and the other without control tokens."""
    model, said = tokenizer.vocabulary, read_config(folder)
    ends = {"bos_token": model.bos, "eos_token": model.eos}
    config = {name: token for name, token in ends.items() if token and name not in said} | _config_of(folder)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_config(folder, config)
    names = {facts.id: token for token, facts in tokenizer.added.items()}
    names |= {index: token for token, index in tokenizer.control.items()}
    never = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = [{"id": index, "content": token, **never, "special": token in tokenizer.control}
             for index, token in sorted(names.items())]
    parts = _parts_of_pieces(model, names) if isinstance(model, SentencePiece) else _parts_of_ranks(model, names)
    begin = None if tokenizer.bos_id is None else _begin_with(names[tokenizer.bos_id], tokenizer.bos_id)
    whole = {"version": "1.0", "added_tokens": added, "post_processor": begin} | parts
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def _begin_with(token: str, index: int) -> dict[str, object]:
    """The step of a tokenizer.json that puts a token before a sequence."""
    begin, first, second = ({"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                            {"Sequence": {"id": "B", "type_id": 1}})
    return {"type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, second],
            "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}}}


def _parts_of_ranks(model: Tiktoken, names: Mapping[int, str]) -> dict[str, object]:
    """The parts of a tokenizer.json that differ by kind, of a tiktoken file. names: other tokens by id."""
    vocab = {spelled(token): rank for token, rank in model.ranks.items()} | {text: at for at, text in names.items()}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(model.ranks)]
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": model.pattern}, "behavior": "Isolated", "invert": False}
    return {"normalizer": {"type": "NFC"} if model.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, in_bytes]}, "decoder": in_bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}}


def _parts_of_pieces(model: SentencePiece, names: Mapping[int, str]) -> dict[str, object]:
    """_parts_of_ranks() of a sentencepiece model. Pieces merge by score; where a space is put before a text, it is put
    after control tokens too, as Meta's code does, but not after user-defined pieces, which are only cut out."""
    proto = model.proto()
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    pieces = {index: one for index, one in enumerate(proto.pieces) if index not in names}
    texts = {index: one.piece for index, one in pieces.items()} | names
    vocab = {text: index for index, text in texts.items()}
    steps: list[dict[str, object]] = []
    if normal.precompiled_charsmap:
        charsmap = base64.b64encode(normal.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normal.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if normal.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append(_replace({"String": " "}, "▁"))
    apart = sorted((one.piece for one in pieces.values() if one.type == one.USER_DEFINED), key=len, reverse=True)
    pattern = "|".join(map(re.escape, apart))
    back = [_replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normal.add_dummy_prefix else []
    if spec.model_type == spec.UNIGRAM:
        table = [(texts.get(index, f"[PAD{index}]"), pieces[index].score if index in pieces else -1000.0)
                 for index in range(max(texts) + 1)]
        kind: dict[str, object] = {"type": "Unigram", "unk_id": spec.unk_id, "vocab": table}
    else:
        scores = {one.piece: one.score for one in pieces.values() if one.type == one.NORMAL}
        halves = ((whole, whole[:at], whole[at:]) for whole in scores for at in range(1, len(whole)))
        pairs = [(-scores[whole], -len(left), vocab[whole], left, right) for whole, left, right in halves
                 if left in scores and right in scores]
        kind = {"type": "BPE", "unk_token": texts[spec.unk_id], "fuse_unk": True, "vocab": vocab,
                "merges": [pair[3:] for pair in sorted(pairs)], "ignore_merges": bool(apart)}
    return {"normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            if apart else None,
            "decoder": {"type": "Sequence", "decoders": back}, "model": kind | {"byte_fallback": spec.byte_fallback}}


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}
