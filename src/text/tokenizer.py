"""Text to token ids and back: one vocabulary with its control tokens and, where asked for, its chat template."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from src.errors import UserError
from src.jsonfile import parse, read_json
from src.text.blocks import CODE_FORM, Marker, Piece
from src.text.chat import MARK, ChatTemplate, control_tokens, find_source
from src.text.vocabulary import Added, Vocabulary, open_vocabulary

# Which file of a directory is opened: sentencepiece first, because a tokenizer.json next to it is derived from it.
VOCABULARY_FILES = ("tokenizer.model", "qwen.tiktoken", "tokenizer.json", "vocab.json")

# What parts thoughts from an answer: text that is learnt, shown and graded, even where a file sets it apart as control
THOUGHTS = ("<think>", "</think>")


class Tokenizer:
    """A vocabulary of any kind. Plain texts never become control tokens; only this class's ids and a template do.

    vocabulary, added: the opened file, and the tokens that it or config files set apart.
    vocab_size: ids are below this. bos_id: begins a sequence, None where none does. eos_id: ends a response. stop_ids:
    any of these ends a sampled response. control: names and ids of all control tokens.
    chat: the template that prompts and responses are put in, None for none; then eos_id is its end of a turn. code:
    whether they are put in the form of solutions with code (blocks.py); then eos_id is its end of a message.
    chat_template, template_args, system_prompt: as they were given.
    """

    def __init__(
        self, path: Path, chat_template: str = "none", template_args: Mapping[str, object] | None = None,
        system_prompt: str = "",
    ) -> None:
        """Open a vocabulary file, or the one in a directory, with the config files next to it.

        chat_template: none, file (the one next to it), a built-in name or code. template_args: values of the template's
        own variables. system_prompt: its system message where a conversation has none. Raises UserError that says what
        is missing, damaged or without effect.
        """
        self.path = _find_file(path)
        folder = self.path.parent
        config = read_config(folder)
        self.vocabulary: Vocabulary = open_vocabulary(self.path, config.get("tokenizer_class"))
        if config.get("add_prefix_space") not in (None, self.vocabulary.puts_space):
            raise UserError(f"{folder / 'tokenizer_config.json'}: add_prefix_space={config['add_prefix_space']!r}, but "
                            f"{self.path.name} puts {'a' if self.vocabulary.puts_space else 'no'} space before a text; "
                            "give the tokenizer.json that the model was trained with, or set it to null if this is it")
        extra = _read_added(folder, config, self.vocabulary)
        self._check_added(extra)
        renamed = {facts.id for facts in extra.values()}
        own = {token: facts for token, facts in self.vocabulary.added.items() if facts.id not in renamed}
        added = own | extra
        self._identity = sorted((token, facts.id) for token, facts in added.items())
        self.chat_template, self.system_prompt = chat_template, system_prompt
        self.template_args = dict(template_args or {})
        self.code = chat_template == CODE_FORM
        source = ""
        if not self.code and chat_template != "none":
            control = {token for token, facts in added.items() if facts.control}
            source = find_source(chat_template, folder, control, puts_space=self.vocabulary.puts_space)
        for token in control_tokens(source):
            index = added[token].id if token in added else self.vocabulary.token_id(token)
            if index is not None:
                added[token] = Added(index, control=True)
        added |= {token: added[token]._replace(control=False) for token in THOUGHTS if token in added}
        self.added = added
        self.control = {token: facts.id for token, facts in added.items() if facts.control}
        self.vocab_size = max(self.vocabulary.size, *(facts.id + 1 for facts in added.values()), 0)
        self._set_ends(folder, config)
        self._set_patterns(added)
        self.chat = None
        if source:
            self._put_in_chat(source, config)
        elif template_args or system_prompt:
            name, value = ("template_args", ", ".join(template_args)) if template_args else (
                "system_prompt", repr(system_prompt[:40]))
            raise UserError(f"--{name} {value}: --chat_template {chat_template} has no template to take that; give "
                            "file or a built-in name")
        if self.code:  # responses end as messages of solutions with code do
            if missing := [marker for marker in Marker if marker not in self.control]:
                raise UserError(f"{self.path} has no token {missing[0].value!r}, which --chat_template code needs; put "
                                "the markers behind its vocabulary with checkpoint_split.py --code_tokens")
            self.eos_id = self.control[Marker.END_OF_MESSAGE]
            self.stop_ids |= {self.eos_id}

    def _check_added(self, added: Mapping[str, Added]) -> None:
        """Raise UserError when the tokens that config files add do not go with the vocabulary or with each other."""
        seen: dict[int, str] = {}
        for token, facts in added.items():
            known = self.vocabulary.token_id(token)
            other = seen.get(facts.id)
            if known not in (None, facts.id) and not self.vocabulary.renames:
                other = f"id {known} in the vocabulary"
            elif known is None and facts.id < self.vocabulary.size and not self.vocabulary.renames:
                other = "another token in the vocabulary"
            if other is not None:
                raise UserError(f"{self.path}: the added tokens beside it give id {facts.id} to {token!r}, but that is "
                                f"{other}; they are of another tokenizer")
            seen[facts.id] = repr(token)

    def _set_ends(self, folder: Path, config: Mapping[str, object]) -> None:
        """Find bos_id, eos_id and stop_ids: by the config where it says, else by what the kind of file means."""
        bos = config.get("bos_token", self.vocabulary.bos)
        eos = config.get("eos_token", self.vocabulary.eos)
        adds_bos = config.get("add_bos_token")
        adds_bos = self.vocabulary.adds_bos if adds_bos is None else adds_bos
        self.bos_id = self._named_id("bos_token", bos) if bos and adds_bos else None
        self.eos_id = self._named_id("eos_token", eos)
        stops = {self.eos_id} | {self.control[token] for token in self.vocabulary.stops}
        self.stop_ids = frozenset(stops.union(read_stops(folder, self.vocab_size)))

    def _named_id(self, name: str, token: object) -> int:
        """The id of the token called bos_token or eos_token; it counts as a control token from here on."""
        index = self.control.get(token, self.vocabulary.token_id(token)) if isinstance(token, str) else None
        if index is None:
            raise UserError(f"{self.path}: {name} is {token!r}, which the vocabulary does not have; expected "
                            "tokenizer_config.json beside it to name one")
        self.control[token] = index
        return index

    def _set_patterns(self, added: Mapping[str, Added]) -> None:
        """What texts are split by."""
        self._names = {index: token for token, index in self.control.items()}
        self._control = _alternatives(self.control, added)
        own = {self.vocabulary.spelling(index) for index in self._names if index < self.vocabulary.size}
        inside = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in own if text[1:])
        self._inside = re.compile("|".join(inside) or r"(?!)")
        plain = {token: facts.id for token, facts in added.items() if not facts.control}
        found = {token for token, facts in self.vocabulary.added.items() if not facts.control}
        self._plain = {token: index for token, index in plain.items() if token not in found}
        self._plain_names = {index: token for token, index in self._plain.items()}
        self._plain_pattern = _alternatives(self._plain, added)

    def _put_in_chat(self, source: str, config: Mapping[str, object]) -> None:
        """Attach a template. Raises UserError when it needs tokens that the vocabulary does not have."""
        name, missing = self.chat_template, sorted(control_tokens(source) - self.control.keys())
        if missing and name != "file":  # a file's may name tokens for tools, which it never writes here
            raise UserError(f"{self.path} has no token {missing[0]!r}, which --chat_template {name} needs; choose the "
                            "format that the model was made for")
        names = {key: token for key, token in config.items() if key.endswith("_token") and isinstance(token, str)}
        names.setdefault("eos_token", self._names[self.eos_id])
        if "bos_token" not in config and self.vocabulary.bos is not None:
            names["bos_token"] = self.vocabulary.bos
        self.chat = ChatTemplate(name, source, names, self.control, self.template_args, self.system_prompt)
        self.eos_id = self.control[self.chat.end_token]
        self.stop_ids |= {self.eos_id}

    def chat_facts(self) -> dict[str, object]:
        """What gives texts their form, as ModelConfig records it."""
        return {"chat_template": self.chat_template, "template_args": self.template_args,
                "system_prompt": self.system_prompt}

    def fingerprint(self) -> str:
        """A hash of the ids that texts become: of the vocabulary's file and the tokens that config files add."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.path.name == "vocab.json":
            digest.update(self.path.with_name("merges.txt").read_bytes())
        digest.update(repr(self._identity).encode())
        return digest.hexdigest()

    def form(self) -> str:
        """A hash of all that makes prompts and ends answers: of the ids, the template's source and the ends."""
        facts = self.fingerprint(), self.chat and self.chat.source, sorted(self.stop_ids)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Tokenize a plain text, without BOS and EOS. Raises UserError on text that is not valid Unicode.

        What spells a control token in it becomes ordinary pieces. start False: the text continues an earlier one, so a
        vocabulary that puts a space before a sequence puts none.
        """
        try:
            text.encode()  # the libraries' own complaints name no reason
        except UnicodeEncodeError as problem:
            raise UserError(f"text holds a lone surrogate at character {problem.start}; it is not valid "
                            "Unicode") from None
        ids: list[int] = []
        for index, stretch in enumerate(self._plain_pattern.split(text)):
            if index % 2:  # split() gives the tokens of the pattern at odd places
                ids.append(self._plain[stretch if stretch in self._plain else stretch.strip()])
            elif stretch:
                ids += self._encode_stretch(stretch, start=self.vocabulary.after_added if index else start)
        return ids

    def encode_pieces(self, parts: Iterable[Piece], *, start: bool = True) -> list[list[int]]:
        """Ids of each piece of a solution with code: a marker is its control token, a content is encoded apart. start
        False: the first piece goes on in the middle of a content."""
        return [[self.control[part]] if isinstance(part, Marker) else self.encode(part, start=start or place > 0)
                for place, part in enumerate(parts)]

    def decode_pieces(self, ids: Iterable[int]) -> list[Piece]:
        """The pieces that encode_pieces() has made ids of, empty ones left out."""
        markers = {self.control[marker]: marker for marker in Marker}
        parts: list[Piece] = []
        for is_marker, group in groupby(ids, markers.__contains__):
            stretch = list(group)
            parts += [markers[index] for index in stretch] if is_marker else [self.decode(stretch)]
        return parts

    def encode_rendered(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a chat template's text: control tokens are read as such, except where MARK breaks them.

        The stretches between them are encoded apart. Where a vocabulary puts a space before a sequence, a stretch
        that begins with one gets no second: "[INST]" and " [INST]" give the same ids, as in Meta's and Mistral's code.
        Some put it before the first stretch alone. start False: the text goes on from an earlier one, in the middle of
        a stretch.
        """
        ids: list[int] = []
        for index, stretch in enumerate(self._control.split(text)):
            if index % 2:
                ids.append(self.control[stretch if stretch in self.control else stretch.strip()])
            else:
                stretch, begins = stretch.replace(MARK, ""), self.vocabulary.after_control if index else start
                if self.vocabulary.puts_space and begins:
                    stretch = stretch.removeprefix(" ")
                ids += self.encode(stretch, start=begins)
        return ids

    def begins_after(self, ids: Sequence[int]) -> bool:
        """Whether a rendered text that follows these ids begins a stretch, as `start` of encode_rendered() means it."""
        if not ids or ids[-1] in self._names:
            return not ids or self.vocabulary.after_control
        return self.vocabulary.after_added and ids[-1] in {facts.id for facts in self.added.values()}

    def _encode_stretch(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text without added tokens. Some vocabularies would find control tokens in it: then it is cut there.

        Gemma's sentencepiece model holds <start_of_turn> as a user-defined piece, InternLM2's its <|im_end|> under
        the name [UNUSED_TOKEN_145].
        """
        ids = self.vocabulary.encode(text, start=start)
        if self._names.keys().isdisjoint(ids):
            return ids
        first, *others = self._inside.split(text)
        ids = self.vocabulary.encode(first, start=start)
        for part in others:
            ids += self.vocabulary.encode(part, start=False)
        return ids

    def decode(self, ids: Iterable[int], *, show_control: bool = False) -> str:
        """The text of some ids; control tokens vanish unless shown, and so do ids of a model's padded vocabulary."""
        shown = self._plain_names | (self._names if show_control else {})
        text, pending, start = "", [], True
        for index in ids:
            if index in shown:
                text += self._decode_stretch(pending, start=start) + shown[index]
                start = self.vocabulary.after_control if index in self._names else self.vocabulary.after_added
                pending = []
            elif index < self.vocabulary.size and index not in self._names:
                pending.append(index)
        return text + self._decode_stretch(pending, start=start)

    def pieces(self, ids: Sequence[int], *, show_control: bool = False) -> list[str]:
        """What each id adds to the text: joined they are what decode() says, but for characters of several ids, for
        which U+FFFD stands."""
        found = []
        for place in range(len(ids)):  # alone, an id would lose the space that a text's first one begins with
            before, both = (self.decode(ids[max(0, place - 1) : end], show_control=show_control)
                            for end in (place, place + 1))
            added = both[len(before) :] if both.startswith(before) else ""
            found.append(added or self.decode([ids[place]], show_control=show_control))
        return found

    def _decode_stretch(self, ids: Sequence[int], *, start: bool) -> str:
        return self.vocabulary.decode(ids, start=start) if ids else ""


def read_template_args(text: str) -> dict[str, object]:
    """What --template_args gives: a json object, or NAME=VALUE,NAME=VALUE with values that are json, Python's True,
    False and None, or plain text. Raises UserError."""
    if text.lstrip().startswith("{"):
        return parse(text, "--template_args")
    args: dict[str, object] = {}
    for part in re.split(r",(?=\s*\w+=)", text) if text else []:
        name, equals, value = part.strip().partition("=")
        if not name.isidentifier() or not equals or name in args:
            raise UserError(f"--template_args: found {part!r}, expected each NAME=VALUE once, as in "
                            "enable_thinking=false, or a json object")
        try:
            args[name] = parse({"True": "true", "False": "false", "None": "null"}.get(value, value), "", object)
        except UserError:
            args[name] = value
    return args


def _alternatives(tokens: Iterable[str], added: Mapping[str, Added]) -> re.Pattern[str]:
    """A pattern whose split() gives the tokens at odd places, with the white space that belongs to them."""
    parts = []
    for token in sorted(tokens, key=len, reverse=True):
        facts = added.get(token, Added(0, control=True))
        left, right = (r"\s*" if eats else "" for eats in (facts.eats_left, facts.eats_right))
        parts.append(left + re.escape(token) + right)
    return re.compile(f"({'|'.join(parts)})" if parts else r"((?!))")


def _find_file(path: Path) -> Path:
    """The vocabulary file that a path means."""
    if path.is_file():
        return path
    for name in VOCABULARY_FILES:
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise UserError(f"{path} holds no tokenizer ({', '.join(VOCABULARY_FILES)}); give checkpoint_split.py a "
                        "--tokenizer_file")
    raise UserError(f"{path} does not exist; expected a tokenizer's file or directory")


def read_config(folder: Path) -> dict[str, object]:
    """tokenizer_config.json over special_tokens_map.json, as far as they are there; named tokens become texts."""
    config: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= read_json(folder / name)
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict) and "content" in value:
            config[key] = value["content"]
    return config


def _read_added(folder: Path, config: Mapping[str, object], vocabulary: Vocabulary) -> dict[str, Added]:
    """The tokens that the config files add to a vocabulary, or set apart in it. Raises UserError for odd entries. Those
    named in the config (eos_token, additional_special_tokens, ...) and those marked special are control tokens."""
    path, added_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    lists = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    named = {value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    named |= {_content(path, entry) for entries in lists if isinstance(entries, list) for entry in entries}
    added: dict[str, Added] = {}
    for token, index in (read_json(added_path) if added_path.is_file() else {}).items():
        added[token] = Added(_id(added_path, token, index), control=token in named)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(isinstance(facts, dict) for facts in decoder.values()):
        raise UserError(f"{path}: added_tokens_decoder must give an object with its content for each id")
    for index, facts in decoder.items():
        token = _content(path, facts)
        if facts.get("single_word") and token not in vocabulary.added:
            raise UserError(f"{path}: token {token!r} is a single_word, which is implemented for tokenizer.json alone")
        control = bool(facts.get("special")) or token in named
        added[token] = Added(_id(path, token, index), control, bool(facts.get("lstrip")), bool(facts.get("rstrip")))
    for token in named - added.keys():
        index = vocabulary.token_id(token)
        if index is not None:
            added[token] = Added(index, control=True)
    return added


def _content(path: Path, entry: object) -> str:
    """The text of a token, which stands there plainly or as {"content": text, ...}. Raises UserError."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise UserError(f"{path}: found {entry!r} for an added token; expected a text or an object with its content")
    return text


def _id(path: Path, token: str, index: object) -> int:
    """An id as a number; json keys are text. Raises UserError."""
    if not str(index).isdecimal():
        raise UserError(f"{path}: token {token!r} has id {index!r}; expected a whole number")
    return int(str(index))


def read_stops(folder: Path, size: int) -> list[int]:
    """The ids that generation_config.json lets end a response, in its order. Raises UserError for one beyond size."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for index in ids:
        if type(index) is not int or not 0 <= index < size:
            raise UserError(f"{path}: eos_token_id {index!r} is not among the tokenizer's {size} ids")
    return ids
