"""Continuous batching for callers that come and go: requests join the batch that runs, whoever asks."""

from queue import Empty, SimpleQueue
from typing import NamedTuple, NoReturn

import torch

from src.inference.engine import Completion, DecodingBatch, Request, Vocabulary
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.runlog import logger


class Job:
    """Requests of one caller: `events` gets the place and the end of each, or what kept it from ending, before it every
    token if the job streams.

    Requests whose Sampling is the same decode in one batch; what seeds a request's randomness is its id. A caller that
    has lost interest sets `cancelled`.
    """

    def __init__(
        self, model: Decoder, requests: list[Request], sampling: Sampling, vocabulary: Vocabulary, *, streams: bool
    ) -> None:
        self.model, self.requests, self.sampling, self.vocabulary = model, requests, sampling, vocabulary
        self.streams, self.cancelled = streams, False
        self.events: SimpleQueue[tuple[int, int | Completion | Exception]] = SimpleQueue()


class _Place(NamedTuple):
    """Where a request that is under way belongs."""

    job: Job
    place: int
    batch: DecodingBatch
    request: Request


class ServingEngine:
    """Decodes jobs in one thread, the one that calls run(); any thread may submit them."""

    def __init__(self, n_slots: int, *, compiled: bool = False) -> None:
        """n_slots: sequences that decode at once in one batch."""
        self.n_slots, self.compiled = n_slots, compiled
        self._arrived: SimpleQueue[Job] = SimpleQueue()
        self._batches: dict[object, DecodingBatch] = {}  # by what its requests share: model, sampling and ends
        self._places: dict[int, _Place] = {}  # by the identity of the request: equal ones may be under way

    def submit(self, job: Job) -> None:
        """Take a job; returns at once."""
        self._arrived.put(job)

    @torch.inference_mode()
    def run(self) -> NoReturn:
        """Decode for ever: a token of every row of every batch, then whoever has come meanwhile joins."""
        while True:
            self._admit()
            for key, batch in list(self._batches.items()):
                try:
                    for done in batch.advance():
                        found = self._places.pop(id(done.request))
                        found.job.events.put((found.place, done))
                except Exception as trouble:  # of this model's adapter, or of memory: the other batches go on
                    logger().warning("a batch ended with %s: %s", type(trouble).__name__, trouble)
                    for name in [name for name, found in self._places.items() if found.batch is batch]:
                        found = self._places.pop(name)
                        found.job.events.put((found.place, trouble))
                    del self._batches[key]
                    continue
                if not batch.busy:
                    del self._batches[key]

    def _admit(self) -> None:
        """Let waiting jobs join, those of one batch at once: equal prompts are then read once."""
        joining: dict[object, list[Request]] = {}
        while True:
            try:
                job = self._arrived.get(block=not self._batches and not joining)
            except Empty:
                break
            key = job.model, repr(job.sampling), job.vocabulary.eos_ids
            if key not in self._batches:
                self._batches[key] = DecodingBatch(job.model, job.sampling, job.vocabulary, self.n_slots, self._sampled,
                                                   compiled=self.compiled)
            for place, request in enumerate(job.requests):
                self._places[id(request)] = _Place(job, place, self._batches[key], request)
            joining.setdefault(key, []).extend(job.requests)
        for key, requests in joining.items():
            self._batches[key].add(requests)
        for found in self._places.values():
            if found.job.cancelled:
                found.batch.cancel(found.request)

    def _sampled(self, request: Request, token: int) -> None:
        found = self._places[id(request)]
        if found.job.streams:
            found.job.events.put((found.place, token))
