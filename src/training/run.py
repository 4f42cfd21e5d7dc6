"""What the trainers that go over the rows of a file do alike: their rows, encoded once, the run, its log, its speed."""

import contextlib
import hashlib
import json
import os
import sys
import time
import timeit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch

from src import load, parallel, runlog
from src.checkpoint import saving
from src.checkpoint.shards import expected_shapes
from src.checkpoint.sources import open_source
from src.checkpoint.tensor_files import file_hash
from src.command.config import TrainConfig
from src.data.batch import Batch, BatchSampler, Dataset, Step
from src.data.encoded_rows import EncodedRows, Fill, Keep, Sample, in_temporary_file, write
from src.errors import UserError
from src.jsonfile import flush, read_json, telling_full_disk, write_json
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.linear import linear
from src.processes import heap, watchdog
from src.runlog import RunLog, warn_of_early_end
from src.text.tokenizer import Tokenizer
from src.trackers import check_trackers
from src.training.checkpointer import Checkpointer, Trainee
from src.training.resuming import find_start, run_fingerprint
from src.training.trainer import StepReport, Trainer


class Run:
    """A run of a trainer over rows: keep() says where they lie, begin() counts its steps before the model is loaded,
    open() takes it up once it is, then steps()."""

    def __init__(self, config: TrainConfig, trainer: str, tokenizer: Tokenizer, model: ModelConfig) -> None:
        """Start the ranks. Raises UserError for ranks that cannot share the model, and for a save_dir that would
        overwrite what the run reads, or that holds another run. A dry run starts and writes nothing."""
        self.config = config
        self.trained = load.Trained(load.lora_config(config, config.lora_dropout), config.seed)
        self._tokenizer, self._learns_tokens = tokenizer, trainer != "verifier_train"
        n_shards = load.tensor_parallel_size(config.ckpt_dir, config.tensor_parallel_size)
        sharing = config.context_parallel_size
        batches = load.check_context_parallel({config.ckpt_dir: model}, sharing, n_shards)
        self.sampler = BatchSampler(
            max_batch_size=config.max_batch_size, accumulation_steps=config.accumulation_steps, seed=config.seed,
            rank=parallel.rank() // (n_shards * sharing), ranks=batches)
        if not config.dry_run:
            # All that can be refused is refused here, before the minutes that rows and model take
            parallel.start(config.seed, n_shards, config.replicas, sharing)
            saving.check_save_dir(config.save_dir, config.ckpt_dir)
            check_trackers(config.trackers)
            self._fingerprint = run_fingerprint(
                trainer, config.flags(), tokenizer, rows_a_step=self.sampler.rows_per_step,
                precision=str(parallel.compute_dtype(config.precision)).removeprefix("torch."))
            find_start([config.save_dir], config.resume, self._fingerprint, sys.maxsize, not_yet=("rows",))
            self._identity = rows_identity(self._fingerprint)

    def keep(self, name: str) -> Keep:
        """Where rows of this name lie: in the run's directory, for a dry run in a file that is gone with it."""
        if self.config.dry_run:
            return in_temporary_file
        return KeptRows(Path(self.config.save_dir) / "rows" / f"{name}.ids", self._identity)

    def begin(self, data: Dataset) -> None:
        """Count the steps. Raises UserError for a save_dir with a run of more of them, or of other rows, and for
        adapters where no adapter can learn the rows."""
        config, n_rows = self.config, len(data.samples)
        self.steps_per_epoch = self.sampler.steps_per_epoch(n_rows)
        total = config.epochs * self.steps_per_epoch
        self.total_steps = min(total, config.max_steps) if config.max_steps >= 0 else total
        if not config.dry_run:
            self._fingerprint |= {"rows": n_rows}  # known only now: whether the run goes on is asked once more
            find_start([config.save_dir], config.resume, self._fingerprint, self.total_steps)
            if self.trained.lora and self._learns_tokens:
                self._check_tokens_apart(data.samples[:TOLD_APART])

    def _check_tokens_apart(self, samples: Sequence[Sample]) -> None:
        """Raise UserError where a token that ends or parts responses has the same row of the output layer as another:
        their logits are equal, and stay so under adapters, which leave that layer alone. Tokens that were added to a
        vocabulary are alike, and so are those that a base model has never seen."""
        names = {token: name for name, token in self._tokenizer.control.items()}
        learnt = {token for sample in samples for encoded in sample
                  for token in compress(encoded.tokens, encoded.supervised) if token in names}

        def find() -> list[int]:
            """Those of them that are like another token."""
            tensors = open_source(self.config.ckpt_dir).tensors
            rows = tensors["output.weight" if "output.weight" in tensors else "tok_embeddings.weight"].load()  # [V, D]
            # the first number tells most of them apart
            near = {token: rows[rows[:, 0] == rows[token, 0]] for token in sorted(learnt)}
            return [token for token, others in near.items() if (others == rows[token]).all(1).sum() > 1]

        if alike := parallel.from_first_rank(find):
            raise UserError(
                f"{self.config.ckpt_dir} has for {', '.join(names[token] for token in alike)} the same weights as for "
                "another token, and adapters leave them so: no training could tell them apart; train all weights first "
                "(--lora_rank -1)")

    def planned_steps(self, data: Dataset) -> Iterator[Step]:
        """All steps, of the forward passes that ranks make at the same time the longest."""
        longest = replace(self.sampler, rank=-1)
        return longest.steps(data, packing=self.config.packing, epochs=self.config.epochs, stop=self.total_steps)

    def open(self, model: Decoder, log: RunLog) -> None:
        """Give the model, `trained`, an optimizer and a place to be saved; take up what an earlier start saved."""
        config = self.config
        saving.record(model, **self._tokenizer.chat_facts())
        self.log = log
        self.trainer = Trainer(model, log, config, total_steps=self.total_steps, optimizer=config.optimizer)
        self.checkpointer = Checkpointer(
            log, [Trainee(config.save_dir, self.trainer, config.ckpt_dir)], config, lora=self.trained.lora,
            tokenizer_file=config.tokenizer_file, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps,
            run_fingerprint=self._fingerprint)
        model.train()  # dropout before adapters
        # After the trainer is made: it owns the parameters, shared over the data-parallel ranks, that resume() fills
        self._done = self.checkpointer.resume(config.resume)
        warn_of_early_end(self.total_steps, config.epochs, config.max_steps)
        log.progress(self.total_steps, "step", self._done)
        self._meter = ThroughputMeter(model.config, model.dtype)

    def steps(self, data: Dataset) -> Iterator[Step]:
        """The steps that are left to do, on this rank."""
        config = self.config
        return self._meter.timed(self.sampler.steps(
            data, packing=config.packing, epochs=config.epochs, done=self._done, stop=self.total_steps))

    def log_step(
        self, step: Step, report: StepReport, supervised: float, metrics: Mapping[str, float] | None = None,
        **counts: float,
    ) -> None:
        """Write what a step did to metrics.jsonl. supervised: tokens or labels that its loss is a mean over."""
        measured = self._meter.measure(step.batches, supervised)
        said = {**(metrics or {}), **report._asdict()}
        self.log.metrics(step.number, epoch=step.epoch, **said, **counts, **measured)
        self.log.advance(tokens=int(measured["tokens"]), loss=report.loss)

    def is_eval_due(self, step: Step) -> bool:
        """Whether held-out rows are measured after this step."""
        return self.config.is_eval_due(step.number, self.steps_per_epoch, self.total_steps)


class ThroughputMeter:
    """Measures steps for metrics.jsonl. Every rank makes one and calls the same methods in the same order.

    What a step spends in collectives is for torch.profiler to say: its gloo: and nccl: events, on the CPU with the
    waiting for slower ranks.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """dtype: of the products, whose best rate here counts as all there is."""
        shapes = expected_shapes(config)
        self._weights = sum(shape[0] * shape[1] for name, shape in shapes.items()
                            if len(shape) == 2 and name not in ("tok_embeddings.weight", "output.weight"))
        self._weights -= config.idle_weights
        self._head = config.vocab_size * config.dim if not config.value_head else 0
        self._attention = 6 * config.n_layers * config.n_heads * config.head_dim
        self.peak = matrix_rate(dtype)
        self._data_seconds, self._began = 0.0, time.perf_counter()

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps, with the time taken to lay each of them out noted."""
        began = time.perf_counter()
        for step in steps:
            self._began = time.perf_counter()
            self._data_seconds = self._began - began
            yield step
            began = time.perf_counter()

    def measure(self, batches: Sequence[Batch], supervised: float) -> dict[str, float]:
        """Numbers of the step that has just ended; `supervised` tokens or pairs are counted over all ranks.

        mfu: 6 FLOP for each matrix weight that a token passes - the output layer's only where it is supervised - and
        6 L H E S for causal attention within samples of length S (after Chowdhery et al. 2022, appendix B), a second
        and rank, as a share of the rate at which this rank multiplied matrices before training. Recomputation and
        LoRA's smaller backward pass are not taken into account.
        data_seconds passed before the step began; step_seconds hold computation and communication.
        """
        seconds = time.perf_counter() - self._began  # step() has read the loss: the device is done
        counts = [(int(batch.sample_lengths().sum()), batch.n_attended(), batch.tokens.numel()) for batch in batches]
        own = torch.tensor(counts, dtype=torch.float64).sum(0)
        n_tokens, squares, held = parallel.join_over_data_parallel(own).tolist()  # one message
        flops = 6 * (self._weights * n_tokens + self._head * supervised) + self._attention * squares
        return {
            "tokens": n_tokens,
            "tokens_per_second": n_tokens / seconds,
            "supervised_per_second": supervised / seconds,
            "mfu": flops / (seconds * self.peak * parallel.world_size()),
            "padding_share": 1 - n_tokens / held,
            "peak_memory": heap.peak_memory(),
            "data_seconds": self._data_seconds,
            "step_seconds": seconds}


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP a second of one square matrix product here in this type; the best of five."""
    size = 8192 if parallel.device().type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=parallel.device())
    # by the library that multiplies in training
    return 2 * size**3 / min(timeit.repeat(lambda: linear(a, a)[0, 0].item(), number=1, repeat=5))


TOLD_APART = 100  # first rows whose control tokens are looked at
LOOK_SECONDS = 0.1  # between two looks for the file that rank 0 makes
_CODE = ("data", "text", "training")  # of src/: what makes ids of rows


def rows_identity(run_fingerprint: Mapping[str, object]) -> str:
    """What the rows of a run are known by: its data by contents, its tokenizer, every flag that is compared when it is
    resumed, and the code."""
    root = Path(__file__).parents[1]
    code = [file_hash(file) for name in _CODE for file in sorted((root / name).rglob("*.py"))]
    return hashlib.sha256(json.dumps([dict(run_fingerprint), code]).encode()).hexdigest()


class KeptRows(NamedTuple):
    """Where some rows of a run are kept: `path`, with a `.json` that says of which identity they are, and their hash.
    The latter comes last: what a kill leaves counts for nothing, and is made again."""

    path: Path
    identity: str

    def __call__(self, fill: Fill) -> tuple[EncodedRows, str]:
        """The samples and what fill() said when they were made: by rank 0, while the others wait. All ranks call this;
        nothing is sent, for a collective has a time limit. Raises UserError for a full disk."""
        found = self._find()
        if found is None and parallel.rank() == 0:
            self._write(fill)
            found = self._find()
            if found is None:
                raise UserError(f"{self.path} does not read as it was written a moment ago; use another disk")
        while found is None:
            time.sleep(LOOK_SECONDS)
            watchdog.got_on()  # rank 0 may read for long before it writes; when it is gone is told elsewhere
            found = self._find()
        return found

    def _find(self) -> tuple[EncodedRows, str] | None:
        """The samples that lie there; None where there are none, or others, or damaged ones."""
        with contextlib.suppress(UserError):  # no file, or none of ours
            facts = read_json(self.path.with_suffix(".json"))
            if facts.get("identity") == self.identity and facts.get("blake3") == file_hash(self.path):
                return EncodedRows(self.path), str(facts.get("report"))
        return None

    def _write(self, fill: Fill) -> None:
        log, began = runlog.logger(), time.monotonic()
        facts, unfinished = self.path.with_suffix(".json"), self.path.with_suffix(".partial")
        if facts.exists():
            log.info("%s is of other data, flags or code, or damaged: it is made again", self.path)
        self.path.parent.mkdir(exist_ok=True)
        facts.unlink(missing_ok=True)
        try:
            with telling_full_disk(self.path, "--dry_run says how much the encoded rows take"):
                with unfinished.open("wb") as file:
                    report = write(file, fill)
                flush(unfinished)
                os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        size = self.path.stat().st_size
        write_json(facts, {"identity": self.identity, "blake3": file_hash(self.path), "report": report})
        log.info("%s: encoded rows, %.1f MB in %.0f s", self.path, size / 1e6, time.monotonic() - began)
