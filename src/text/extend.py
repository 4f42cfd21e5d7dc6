"""A tokenizer's directory that says more than it came with: control tokens, the ends of responses, a template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.errors import UserError
from src.jsonfile import read_json, write_json
from src.text.chat import BUILT_IN
from src.text.gguf_tokenizer import merges_of, spelled
from src.text.tokenizer import VOCABULARY_FILES, Tokenizer, read_config
from src.text.vocabulary import PreTokenizer, SentencePiece, Tiktoken, byte_level_bpe

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
    template_args: Mapping[str, object] | None = None, system_prompt: str = "",
) -> dict[str, object]:
    """Write what ends a response, and the template of training, where transformers looks for them.

    generation_config.json lists the ids of ends: those that it or, where it says none, the config (`ids`: bos_token_id,
    eos_token_id, pad_token_id) had, and those of training. chat_template and the rest: as in ModelConfig, empty where
    nothing was trained here; a built-in one becomes chat_template.jinja, and so does one with arguments or a system
    prompt, which it then holds as defaults. -> the ids that the config is to have.
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
        (folder / "chat_template.jinja").write_text(defaults + tokenizer.chat.source, encoding="utf-8")
    return ids


def _name_class(folder: Path, tokenizer: Tokenizer) -> None:
    """Say in tokenizer_config.json what transformers is to open a sentencepiece or tiktoken file as that came without:
    it would take the one for another kind, and give texts without BOS and without the space before their first word,
    and the other without control tokens.

    With `legacy` that space stands after control tokens too, as in Meta's code, but also after user-defined pieces, as
    nobody else has it. A tiktoken file gets a tokenizer.json beside it, for it does not tell how text is cut.
    """
    model, said = tokenizer.vocabulary, read_config(folder)
    ends = {"bos_token": model.bos, "eos_token": model.eos}
    config = {name: token for name, token in ends.items() if token and name not in said} | _config_of(folder)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(model, SentencePiece):
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.bos_id is not None,
                   "add_prefix_space": model.puts_space, "legacy": not model.has_user_defined()}
    else:
        plain = {token: facts.id for token, facts in tokenizer.added.items() if not facts.control}
        vocab = {spelled(token): rank for token, rank in model.ranks.items()} | tokenizer.control | plain
        merges = [(spelled(left), spelled(right)) for left, right in merges_of(model.ranks)]
        bos = next((token for token, index in tokenizer.control.items() if index == tokenizer.bos_id), None)
        cut = PreTokenizer((model.pattern,), nfc=model.nfc, ignore_merges=True)
        made = byte_level_bpe(vocab, merges, cut, list(tokenizer.control), list(plain), bos)
        (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    _write_config(folder, config)
