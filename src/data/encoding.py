"""Texts to token ids, with what is to learn: the only code that tokenises for training, sampling and scoring.

Without a chat template a prompt is BOS + instruction and a response is output + EOS; with one, both are what the
template writes around them, ended by its end token, and its own control tokens are all there are. Where its prompt
begins the answer ("<think>"), the response is what follows (ChatTemplate.turns). Solutions with code
(text.blocks) are such a template. Prompt and response are tokenised apart and joined, so the border between them is
known by construction, and the same in training, sampling and scoring.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Literal, NamedTuple

from src.errors import UserError, naming
from src.text import blocks
from src.text.blocks import Learnt, Marker, Piece
from src.text.chat import MARK, Message
from src.text.tokenizer import Tokenizer

# What parts the steps of a solution: those of GSM8K, MetaMath and Math-Shepherd are lines
StepKind = Literal["paragraph", "line"]
STEP_ENDS: dict[str, str] = {"paragraph": "\n\n", "line": "\n"}
STEP_END = STEP_ENDS["paragraph"]
# How verifiers trained elsewhere are shown steps: what stands before the first and before the others, and the token
# after each at which its score is read. Zhang et al. 2025 (arXiv 2501.07301), Wang et al. 2024 (arXiv 2312.08935).
STEP_TOKENS = {"qwen-prm": ("", "", "<extra_0>"), "math-shepherd": (" ", "\n", "ки")}


class Encoded(NamedTuple):
    """One prompt and response as ids; response_start is where the response begins.

    targets, for a verifier: what its score at each response token should be, nan = it is not read there.
    In a conversation of several turns answer_mask says which tokens are the assistant's, and the first of them is
    where the response begins.
    """

    tokens: list[int]
    response_start: int
    targets: tuple[float, ...] = ()
    answer_mask: list[bool] | None = None

    @property
    def supervised(self) -> list[bool]:
        """For each token whether it is one to learn."""
        return self.answer_mask or [place >= self.response_start for place in range(len(self.tokens))]

    @property
    def is_labelled(self) -> bool:
        """Whether a target is left to read, where there were any."""
        return not self.targets or not all(map(math.isnan, self.targets))

    @property
    def n_response(self) -> int:
        """Number of response tokens, EOS included: the supervised ones."""
        return sum(self.supervised)


Masked = tuple[list[int], list[bool]]  # ids, and for each whether it is to be learnt


def encode_prompt(tokenizer: Tokenizer, instruction: str, prefix: str = "", *, where: str = "") -> list[int]:
    """BOS (where the vocabulary has one) and the instruction's ids, or what the chat template makes of it.

    prefix: the beginning of the answer, which is to be continued; its ids, tokenised apart, end the prompt. Raises
    UserError for an empty prompt without BOS, as there is nothing to continue, and for a prefix that the template
    changes; where: the place that it begins with.
    """
    with naming(where):
        if tokenizer.code:
            partial_answer = blocks.answer_pieces(prefix) if prefix else []
            return list(chain(*tokenizer.encode_pieces([*blocks.prompt_pieces(instruction), *partial_answer])))
        if tokenizer.chat:
            prompt = tokenizer.encode_rendered(tokenizer.chat.prompt([_message("user", instruction)]))
            partial_answer = _partial_answer(tokenizer, instruction, prefix) if prefix else ""
            return prompt + tokenizer.encode_rendered(partial_answer, start=tokenizer.begins_after(prompt))
        prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(instruction)
        if not prompt:
            raise UserError(f"an instruction is empty and {tokenizer.path} has no BOS: the prompt would hold no token")
        return prompt + (tokenizer.encode(prefix) if prefix else [])


def encode_response(
    tokenizer: Tokenizer, instruction: str, output: str, *, prefix: str = "", finished: bool = True
) -> Encoded:
    """A prompt with its response; EOS, or the chat template's end token, ends a finished one.

    prefix: the beginning of the answer; it belongs to the prompt, and the response is what follows it. What the
    interpreter showed in a solution with code is part of the response, but nothing to learn.
    """
    prompt = encode_prompt(tokenizer, instruction, prefix)
    if tokenizer.code:
        parts = [*blocks.answer_pieces(output), *([Marker.END_OF_MESSAGE] if finished else [])]
        ids, mask = _encode_pieces(tokenizer, [Marker.ASSISTANT, *parts], "assistant_no_execution")
        answer_mask = [False] * len(prompt) + mask[1:]
        # The marker says whose pieces these are; the prompt ends with it, so it is taken off again
        return Encoded(prompt + ids[1:], len(prompt), answer_mask=None if all(mask[1:]) else answer_mask)
    if tokenizer.chat:
        partial_answer = _partial_answer(tokenizer, instruction, prefix) if prefix else ""
        answer = _answer(tokenizer, instruction, prefix + output, whole=finished and not prefix)
        if not answer.startswith(partial_answer):
            raise _changed(tokenizer, prefix)
        if not finished:  # what stands between an answer and its end token, such as Llama 2's space, is yet to come
            answer = answer.removesuffix(tokenizer.chat.suffix)
        answer = answer.removeprefix(partial_answer)
        response = tokenizer.encode_rendered(answer, start=tokenizer.begins_after(prompt))
    else:
        response = tokenizer.encode(output, start=not prefix) + ([tokenizer.eos_id] if finished else [])
    return Encoded(prompt + response, len(prompt))


def _encode_pieces(
    tokenizer: Tokenizer, parts: Sequence[Piece], what: Learnt, kept: Sequence[bool] = (True,)
) -> Masked:
    """Pieces as ids, with a mask of those to learn; kept: for each answer whether it is to be learnt."""
    ids = tokenizer.encode_pieces(parts)
    mask = [[is_learnt] * len(own) for own, is_learnt in zip(ids, blocks.learnt(parts, what, kept), strict=True)]
    return list(chain(*ids)), list(chain(*mask))


def _answer(tokenizer: Tokenizer, instruction: str, output: str, *, whole: bool) -> str:
    """What the chat template makes of an answer, or of its beginning, an end included."""
    messages = [_message("user", instruction), _message("assistant", output)]
    return tokenizer.chat.turns(messages, whole=whole)[0].answer


def _partial_answer(tokenizer: Tokenizer, instruction: str, prefix: str) -> str:
    """Render an answer in the chat template up to the prefix's end. Raises UserError if the template changes it."""
    prefix = tokenizer.chat.without_opening(prefix)
    before, found, _ = _answer(tokenizer, instruction, prefix + ".", whole=False).partition(prefix)
    if not found:
        raise _changed(tokenizer, prefix)
    return before + prefix


def _changed(tokenizer: Tokenizer, prefix: str) -> UserError:
    return UserError(f"chat template {tokenizer.chat_template} changes the partial answer {prefix[:40]!r}, so nothing "
                     "can go on from it; expected one that begins with a letter or digit and spells no control token")


def learn_all(encoded: Encoded) -> Encoded:
    """The same sequence with every token to learn that another one precedes."""
    return encoded._replace(response_start=1, answer_mask=[False] + [True] * (len(encoded.tokens) - 1))


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]], learnt: Learnt = "assistant_no_execution"
) -> list[Encoded]:
    """A chat in the tokenizer's template up to its last answer; answer_mask says what `learnt` names, the answers with
    what ends them or all, but for answers with "weight": 0.

    One sequence, but where the template writes what came before an answer in another way than it stood there when it
    was learnt itself (earlier thoughts are dropped): then another one begins, with the whole context of that answer.
    Raises UserError without template or answer, and for messages with blocks in a template that has none.
    """
    weights = [(message["role"], message.get("weight") != 0) for message in messages]
    if learnt == "all" and any(role != "assistant" and not is_kept for role, is_kept in weights):
        raise UserError("a message that is not the assistant's has weight 0, but all are to be learnt; leave it out")
    kept = [is_kept for role, is_kept in weights if role == "assistant"]
    if tokenizer.code:
        found = [_encode_pieces(tokenizer, blocks.message_pieces(messages), learnt, kept)]
    elif tokenizer.chat:
        found = _encode_turns(tokenizer, messages, learnt, kept)
    else:
        raise UserError("messages need a --chat_template: a built-in name, or file for the tokenizer's own")
    found = [(tokens, mask) for tokens, mask in found if any(mask)]
    if not found:
        raise UserError("a conversation holds no message of the assistant; there is nothing to learn from it")
    for _, mask in found:
        mask[0] = False  # nothing predicts the first token
    return [Encoded(tokens, mask.index(True), answer_mask=mask) for tokens, mask in found]


def _encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], learnt: Learnt, kept: Sequence[bool]
) -> list[Masked]:
    """A chat of plain texts in the tokenizer's template; kept: for each answer whether it is to be learnt."""
    if any(not isinstance(message["content"], str) for message in messages):
        raise UserError(f"a message holds blocks, which --chat_template {tokenizer.chat_template} has no form for; "
                        "train with --chat_template code")
    found: list[Masked] = [([], [])]
    for place, (prompt, answer, is_anew) in enumerate(tokenizer.chat.turns(messages)):
        if is_anew:
            found.append(([], []))
        tokens, mask = found[-1]
        # a context that stands there again may hold answers that are not to be learnt
        is_all = learnt == "all" and (not is_anew or all(kept[:place]))
        for text, is_learnt in ((prompt, is_all), (answer, kept[place])):
            ids = tokenizer.encode_rendered(text, start=tokenizer.begins_after(tokens))
            tokens += ids
            mask += [is_learnt] * len(ids)
    return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def split_steps(solution: str, step_end: str = STEP_END) -> list[str]:
    """The steps of a solution: its paragraphs, or what else step_end parts; blank ones are none. At least one."""
    return [step for step in solution.split(step_end) if step.strip()] or [solution]


def encode_steps(
    tokenizer: Tokenizer, instruction: str, steps: Sequence[str], labels: Sequence[float | None], *,
    finished: bool = True, step_end: str = STEP_END, form: str = "",
) -> Encoded:
    """Encode a solution in steps, each scored at its last token: the one place that says which token carries its score.

    Steps are tokenised apart, step_end after each but the last and EOS after that if it is finished, so that the
    position of every step's end is known by construction. A step with the label None is not scored. form: of a
    verifier that was trained elsewhere, which is shown steps as STEP_TOKENS says, or as _steps_as_turns() does.
    """
    if form == "rlhflow":
        return _steps_as_turns(tokenizer, instruction, steps, labels)
    prompt = encode_prompt(tokenizer, instruction)
    texts, tag = [step + step_end for step in steps[:-1]] + [steps[-1]], []
    if form:
        first, between, name = STEP_TOKENS[form]
        texts, finished = [first + steps[0], *(between + step for step in steps[1:])], False
        tag = [tokenizer.control[name]] if name in tokenizer.control else tokenizer.encode(name)
        if len(tag) != 1:
            raise UserError(f"{tokenizer.path} has no token {name!r}, at which verifiers of the form {form} are read; "
                            "give the tokenizer that this one was trained with")
    if tokenizer.chat:
        texts = _steps_in_template(tokenizer, instruction, texts, finished=finished)
    response: list[int] = []
    targets: list[float] = []
    pieces = blocks.pieces_of_steps(texts) if tokenizer.code else []
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        ends = [tokenizer.eos_id] if finished and number == len(texts) - 1 else tag
        if tokenizer.code:
            start = number == 0 or isinstance(pieces[number - 1][-1], Marker)
            response += [*chain(*tokenizer.encode_pieces(pieces[number], start=start)), *ends]
        elif tokenizer.chat:
            start = number == 0 and tokenizer.begins_after(prompt)
            response += tokenizer.encode_rendered(text, start=start) + tag
        else:
            response += tokenizer.encode(text, start=number == 0 and not form) + ends
        targets += [math.nan] * (len(response) - len(targets) - 1) + [math.nan if label is None else label]
    return Encoded(prompt + response, len(prompt), tuple(targets))


def _steps_as_turns(
    tokenizer: Tokenizer, instruction: str, steps: Sequence[str], labels: Sequence[float | None]
) -> Encoded:
    """Steps as a user's turns, the problem before the first; the verifier answers each with "+" or "-". As in Xiong et
    al. 2024 (github.com/RLHFlow/RLHF-Reward-Modeling, math-rm): "+" stands as every answer, and the score is read where
    an answer is predicted. Raises UserError for a template in which earlier turns change."""
    said = [f"{instruction} {steps[0]}", *steps[1:]]
    turns = [_message(role, text) for step in said for role, text in (("user", step), ("assistant", "+"))]
    last = encode_conversation(tokenizer, turns)[-1]
    tokens, is_answer = last.tokens, last.supervised
    ends = [place for place in range(len(tokens) - 1) if is_answer[place + 1] and not is_answer[place]]
    if len(ends) != len(steps):
        raise UserError(f"chat template {tokenizer.chat_template} shows {len(ends)} of {len(steps)} turns; a verifier "
                        "that answers turns needs one that keeps them all")
    targets = [math.nan] * (ends[-1] + 1)
    for place, label in zip(ends, labels, strict=True):
        targets[place] = math.nan if label is None else label
    return Encoded(tokens[: len(targets)], 1, tuple(targets[1:]))


def _steps_in_template(
    tokenizer: Tokenizer, instruction: str, texts: Sequence[str], *, finished: bool
) -> list[str]:
    """The steps of an answer as the chat template writes it: together they are the text of encode_response()."""
    chat = tokenizer.chat
    texts = [chat.without_opening(texts[0]) or texts[0], *texts[1:]]
    answer = _answer(tokenizer, instruction, "".join(texts), whole=finished).removesuffix(chat.suffix)
    # white space at the edges is the template's to keep or to drop
    texts[0] = texts[0].lstrip() or texts[0]
    texts[-1] = texts[-1].rstrip() or texts[-1]
    answer, content = answer.replace(MARK, ""), "".join(texts)
    before, found, after = answer.rpartition(content) if content else (answer, "", "")
    if content and not found:  # changed in between: then the words as they were given
        before = after = ""
    texts = [chat.shield(text) for text in texts]
    texts[0] = before + texts[0]
    texts[-1] += after + (chat.suffix if finished else "")
    return texts


def label_everywhere(encoded: Encoded, label: float) -> Encoded:
    """Let the label of a response be read at each of its tokens (Cobbe et al. 2021, token-level verifiers)."""
    return encoded._replace(targets=(label,) * encoded.n_response)


def masked_text(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """One example as the model sees it; what carries loss stands in double brackets."""
    parts = []
    pairs = zip(encoded.tokens, encoded.supervised, strict=True)
    for supervised, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], show_control=True)
        parts.append(f"[[{text}]]" if supervised else text)
    return "".join(parts)
