"""Continuous batching: finished rows leave their slot at once, waiting requests take it.

B rows in the batch, n slots, P vocabulary rows on this rank
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import parallel
from src.errors import UserError
from src.inference.sampling import Sampling, check_numbers, choose, uniforms
from src.inference.step import make_step, to_host
from src.models.cache import PREFILL_TOKENS, Layers, PromptCache, n_positions, shared_prefix
from src.models.decoder import Decoder
from src.models.linear import prepared
from src.models.quantize import packed
from src.text.blocks import text_form
from src.text.tokenizer import Tokenizer


class Request(NamedTuple):
    """A prompt to continue; (id, sample) names the result and seeds its randomness.

    max_new_tokens: this response's own limit below the sampling's; None: it has none.
    """

    id: str
    sample: int
    prompt: list[int]
    max_new_tokens: int | None = None


class Completion(NamedTuple):
    """What was sampled, and why it ended.

    tokens are all of the response, EOS or stop string and what a ToolHook appended included; text is what they say,
    without EOS or stop string. logprobs are the plain model's, sampled_logprobs those of the distribution that was
    sampled from, in nats; 0 for tokens that a ToolHook appended, where is_sampled is False. tool_results: how the runs
    of its tool ended, in order.
    """

    request: Request
    tokens: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    finish: str  # stop | length | what ToolHook says
    text: str
    is_sampled: list[bool]
    tool_results: Sequence[str] = ()


class ToolAnswer(NamedTuple):
    """How a paused row continues: tokens to append, perhaps none, or in `end` the reason why it ends. result: how the
    tool's run ended, "" where it ran nothing."""

    tokens: list[int]
    end: str = ""
    result: str = ""


class ToolHook(NamedTuple):
    """Rows that sample one of these ids pause, and a tool says how each continues.

    on_pause(rows) gets the request and the tokens of every row that paused in this step, and answers for each. All
    ranks of a tensor-parallel group call it and must get the same. max_new_tokens then bounds what is sampled between
    two pauses, or with `whole` all that is sampled of a response.
    """

    ids: tuple[int, ...]
    on_pause: Callable[[list[tuple[Request, list[int]]]], list[ToolAnswer]]
    whole: bool = False


class Vocabulary(NamedTuple):
    """What token ids mean to the engine: which end a response, how many are in use, how they read.

    Rows of the embedding from `size` on are padding and never sampled.
    """

    eos_ids: tuple[int, ...]
    size: int
    decode: Callable[[list[int]], str]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a model that speaks this tokenizer's ids."""

    def decode_blocks(ids: list[int]) -> str:
        """A solution with code in its text form, but for what ends it."""
        return text_form(tokenizer.decode_pieces(index for index in ids if index not in tokenizer.stop_ids))

    decode = decode_blocks if tokenizer.code else tokenizer.decode
    return Vocabulary(tuple(sorted(tokenizer.stop_ids)), tokenizer.vocab_size, decode)


class _Read(NamedTuple):
    """A prompt that has been read, and its requests that wait for a slot."""

    requests: deque[Request]
    cached: Layers  # what comes after the shared prefix
    logits: Tensor  # [P] of the position after the prompt


class _Sampled(NamedTuple):
    """A token for each of some slots, on its way from the device."""

    slots: list[int]
    turns: np.ndarray  # [B]: of a slot's requests the one that it is for; that may have ended since
    places: np.ndarray  # [B]: where in the responses the tokens stand
    numbers: Callable[[], Tensor]  # waits for them. -> [3, B] float64: tokens, logprobs, sampled_logprobs


@torch.inference_mode()
def generate(
    model: Decoder,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    vocabulary: Vocabulary,
    max_batch_size: int,
    on_token: Callable[[Request, int], None] | None = None,
    compiled: bool = False,
    tool_hook: ToolHook | None = None,
) -> Iterator[Completion]:
    """Yield completions as they finish; every tensor-parallel rank yields the same ones in the same order.

    At most max_batch_size rows decode at once. Requests with the same prompt share its reading, as does a prompt that
    another begins with; what all prompts begin with is read and kept once. on_token hears of every token as it is
    sampled. compiled: on a GPU, decode from compiled CUDA graphs. Raises UserError for a prompt that fills the model's
    context, and for a model whose logits are NaN.
    """
    for request in requests:
        if len(request.prompt) >= model.config.max_seq_len:
            raise UserError(f"prompt {request.id!r} has {len(request.prompt)} tokens but the model's context is "
                            f"{model.config.max_seq_len}; shorten or drop it")
    shortest = min((len(request.prompt) for request in requests), default=0)
    batch = DecodingBatch(model, sampling, vocabulary, min(max_batch_size, len(requests)), on_token,
                          compiled=compiled, tool_hook=tool_hook, shortest=shortest)
    batch.add(requests)
    with ready_to_decode(model, max_batch_size):
        yield from batch.run()


@contextlib.contextmanager
def ready_to_decode(model: Decoder, n_rows: int) -> Iterator[None]:
    """Inside, a model drops nothing out, and its weights are laid out for so many rows at a time; they must not
    change."""
    was_training = model.training
    model.eval()
    try:
        with prepared(model.linear_weights(), model.dtype, n_rows), packed(model):
            yield
    finally:
        model.train(was_training)


class DecodingBatch:
    """Requests of one Sampling: those waiting, those in slots and what was sampled there; more may join at any time.

    Arrays with a row for each slot hold the state, so that a step costs the same few operations for any batch.
    """

    def __init__(
        self, model: Decoder, sampling: Sampling, vocabulary: Vocabulary, n_slots: int,
        on_token: Callable[[Request, int], None] | None, *, compiled: bool = False, tool_hook: ToolHook | None = None,
        shortest: int = 1,
    ) -> None:
        """shortest: tokens of the shortest prompt that will come."""
        self.model, self.sampling, self.vocabulary, self.on_token = model, sampling, vocabulary, on_token
        self.tool_hook = tool_hook
        self.waiting: deque[list[deque[Request]]] = deque()
        self.read: deque[_Read] = deque()
        longest_response = model.config.max_seq_len - shortest
        if not tool_hook:
            longest_response = min(sampling.max_new_tokens, longest_response)
        self.step = make_step(model, n_slots, compiled=compiled)
        self.cache = self.step.cache
        self.requests: list[Request | None] = [None] * n_slots
        self.turns = np.zeros(n_slots, dtype=np.int64)  # requests that each slot has had
        self.limits = np.full(n_slots, -1, dtype=np.int64)  # -1: the slot is empty
        self.forced: list[deque[int]] = [deque() for _ in range(n_slots)]  # a tool's tokens, to be appended next
        self.newest = torch.zeros(n_slots, dtype=torch.int64, device=parallel.device())
        self.underway: deque[_Sampled] = deque()
        # A GPU computes the next token while this one is read, of a response that has ended in vain. A tool's token
        # must be known before
        self.n_ahead = 0 if self.newest.is_cpu or tool_hook else 1
        self.n_sampled = np.zeros(n_slots, dtype=np.int64)  # tokens of each response so far
        self.n_appended = np.zeros(n_slots, dtype=np.int64)  # those of them that are known here
        self.tokens = np.zeros((n_slots, longest_response), dtype=np.int64)
        self.logprobs = np.zeros((n_slots, longest_response), dtype=np.float32)
        self.sampled_logprobs = np.zeros((n_slots, longest_response), dtype=np.float32)
        self.is_sampled = np.zeros((n_slots, longest_response), dtype=bool)  # not appended by a tool
        self.tool_results: list[list[str]] = [[] for _ in range(n_slots)]
        self.uniforms = np.zeros((n_slots, longest_response))  # drawn at a response's start: no batch changes them
        self.bias = _local_bias(sampling, vocabulary, parallel.padded_share(model.config.vocab_size))  # [P] or None
        self.stop_window = 4 * max(map(len, sampling.stop), default=0) + 4  # a character is 4 tokens at most

    def add(self, requests: Sequence[Request]) -> None:
        """Let requests wait for slots, after those that wait already."""
        chains: list[list[deque[Request]]] = []  # by prompt, after one that begins with it: its reading gives theirs
        ordered = sorted(requests, key=lambda request: request.prompt, reverse=True)  # it comes right before them
        for prompt, same in groupby(ordered, key=lambda request: request.prompt):
            if not chains or chains[-1][0][0].prompt[: len(prompt)] != prompt:
                chains.append([])
            chains[-1].append(deque(same))
        # the longest first: prefill batches hold little padding, and what may run longest starts early
        self.waiting.extend(sorted(chains, key=lambda chain: (-len(chain[0][0].prompt), chain[0][0].prompt)))

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.read or any(self.requests))

    def run(self) -> Iterator[Completion]:
        """Prefill and decode until nothing is left; what all prompts begin with is read first, once for all."""
        prompts = [same[0].prompt for chain in self.waiting for same in chain]
        if n := shared_prefix(prompts):
            cache = PromptCache()
            self.model(parallel.to_device(torch.tensor([prompts[0][:n]])), cache=cache)
            self.cache.prefix = cache.row(0, n)
        while self.busy:
            yield from self.advance()

    def advance(self) -> Iterator[Completion]:
        """Prefill what there are slots for, then decode a token of every row; yield those that end."""
        if filled := self._fill_slots():
            self._sample(*filled)
            yield from self._append_due()
        if any(self.requests):
            self.cache.advance()  # rows may change places
            self._sample(self.cache.slots(), self.step(self.newest))
            yield from self._append_due()

    def cancel(self, request: Request) -> None:
        """Let a request end with its next token."""
        for slot in (slot for slot, held in enumerate(self.requests) if held is request):
            self.limits[slot] = self.n_sampled[slot] + 1  # it leaves as any other: its slot is freed in one place

    def _fill_slots(self) -> tuple[list[int], Tensor] | None:
        """Fill empty slots with waiting requests. -> their slots and the logits [B, P] after their prompts."""
        free = np.flatnonzero(self.limits == -1).tolist()
        # an eighth of the slots at a time: one forward then reads several prompts
        if self.waiting and not self.read and 8 * len(free) >= len(self.requests):
            self._prefill(len(free))
        filled, logits = [], []
        while free and self.read:
            read = self.read.popleft()
            slots, free = free[: len(read.requests)], free[len(read.requests) :]
            for slot in slots:
                self.requests[slot] = request = read.requests.popleft()
                room = self._room(request)
                limit = min(self.sampling.max_new_tokens, request.max_new_tokens or room, room)
                self.limits[slot], self.tool_results[slot] = limit, []
                self.n_sampled[slot] = self.n_appended[slot] = 0
                n = room if self.tool_hook else limit  # a tool's tokens come on top
                self.uniforms[slot, :n] = uniforms(self.sampling.seed, request.id, request.sample, n)
            self.cache.admit(slots, read.cached)
            filled += slots
            logits.append(read.logits.expand(len(slots), -1))
            if read.requests:  # the rest of this prompt's samples; the batch it was read in may go
                cached = [(keys.clone(), values.clone()) for keys, values in read.cached]
                self.read.appendleft(read._replace(cached=cached))
        return (filled, torch.cat(logits)) if filled else None

    def _prefill(self, n_slots: int) -> None:
        """Read prompts of like length in one forward: as many as have samples for n slots, within the budget."""
        chunk: list[list[deque[Request]]] = []
        shared = n_positions(self.cache.prefix)
        while self.waiting and sum(len(same) for chain in chunk for same in chain) < n_slots:
            longest = len((chunk or self.waiting)[0][0][0].prompt) - shared
            if chunk and shared + longest * (len(chunk) + 1) > PREFILL_TOKENS:  # one prompt may be longer than that
                break
            chunk.append(self.waiting.popleft())
        prompts = [torch.tensor(chain[0][0].prompt[shared:]) for chain in chunk]
        cache = PromptCache(self.cache.prefix)
        tokens = parallel.to_device(torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True))
        positions = torch.arange(shared, shared + tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.model(tokens, positions, cache)
        read = [(row, len(same[0].prompt) - shared, same) for row, chain in enumerate(chunk) for same in chain]
        last = torch.stack([hidden[row, length - 1] for row, length, _ in read])
        for (row, length, same), logits in zip(read, self.model.logits(last), strict=True):
            self.read.append(_Read(same, cache.row(row, length), logits))

    def _room(self, request: Request) -> int:
        """Tokens that the model's context has left after a prompt."""
        return self.model.config.max_seq_len - len(request.prompt)

    def _sample(self, slots: list[int], local_logits: Tensor) -> None:
        """Sample these slots' next tokens from local_logits [B, P]; _append() takes them from the device."""
        places = self.n_sampled[slots]
        u = parallel.to_device(torch.from_numpy(self.uniforms[slots, places]))
        choice = choose(local_logits, self.sampling, u, self.bias)
        self.newest.index_copy_(0, parallel.to_device(torch.tensor(slots)), choice.tokens)
        self.n_sampled[slots] += 1
        numbers = to_host(torch.stack([column.double() for column in choice]))
        self.underway.append(_Sampled(slots, self.turns[slots], places, numbers))

    def _append_due(self) -> Iterator[Completion]:
        """Append what was sampled, but for what a GPU may compute meanwhile; yield the completions that end with it."""
        # no token is sampled beyond a limit: its place in the context may not exist
        while len(self.underway) > self.n_ahead or self.underway and (self.n_sampled == self.limits).any():
            yield from self._append(self.underway.popleft())

    def _append(self, sampled: _Sampled) -> Iterator[Completion]:
        """Append tokens to their responses; yield and empty the slots that end."""
        # the only time in a step that a GPU is waited for
        numbers, held = sampled.numbers().numpy(), self.turns[sampled.slots] == sampled.turns
        slots = np.array(sampled.slots)[held].tolist()
        places = slots, sampled.places[held]
        check_numbers(numbers[1, held], f"request {self.requests[slots[0]].id!r}" if slots else "")
        self.tokens[places], self.logprobs[places], self.sampled_logprobs[places] = numbers[:, held]
        is_sampled = self.is_sampled[places] = self._force_tokens(slots)
        self.n_appended[slots] += 1
        tokens = self.tokens[places]
        if self.on_token:
            for slot, token in zip(slots, tokens.tolist(), strict=True):
                self.on_token(self.requests[slot], token)
        stopped = is_sampled & np.isin(tokens, self.vocabulary.eos_ids)
        ended = stopped | (self.n_appended[slots] == self.limits[slots])
        if self.tool_hook:
            paused = is_sampled & ~ended & np.isin(tokens, self.tool_hook.ids)
            yield from self._continue_paused([slot for slot, here in zip(slots, paused, strict=True) if here])
        for slot, eos, end in zip(slots, stopped.tolist(), ended.tolist(), strict=True):
            if end or (self.sampling.stop and self.requests[slot]):
                text, cut = self._text(slot, end)
                if end or cut:
                    yield self._completion(slot, text, "stop" if eos or cut else "length")

    def _force_tokens(self, slots: list[int]) -> np.ndarray:
        """Overwrite what was sampled by the tokens that tools append. -> [B] bool, False there."""
        sampled = np.array([not self.forced[slot] for slot in slots], dtype=bool)
        for slot in (slot for slot in slots if self.forced[slot]):
            place = slot, self.n_appended[slot]
            self.tokens[place] = self.newest[slot] = self.forced[slot].popleft()
            self.logprobs[place] = self.sampled_logprobs[place] = 0
        return sampled

    def _continue_paused(self, slots: list[int]) -> Iterator[Completion]:
        """Ask the tool how these paused slots continue; yield and empty those that it ends."""
        rows = [(self.requests[slot], self.tokens[slot, : self.n_appended[slot]].tolist()) for slot in slots]
        answers = self.tool_hook.on_pause(rows) if rows else ()
        for slot, (request, _), answer in zip(slots, rows, answers, strict=True):
            self.tool_results[slot] += [answer.result] * bool(answer.result)
            if answer.end:
                yield self._completion(slot, self._text(slot, True)[0], answer.end)
                continue
            self.forced[slot] = deque(answer.tokens)
            limit = self.limits[slot] if self.tool_hook.whole else self.n_appended[slot] + self.sampling.max_new_tokens
            self.limits[slot] = min(limit + len(answer.tokens), self._room(request))

    def _text(self, slot: int, ended: bool) -> tuple[str, bool]:
        """What a row says, up to its first stop string, and whether there is one; empty while nothing ends it."""
        tokens = self.tokens[slot, : self.n_appended[slot]].tolist()
        decode = self.vocabulary.decode
        # while a row goes on, the newest tokens alone are looked at: to decode all at each step would be quadratic
        if not ended and not self.sampling.until_stop(decode(tokens[-self.stop_window :]))[1]:
            return "", False
        text, stop = self.sampling.until_stop(decode(tokens))
        return text, bool(stop)

    def _completion(self, slot: int, text: str, finish: str) -> Completion:
        """The row of a slot, which is emptied."""
        n = self.n_appended[slot]
        columns = (self.tokens, self.logprobs, self.sampled_logprobs, self.is_sampled)
        *numbers, is_sampled = (column[slot, :n].tolist() for column in columns)
        completion = Completion(self.requests[slot], *numbers, finish, text, is_sampled, self.tool_results[slot])
        self.requests[slot], self.limits[slot] = None, -1
        self.turns[slot] += 1
        self.forced[slot].clear()
        self.cache.release(slot)
        return completion


def _local_bias(sampling: Sampling, vocabulary: Vocabulary, rows: range) -> Tensor | None:
    """What is added to the logits of this rank's rows of the vocabulary: the bias that was asked for, -inf for padding;
    None for nothing. -> [P] float32."""
    bias = torch.zeros(len(rows))
    pads = vocabulary.size < len(rows) * parallel.tensor_parallel_size()
    if pads:
        bias[max(0, vocabulary.size - rows.start) :] = float("-inf")
    for index, value in sampling.logit_bias.items():
        if index in rows:
            bias[index - rows.start] += value
    # every rank adds or none: a sum with zeros may not decide what another rank does
    return parallel.to_device(bias) if pads or sampling.logit_bias else None
