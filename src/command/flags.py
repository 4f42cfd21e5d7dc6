"""Flags: the words of a command line, and of a file that --config names, read as typed values.

Plain Fire runs the whole job on a mistyped flag and complains afterwards, hands `--resume=false` over as a truthy
string and `--ckpt_dir a,b` as a tuple. Here every flag is read against the annotations of the script's config, or of
its function's parameters, before any work starts.
"""

import dataclasses
import difflib
import inspect
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from src import jsonfile
from src.command.config import Bounds, Config, check_bounds
from src.command.hub import fetch
from src.errors import UserError

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]


class Kind(NamedTuple):
    """A type one word can have: its name in --help, an example, a reader raising ValueError or KeyError."""

    name: str
    example: str
    read: Callable[[str], Scalar]


TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
CONFIG = "json or yaml file of flags, or run.json of an earlier run; flags on the command line win"
KINDS: dict[object, Kind] = {
    bool: Kind("true|false", "true", lambda word: TRUTH[word.lower()]),
    int: Kind("whole number", "8", int),
    float: Kind("number", "1e-5", float),
    str: Kind("text", "VALUE", str),
}
# Choices come first because anything is text; text comes before lists so that, where both are allowed, one word stays
# text.
TRY_ORDER: list[object] = [Literal, bool, int, float, str, list]


# Flags of earlier versions, which command lines and run.json of then still have
BECAME = {"wandb": "it has become --trackers wandb:PROJECT/NAME"}

# What may differ when a run of a trainer is resumed: how it goes on, where it writes, and how the work of a step is cut
# up, none of which changes what was learnt so far. Any other flag is compared with what it was.
FREE_ON_RESUME = (
    "lr", "critic_lr", "schedule", "warmup_ratio", "min_lr_ratio", "epochs", "max_steps", "max_batch_size",
    "accumulation_steps", "packing", "rollout_batch_size", "activation_checkpointing", "compile",
    "tensor_parallel_size", "context_parallel_size", "replicas", "phases", "save_dir", "actor_save_dir",
    "critic_save_dir", "log_dir", "reference_file",
    "model_type", "eval_every", "rollout_samples", "stop_on_alarm", "save_every", "keep_last", "background_save",
    "save_dtype", "resume", "trackers", "dry_run", "base_url", "api_key_env", "server_seconds", "mismatch_limit",
)

# The first five of these that a script has lead its --help, after those that it requires.
FIRST = (
    "ckpt_file", "save_path", "n", "format", "verify", "label_file", "ckpt_dir", "log_dir", "objective", "advantage",
    "reward", "num_samples", "eval_file", "task", "max_batch_size", "lora_rank", "lr", "epochs", "temperature",
    "dry_run",
)

# Flags that name what a command writes: first what it makes in one piece, which would replace what stands there.
REPLACED = (
    "save_file", "save_path", "save_dir", "actor_save_dir", "critic_save_dir", "first_file", "second_file",
    "control_file",
)
WRITTEN = (*REPLACED, "log_dir", "reference_file", "out_file", "outcome_file")
OVERWRITE = "replace what is finished and stands where this command writes"


def is_path(name: str) -> bool:
    """Whether a flag of this name holds a path, or several."""
    return name.endswith(("_file", "_files", "_dir", "_path")) or name in ("inspect", "certify", "config")


def path_in(name: str, word: str) -> Path | None:
    """The path that a word of a flag names: all of it, or of FILE.py:FUNCTION the file, if there is one."""
    if is_path(name):
        return Path(word) if word else None
    path = Path(word.partition(":")[0])
    return path if "." in word and os.path.isfile(path) else None  # which says no of a text too long for a name


class Flag(NamedTuple):
    """A flag; `kinds` are the members of its annotation: (str, list[str]) for `str | list[str]`."""

    name: str
    kinds: tuple[object, ...]
    default: object
    meaning: str
    group: str
    bounds: Bounds | None

    @property
    def required(self) -> bool:
        """Whether the command line has to give it."""
        return self.default is inspect.Parameter.empty

    @property
    def expects(self) -> str:
        """The kinds of value it takes, in words."""
        return " or ".join(map(_describe, self.kinds))

    @property
    def example(self) -> str:
        """The flag with a value of its first kind, as one would write it."""
        kind = (*get_args(self.kinds[0]), self.kinds[0])[0]
        return f"--{self.name} {KINDS[kind].example if kind in KINDS else kind}"


def config_of(main: Callable[..., None]) -> type[Config] | None:
    """The config that is main's only parameter; None for a function whose parameters are the flags themselves."""
    hints = [hint for name, hint in get_type_hints(main).items() if name != "return"]
    return hints[0] if len(hints) == 1 and inspect.isclass(hints[0]) and issubclass(hints[0], Config) else None


def flags_of(main: Callable[..., None]) -> dict[str, Flag]:
    """What main accepts: the fields of its config, or its parameters with the meanings that its docstring gives. With a
    flag of REPLACED comes --overwrite, which outputs.check() reads, and not main."""
    config, meanings = config_of(main), meanings_of(inspect.getdoc(main) or "")
    hints = get_type_hints(config or main, include_extras=True)
    declared = _fields(config) if config else (
        (name, parameter.default, meanings.get(name, ""), "Optional flags")
        for name, parameter in inspect.signature(main).parameters.items())
    flags = {}
    for name, default, meaning, group in declared:
        hint, bounds = hints[name], None
        if get_origin(hint) is Annotated:
            hint, bounds = get_args(hint)
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        assert all((get_origin(kind) or kind) in TRY_ORDER for kind in kinds), f"{name}: cannot read {hint}"
        flags[name] = Flag(name, kinds, default, meaning, group, bounds)
    if not flags.keys().isdisjoint(REPLACED):
        flags["overwrite"] = Flag("overwrite", (bool,), False, OVERWRITE, flags[next(reversed(flags))].group, None)
    return flags


def _fields(config: type[Config]) -> Iterator[tuple[str, object, str, str]]:
    """Name, default, meaning and group of each field, the config's own first and those of its bases after them. A class
    that gives a flag of a base another default alone leaves its meaning and its group as they are."""
    lineage = {field.name: [base for base in config.__mro__ if field.name in vars(base).get("__annotations__", {})]
               for field in dataclasses.fields(config)}
    for name in sorted(lineage, key=lambda name: config.__mro__.index(lineage[name][-1])):
        declared = [vars(base)["__dataclass_fields__"][name] for base in lineage[name]]
        default = declared[0].default
        if declared[0].default_factory is not dataclasses.MISSING:
            default = declared[0].default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        meaning = next(field.metadata["help"] for field in declared if field.metadata)
        yield name, default, meaning, (inspect.getdoc(lineage[name][-1]) or "").partition("\n")[0]


def parse(main: Callable[..., None], argv: list[str]) -> dict[str, Value]:
    """The flags given in argv, and in the file that --config names; those of argv win. Raises UserError. They are typed
    as main's config or parameters are; defaults stay with these."""
    flags = flags_of(main)
    file = Flag("config", (str,), "", CONFIG, "", None)
    values = _parse_words(argv, flags | {"config": file})
    if "config" in values:
        values = read_config(str(values.pop("config")), flags) | values
    empty = {name for name, value in values.items() if is_path(name) and value in ("", [])}  # in the file
    missing = [flag for flag in flags.values() if flag.required and flag.name not in values.keys() - empty]
    if missing:
        names = ", ".join(f"--{flag.name}" for flag in missing)
        raise UserError(f"missing required {names}; write {missing[0].example}, or see --help")
    for name, value in values.items():
        if is_path(name):
            words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
            if name in WRITTEN and any(word.startswith("hf:") for word in words):
                raise UserError(f"--{name} is {words[0]!r}; what lies at the Hub is read only, expected a local path")
            found = [fetch(name, word) for word in words]
            values[name] = found if isinstance(value, list) else (*found, value)[0]
    return values


def bind(main: Callable[..., None], values: Mapping[str, Value]) -> Callable[[], None]:
    """The call of main with values of parse(). Raises UserError for values that do not go together."""
    config, values = config_of(main), {name: value for name, value in values.items() if name != "overwrite"}
    return partial(main, config(**values)) if config else partial(main, **values)


class _Words(yaml.SafeLoader):
    """Yaml whose words stay as they are written, for the flags to say what they mean: as its own kinds 010 would be 8,
    1:30 be 90, 1.10 be 1.1 and yes be true. Only null is none."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag.endswith((":null", ":merge"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """The values by key. Raises YAMLError for a key that stands twice, of which one would be lost."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def read_config(file: str, flags: dict[str, Flag]) -> dict[str, Value]:
    """The flags that a json or yaml file gives, or an earlier run's run.json. Raises UserError naming file and key."""
    if Path(file).suffix in (".yaml", ".yml"):
        jsonfile.check_file(file)
        try:
            found = yaml.load(Path(file).read_text(encoding="utf-8"), _Words)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid yaml: {' '.join(str(error).split())}") from None
    else:
        found = jsonfile.read_json(file)
    if isinstance(found, dict) and isinstance(found.get("flags"), dict):
        found = found["flags"]  # of run.json
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__}, expected flags by name, such as {{\"seed\": 1}}")
    values = {}
    for name, value in found.items():
        if name in BECAME and not value:
            continue  # it was not given
        try:
            flag, negated = _find(f"--{name}", flags)
            if negated:
                raise UserError(f"write {flag.name}: false")
            if flag.name in values:
                raise UserError(f"{flag.name} stands there twice, spelt in two ways")
            words = [_word(one, flag) for one in (value if isinstance(value, list) else [value])]
            takes_none = not words and any(get_origin(kind) is list for kind in flag.kinds)
            values[flag.name] = [] if takes_none else _read(flag, words, split=not isinstance(value, list))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    return values


def _word(value: object, flag: Flag) -> str:
    """A value of a file as one would write it on the command line."""
    if value is None:
        raise UserError(f"{flag.name} is null, expected {flag.expects}; leave the line out for the default")
    if isinstance(value, dict | list):
        raise UserError(f"found {value!r}, expected a text, a number, true or false, or a list of such")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_words(argv: list[str], flags: dict[str, Flag]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for word in argv:
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{word!r} on the command line holds a NUL or is not UTF-8; rename the file it names")
    rest = list(argv)
    while rest:
        if not _looks_like_flag(rest[0]):
            raise UserError(f"{rest[0]!r} belongs to no flag; write --NAME before it, or quotes around a value with "
                            "spaces; --help lists the flags")
        head, equals, text = rest.pop(0).partition("=")
        flag, negated = _find(head, flags)
        if flag.name in values:
            raise UserError(f"--{flag.name} is given twice; keep one of them")
        words = [text] if equals else []
        takes_many = any(get_origin(kind) is list for kind in flag.kinds)
        while rest and not _looks_like_flag(rest[0]) and (takes_many or not words):
            words.append(rest.pop(0))
        if negated and words:
            raise UserError(f"{head} is followed by {words[0]!r} but takes no value; write {head} alone")
        if is_path(flag.name) and not all(map(str.strip, words)):
            raise UserError(f"--{flag.name} is empty; name a file or directory, or leave the flag out (is a variable "
                            "of the shell unset?)")
        values[flag.name] = not negated if bool in flag.kinds and not words else _read(flag, words)
    return values


def _find(head: str, flags: dict[str, Flag]) -> tuple[Flag, bool]:
    """The flag that `--name`, `--noname` or `--no_name` stands for, and whether it is negated."""
    name = head.lstrip("-").replace("-", "_")
    if head.startswith("--"):
        if name in flags:
            return flags[name], False
        positive = name.removeprefix("no").removeprefix("_")
        if name.startswith("no") and positive in flags and bool in flags[positive].kinds:
            return flags[positive], True
    advice = BECAME.get(name) or suggestion(name.lower(), flags, "--help lists the flags of this script", "--")
    raise UserError(f"unknown flag {head}; {advice}")


def suggestion(word: str, known: Iterable[str], otherwise: str, dashes: str = "") -> str:
    """What somebody who wrote a word may have meant, else other advice."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {dashes}{near[0]}?" if near else otherwise


def _looks_like_flag(word: str) -> bool:
    """Negative numbers are values; other words with a leading dash are values only as in `--flag=-word`."""
    return word.startswith("-") and not re.match(r"-(\d|\.\d|inf$)", word)


def _read(flag: Flag, words: list[str], split: bool = True) -> Value:
    """The words after a flag as the first of its kinds that fits them; split: commas part those of a list, unless one
    of its kinds is text. Raises UserError."""
    if not words:
        dashed = f" (--{flag.name}=VALUE when it begins with a dash)" if str in flag.kinds else ""
        raise UserError(f"--{flag.name} has no value, expected {flag.expects}; write {flag.example}{dashed}")
    for kind in sorted(flag.kinds, key=lambda kind: TRY_ORDER.index(get_origin(kind) or kind)):
        try:
            value = _read_as(kind, words, split=split and str not in flag.kinds)
        except (ValueError, KeyError):
            continue
        if flag.bounds:
            check_bounds(flag.name, value, flag.bounds)
        return value
    choices = [str(choice) for kind in flag.kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    raise UserError(f"--{flag.name} is {' '.join(words)!r}, expected {flag.expects}; "
                    + suggestion(words[0], choices, f"write for example {flag.example}"))


def _read_as(kind: object, words: list[str], split: bool) -> Value:
    """The words as one kind; split: commas part the words of a list. Raises ValueError or KeyError."""
    if get_origin(kind) is list:
        parts = [part.strip() for word in words for part in word.split(",")] if split else words
        if any(words) and not any(parts):  # commas or a new line, which would be lost
            raise ValueError
        return [KINDS[get_args(kind)[0]].read(part) for part in parts if part]
    (word,) = words
    if get_origin(kind) is Literal:
        return get_args(kind)[[str(choice) for choice in get_args(kind)].index(word)]
    return KINDS[kind].read(word)


def _describe(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return f"list of {KINDS[get_args(kind)[0]].name}" if get_origin(kind) is list else KINDS[kind].name


def meanings_of(docstring: str) -> dict[str, str]:
    """The `name: meaning` lines of a docstring; lines indented deeper than the name continue its meaning."""
    entries = re.findall(r"^( *)(\w+):(.*(?:\n\1 +.*)*)", docstring, re.MULTILINE)
    return {name: " ".join(meaning.split()) for _, name, meaning in entries}
