"""Training a process verifier beside one sequence a step, and scoring samples beside a loop over transformers.

python benchmarks/verifier.py [--rounds 10]

training: all steps of a solution in one packed forward, against a sequence of its own for every step (how easy-to-hard
and gpt-accelera train), padded to the longest of its micro-batch; the same model, optimizer and rows on both sides. The
losses of every update must agree before a time counts. scoring: verifier_evaluate.py's scorer against padded batches
in the order of the file through transformers; the scores must agree. CPU, float32; both sides take turns.
"""

import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.paired import interval  # noqa: E402
from src import load, parallel  # noqa: E402
from src.checkpoint import saving  # noqa: E402
from src.checkpoint.sources import open_source  # noqa: E402
from src.checkpoint.split import split  # noqa: E402
from src.command import cli  # noqa: E402
from src.command.config import OptimizerFlags  # noqa: E402
from src.data.batch import Batch, BatchSampler, chunks, make_batch  # noqa: E402  # noqa: E402
from src.data.encoding import Encoded, encode_steps, split_steps  # noqa: E402
from src.data.examples import Sample, StepLabels  # noqa: E402
from src.evaluation.scoring import score_samples  # noqa: E402
from src.losses import label_loss  # noqa: E402
from src.models.decoder import Decoder  # noqa: E402
from src.runlog import RunLog  # noqa: E402
from src.text.tokenizer import Tokenizer  # noqa: E402
from src.training.reward_model import label_dataset, read_scores  # noqa: E402
from src.training.trainer import Trainer  # noqa: E402

MODELS = {
    "5M": (256, 4, 4, 688),
    "60M": (768, 8, 12, 2048),
}  # width, layers, heads, width of the feed-forward
VOCAB, CONTEXT = 640, 1024
LOSS_LIMIT, SCORE_LIMIT = 1e-4, 1e-4


class Time(NamedTuple):
    """Of one call: wall clock and processor, seconds."""

    wall: float
    processor: float


def timed(work: Callable[[], object]) -> tuple[object, Time]:
    """What the work returns, and its time."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, Time(time.perf_counter() - wall, time.process_time() - processor)


def write_model(model: str, folder: Path) -> None:
    """A random Llama with the toy's tokenizer as a Hugging Face directory and, split, as ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, layers, heads, ffn = MODELS[model]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=dim, intermediate_size=ffn, max_position_embeddings=CONTEXT,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                         tie_word_embeddings=False, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    tokenizer = (ROOT / "dataset" / "toy" / "base" / "tokenizer.model").read_bytes()
    (folder / "hf" / "tokenizer.model").write_bytes(tokenizer)
    split(open_source(str(folder / "hf")), folder / "ours", 1, "benchmark")


def open_verifier(folder: Path) -> Decoder:
    """The model with a random value head, the same at every call."""
    verifier = load.load_verifier(str(folder / "ours"), trained=load.Trained(), from_solver=True)
    with torch.no_grad():
        verifier.v_head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    saving.record(verifier, objective="process", score="steps")
    return verifier


def solution(rng: random.Random, median_steps: int) -> list[str]:
    """Steps of about the length of GSM8K's; their number is lognormal."""
    n = max(2, min(20, round(median_steps * rng.lognormvariate(0, 0.4))))
    numbers = lambda: " + ".join(str(rng.randint(1, 99)) for _ in range(rng.randint(3, 6)))  # noqa: E731
    return [f"She counts what is there and finds {numbers()} = {rng.randint(1, 999)}." for _ in range(n)]


PROBLEM = "Ana has 34 seeds. She sells 4 bags of 4 and keeps half of them. She opens 5 boxes of 9. How many are there?"


def one_sequence_a_step(tokenizer: Tokenizer, row: StepLabels) -> list[Encoded]:
    """Every step behind those before it in a sequence of its own, only its end judged."""
    whole = encode_steps(tokenizer, row.instruction, row.steps, row.labels)
    ends = [place for place, target in enumerate(whole.targets) if not math.isnan(target)]
    return [
        Encoded(
            whole.tokens[: whole.response_start + end + 1],
            whole.response_start,
            (math.nan,) * end + (whole.targets[end],),
        )
        for end in ends
    ]


def train(folder: Path, rounds: int, solutions: int, rows_a_forward: int) -> None:
    """Updates on both sides in turns; print labelled steps a second and the ratio."""
    tokenizer, rng = load.load_tokenizer(str(folder / "ours")), random.Random(3)
    rows = [
        StepLabels(PROBLEM, steps, [float(rng.random() < 0.6) for _ in steps])
        for steps in (solution(rng, 6) for _ in range(solutions * (rounds + 1)))
    ]
    data, _ = label_dataset(rows, tokenizer, max_seq_len=CONTEXT, source="rows")
    by_tokens = {tuple(sample.tokens): row for (sample,), row in zip(data.samples, rows, strict=True)}
    trainers = [Trainer(open_verifier(folder), RunLog(str(folder), {}), OptimizerFlags(lr=1e-4), total_steps=rounds + 1)
             for _ in range(2)]

    def update(trainer: Trainer, batches: Sequence[Batch]) -> float:
        n = sum(batch.n_targets for batch in batches)
        for batch in batches:
            scores, labels = read_scores(trainer.model, batch)
            trainer.backward(label_loss(scores, labels).sum() / n, last=batch is batches[-1])
        return trainer.step().loss

    batching = BatchSampler(max_batch_size=solutions, accumulation_steps=1, seed=1)
    found: list[tuple[Time, Time]] = []
    counts, gap = [], 0.0
    for number, (_, _, (packed,)) in enumerate(batching.steps(data, packing=True, epochs=1)):
        samples = packed.tokens[0].split(packed.sample_lengths().tolist())
        alone = [
            each for ids in samples for each in one_sequence_a_step(tokenizer, by_tokens[tuple(ids.tolist())])
        ]
        padded = [
            make_batch(part, with_targets=True) for part in chunks(alone, rows_a_forward)
        ]
        order = [(0, [packed]), (1, padded)]
        sides = {side: timed(lambda side=side, batches=batches: update(trainers[side], batches))
                 for side, batches in (order if number % 2 else order[::-1])}
        gap = max(gap, abs(sides[0][0] - sides[1][0]))
        if number:  # the first one warms up
            found.append((sides[0][1], sides[1][1]))
            counts.append(packed.n_targets)
    if gap > LOSS_LIMIT:
        raise SystemExit(f"the losses differ by {gap:.1e}, more than {LOSS_LIMIT}: no comparison")
    tell(
        "training, labelled steps/s",
        "one sequence a step",
        found,
        sum(counts) / len(counts),
        f"loss gap {gap:.0e}",
    )


def transformers_scorer(
    folder: Path, tokenizer: Tokenizer, batch_size: int
) -> Callable[[Sequence[Sample]], list[list[float]]]:
    """A plain loop: encode, pad to the longest of each batch in the order of the file, read the ends of the steps."""
    from transformers import LlamaModel

    model = LlamaModel.from_pretrained(folder / "hf").eval()
    head = open_verifier(folder).v_head.weight.detach()

    @torch.no_grad()
    def score(samples: Sequence[Sample]) -> list[list[float]]:
        scores: list[list[float]] = []
        for part in chunks(samples, batch_size):
            encoded = []
            for sample in part:
                steps = split_steps(sample.response)
                encoded.append(encode_steps(tokenizer, sample.prompt, steps, [0.0] * len(steps)))
            batch = make_batch(encoded, with_targets=True)
            lengths = torch.tensor([len(row.tokens) for row in encoded])
            mask = torch.arange(batch.tokens.shape[1]) < lengths[:, None]
            hidden = model(input_ids=batch.tokens, attention_mask=mask.long()).last_hidden_state
            logits: Tensor = torch.sigmoid((hidden @ head.T)[..., 0])
            scores += [
                row[~targets.isnan()].tolist() for row, targets in zip(logits, batch.targets, strict=True)
            ]
        return scores

    return score


def score(folder: Path, rounds: int, n_samples: int, batch_size: int) -> None:
    """Score the same samples on both sides in turns; print samples a second and the ratio."""
    rng = random.Random(4)
    samples = [Sample(str(n), 0, PROBLEM, "\n\n".join(solution(rng, 5)), None, {"finish": "stop"})
               for n in range(n_samples)]
    verifier, tokenizer = open_verifier(folder), load.load_tokenizer(str(folder / "ours"))
    log = RunLog(str(folder), {})

    def ours() -> list[list[float]]:
        path = folder / "scores.jsonl"
        path.unlink(missing_ok=True)
        found = score_samples(verifier, tokenizer, samples, aggregation="prod", max_batch_size=batch_size, path=path,
                              log=log)
        return [each.step_scores for each in found]

    plain = transformers_scorer(folder, tokenizer, batch_size)
    found, gap = [], 0.0
    for number in range(rounds + 1):
        order = [(0, ours), (1, lambda: plain(samples))]
        sides = {side: timed(work) for side, work in (order if number % 2 else order[::-1])}
        gap = max(gap, max(abs(a - b) for one, other in zip(sides[0][0], sides[1][0], strict=True)
                           for a, b in zip(one, other, strict=True)))
        if number:
            found.append((sides[0][1], sides[1][1]))
    if gap > SCORE_LIMIT:
        raise SystemExit(f"the scores differ by {gap:.1e}, more than {SCORE_LIMIT}: no comparison")
    tell("scoring, samples/s", "transformers, padded", found, n_samples, f"score gap {gap:.0e}")


def tell(what: str, other: str, found: Sequence[tuple[Time, Time]], work: float, parity: str) -> None:
    """One line for each clock: rates, and the ratio of the times with its interval over the rounds."""
    print(f"{what}; {parity}; {len(found)} rounds, load {os.getloadavg()[0]:.1f}")
    for field in Time._fields:
        ours, theirs = (np.array([getattr(pair[side], field) for pair in found]) for side in (0, 1))
        low, high = interval(theirs / ours)
        print(
            f"  {field:10} ours {work / np.median(ours):8.1f}   {other} {work / np.median(theirs):8.1f}   "
            f"x{np.median(theirs / ours):.2f} ({low:.2f} .. {high:.2f})",
            flush=True,
        )


def main(
    model: Literal["5M", "60M"] = "5M",
    rounds: int = 8,
    solutions: int = 16,
    rows_a_forward: int = 16,
    samples: int = 256,
    max_batch_size: int = 32,
    threads: int = 1,
) -> None:
    """Print both comparisons.

    model: size of the random model
    rounds: measurements of each side, behind one that warms up
    solutions: judged solutions of one update
    rows_a_forward: sequences in one forward pass of the side with a sequence for each step
    samples: samples to score
    max_batch_size: samples scored at once
    threads: of both sides
    """
    torch.set_num_threads(threads)
    parallel.start()
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        train(Path(folder), rounds, solutions, rows_a_forward)
        score(Path(folder), rounds, samples, max_batch_size)


if __name__ == "__main__":
    cli.run(main)
