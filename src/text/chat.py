"""Chat templates: conversations to the text that a model was trained on. Built-in ones are files of templates/.

Texts that come out of here hold control tokens (<|im_end|>, ...) of the template. Where the *content* of a message
spells one, MARK breaks it, so that whoever tokenises the text can tell them apart and nobody can forge a turn.
"""

import contextlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src.errors import UserError
from src.jsonfile import read_json, read_text
from src.processes.worker import Worker

MARK = "\ufdd0"  # a Unicode noncharacter: valid in strings, assigned to nothing
FILE = "file"  # the name of the template that travels with the tokenizer
ROLES = ("system", "user", "assistant")
RENDER_SECONDS = 5.0  # processor time; a template needs well under a millisecond
WAIT_SECONDS = 120.0  # by the clock, on a busy machine

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}

# The formats of the released instruction models, each with its source.
BUILT_IN = (
    "llama-2",  # chat_completion in generation.py of meta-llama/llama; chat_template of Llama-2-7b-chat-hf
    "llama-3",  # ChatFormat in llama/tokenizer.py of meta-llama/llama3; chat_template of Meta-Llama-3-8B-Instruct
    "mistral",  # tokenizer v1 of mistral-common: Mistral-7B-Instruct-v0.1 and v0.2, Mixtral-8x7B-Instruct-v0.1
    "qwen",  # chat_template of Qwen2-7B-Instruct (ChatML with a default system message); Qwen v1 says the same
    "deepseek",  # chat_template of deepseek-llm-7b-chat and deepseek-math-7b-instruct
    "gemma",  # chat_template of gemma-2b-it, gemma-7b-it and gemma-2-9b-it
    "internlm2",  # chat_template of internlm2-chat-7b and -20b
)
_FOLDER = Path(__file__).parent / "templates"


def read_built_in(name: str) -> str:
    """Read the jinja source of one of BUILT_IN, or of a version of it."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


# Control tokens that a vocabulary may hold as ordinary pieces, as Gemma's and DeepSeek's do
_CONTROL = re.compile(r"<([|｜])[^|｜<>\s]+\1>|<(?:start|end)_of_turn>")
# At the end of a prompt a tag that opens the answer, perhaps closed at once ("<think>\n\n</think>\n\n"); a piece of one
_OPEN_TAG, _CUT_TAG = re.compile(r"<(\w+)>\s*(</\1>\s*)?\Z"), re.compile(r"[<\[][^>\]\s]*\Z")
_THINK, _THOUGHT = "<think>", re.compile(r"</think>\s*\Z")


class Turn(NamedTuple):
    """What leads up to an assistant's answer since the last one, and the answer with the token that ends it.

    is_anew: the template writes what came before in another way than it stood there when it was learnt (earlier
    thoughts are dropped); the prompt is then the whole conversation up to the answer.
    """

    prompt: str
    answer: str
    is_anew: bool = False


class ChatTemplate:
    """A jinja template with the names of the control tokens that it may write.

    end_token ends an answer, suffix is what stands after one up to that. opening: what the prompt for an answer has
    of it already, such as "<think>\n"; empty for most. args: values of the template's own variables, such as
    {"enable_thinking": false}. system_prompt: the system message of conversations without one, empty for none.
    """

    def __init__(
        self, name: str, source: str, names: Mapping[str, str], control: Collection[str],
        args: Mapping[str, object] | None = None, system_prompt: str = "",
    ) -> None:
        """names: what the template may call bos_token, eos_token, ...; control: all control tokens.

        Raises UserError when the template does not end an assistant's turn with a control token, begins it with words
        that no prompt ends with, does not read one of args, or does not write the system prompt.
        """
        self.name, self.source, self.args, self.system_prompt = name, source, dict(args or {}), system_prompt
        self._names = dict(names)
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        self._heads = {token[:length] for token in control for length in range(1, len(token))}
        self._tails = {token[length:] for token in control for length in range(1, len(token))}
        self._longest = max(map(len, control), default=0)
        self._worker = Worker("src.text.chat_worker")
        self._find_frame()
        if system_prompt:
            try:
                text = self.prompt([{"role": "user", "content": "1"}])
            except UserError as problem:
                raise UserError(f"--system_prompt: {problem}") from None
            if not _has_words(text, system_prompt):
                raise UserError(f"--system_prompt {system_prompt[:40]!r}: chat template {name} does not write a system "
                                "message; leave it out, or give none where it was recorded")

    def _find_frame(self) -> None:
        """What stands around an answer, found in a conversation whose content holds no control token."""
        question = [{"role": "user", "content": "1"}]
        prompt = self._render(question, add_generation_prompt=True)
        text = self._render([*question, {"role": "assistant", "content": "2"}], add_generation_prompt=False)
        shared, opened = prompt, _OPEN_TAG.search(prompt)
        if not text.startswith(prompt):  # an answer that is over lacks what the prompt for it opens
            shared = _CUT_TAG.sub("", os.path.commonprefix([prompt, text]))
            asked = self._render(question, add_generation_prompt=False)
            opened = re.compile(r"\s*[<\[].*", re.DOTALL).fullmatch(prompt, len(shared)) if asked in shared else None
        self._before, answer, rest = text[len(shared) :].partition("2")
        end = self._control.search(rest)
        if not answer or not end or not (opened or text.startswith(prompt)):
            raise UserError(f"chat template {self.name} renders an answer as {text[-60:]!r} after {prompt[-60:]!r}; "
                            "expected the prompt, the answer, and a control token that ends it")
        if self._before.strip() and prompt == self._render(question, add_generation_prompt=False):
            raise UserError(f"chat template {self.name} begins an answer with {self._before!r}, which it leaves out of "
                            "a prompt: it does not read add_generation_prompt, and a model would have to write that "
                            "itself; end the template with {% if add_generation_prompt %}{{ "
                            f"{self._before!r} }}}}{{% endif %}}, or choose a built-in one")
        self.opening, self.suffix, self.end_token = opened[0] if opened else "", rest[: end.end()], end[0]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers."""
        return self._render(self._system(messages) + self._shielded(messages), add_generation_prompt=True)

    def turns(self, messages: Sequence[Message], *, whole: bool = True) -> list[Turn]:
        """A conversation cut where answers begin and end; what follows the last answer is left out.

        An answer begins where the prompt for it ends, and ends with the first end token: content can hold none. It is
        what the template makes of it, or where that cannot follow the prompt or lacks some of its words, as those of
        thoughts, it is as it was given: without the opening, which the prompt has. Where the prompt opens thoughts, an
        answer without their end is thus learnt as thoughts. whole False: so is every answer, for it may be a beginning.
        Raises UserError when the template does not lead up to an answer with the prompt for it.
        """
        shielded, system = self._shielded(messages), self._system(messages)
        turns, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(system + shielded[:index], add_generation_prompt=True)
            text = self._render(system + shielded[: index + 1], add_generation_prompt=False)
            given = self.without_opening(message["content"])
            if _THINK in given and _THOUGHT.search(prompt):
                raise UserError(f"message {index + 1} holds {_THINK}, but chat template {self.name} ends thoughts "
                                f"before an answer begins ({prompt[-40:]!r}); take them out, or let it think "
                                "(--template_args)")
            last = text.find(self.end_token, len(prompt))
            made = text[len(prompt) : last + len(self.end_token)] if text.startswith(prompt) and last >= 0 else ""
            if not made and not (self.opening and text.startswith(prompt.removesuffix(self.opening))):
                raise UserError(f"chat template {self.name} changes earlier text when message {index + 1} is added, or "
                                f"does not end it with {self.end_token}; its answers cannot be told from its prompts")
            # all the words of the answer given, and no thoughts put before its own
            is_kept = _has_words(made, given) and (_THINK not in given or made.count(_THINK) == given.count(_THINK))
            if not made or not is_kept or (self.opening and not whole):
                before = "" if self.opening or _THINK in self._before else self._before
                made = before + self.shield(given) + self.suffix
            anew = not prompt.startswith(done)
            turns.append(Turn(prompt if anew else prompt[len(done) :], made, anew))
            done = prompt + made
        return turns

    def without_opening(self, content: str) -> str:
        """An answer without the opening that its prompt has already."""
        text = content.lstrip()
        if self.opening and text.startswith(self.opening):
            return text.removeprefix(self.opening)
        spelt = r"\s*".join(map(re.escape, self.opening.split()))
        return re.sub(rf"{spelt}\s*", "", text, count=1) if spelt and re.match(spelt, text) else content

    def _system(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The system message to put before these messages, in a list; an empty one where they bring their own."""
        if not self.system_prompt or (messages and messages[0].get("role") == "system"):
            return []
        return self._shielded([{"role": "system", "content": self.system_prompt}])

    def _shielded(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages with MARK inside whatever spells a control token, or could become one at an edge."""
        if not messages:
            raise UserError("a conversation has no messages; expected at least one from the user")
        shielded = []
        for number, message in enumerate(messages, 1):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise UserError(f"message {number} has role {role!r} and content of type {type(content).__name__}; "
                                f"expected text from {', '.join(ROLES)}")
            if MARK in content:
                raise UserError(f"message {number} holds U+{ord(MARK):X}, which is no character; remove it")
            shielded.append({"role": role, "content": self.shield(content)})
        return shielded

    def shield(self, content: str) -> str:
        """Text with MARK inside whatever spells a control token, or could become one at an edge."""
        content = self._control.sub(lambda found: found[0][0] + MARK + found[0][1:], content)
        lengths = range(1, self._longest)
        if any(content[-length:] in self._heads for length in lengths):
            content += MARK
        if any(content[:length] in self._tails for length in lengths):
            content = MARK + content
        return content

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        context = self._names | {"messages": list(messages), "add_generation_prompt": add_generation_prompt,
                                 "tools": None, "documents": None}
        request = {"template": self.source, "context": context, "args": self.args, "seconds": RENDER_SECONDS}
        try:
            reply = self._worker.ask(request, WAIT_SECONDS)
        except (TimeoutError, ChildProcessError):
            raise UserError(f"chat template {self.name} did not finish within {RENDER_SECONDS:g} s of processor time "
                            "and the memory it is given; it may be hostile") from None
        if "error" in reply:
            raise UserError(f"chat template {self.name}: {reply['error']}")
        return reply["text"]


def _has_words(made: str, given: str) -> bool:
    """Whether a rendered text holds the one given, but for white space."""
    made, given = ("".join(text.replace(MARK, "").split()) for text in (made, given))
    return given in made


def find_source(
    name: str, folder: Path, control: Collection[str] = (), *, puts_space: bool = True, gets_space: bool = False
) -> str:
    """The jinja source of a built-in template, or with `file` of the one next to the tokenizer. Raises UserError.

    control, puts_space: the vocabulary's control tokens and whether it puts a space before a text, by which a format of
    several versions is chosen. gets_space: whoever reads the texts puts a space after control tokens besides.
    """
    if name in BUILT_IN:
        version, space = name, " "  # ␣, after a control token
        if name == "mistral" and "[INST]" in control:
            # Tokenizers v2, v3 and v7 of mistral-common have control tokens instead of v1's words. v2 and v3 put the
            # system message into the last user message, v7 has tokens for it. ␣ is a space where the vocabulary puts
            # one before a text, nothing where it does not (tekken).
            version = "mistral-system-block" if "[SYSTEM_PROMPT]" in control else "mistral-control"
            space = " " if puts_space else ""
        return read_built_in(version).replace("␣", "" if gets_space else space)
    if name != FILE:
        raise UserError(f"--chat_template {name} is unknown; expected none, file (the tokenizer's own) or one of "
                        f"{', '.join(BUILT_IN)}")
    source = read_own_template(folder)
    if source is None:
        raise UserError(f"--chat_template file: {folder} holds no chat template (chat_template.jinja, or chat_template "
                        f"in tokenizer_config.json); choose a built-in one of {', '.join(BUILT_IN)}")
    return source


def read_own_template(folder: Path) -> str | None:
    """The jinja source of the template next to a tokenizer; None where there is none. Raises UserError for a file that
    is no json."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for file in ("chat_template.json", "tokenizer_config.json"):
        path = folder / file
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # named ones; the others are for tools and retrieval
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        if isinstance(found, str):
            return found
    return None


def has_own_template(folder: Path) -> bool:
    """Whether a template that --chat_template file would take stands next to a tokenizer."""
    with contextlib.suppress(UserError):  # a damaged file: an error for those alone who want the template
        return read_own_template(folder) is not None
    return False


def control_tokens(source: str) -> set[str]:
    """The control tokens that a template's source spells out."""
    return {found[0] for found in _CONTROL.finditer(source)}
