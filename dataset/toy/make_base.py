"""Make the toy domain's base checkpoint: a tokenizer and a small Llama that read the papers of a sloppy class.

python dataset/toy/make_base.py --save_dir dataset/toy/base --seed 1

The corpus holds what the base should half know, never the task itself: bare sums, unsolved exercises, and exercises
worked in another layout by pupils who get a hard sum wrong more often than right, some with the teacher's marks.
None of its exercises is in the toy domain's files. So the base scores 0 on the test, knows right and wrong results
side by side, and leaves it to fine-tuning, verifiers and rewards to tell which of them is wanted.
"""

import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import generate
import sentencepiece
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the repository is not

from src.checkpoint import convert  # noqa: E402
from src.checkpoint.export import export_hf  # noqa: E402
from src.checkpoint.shards import expected_shapes  # noqa: E402
from src.checkpoint.sources import open_source  # noqa: E402
from src.checkpoint.split import split  # noqa: E402
from src.checkpoint.tensor_files import StoredTensor  # noqa: E402
from src.checkpoint.weight_files import Source  # noqa: E402
from src.command import cli  # noqa: E402
from src.models.config import ModelConfig  # noqa: E402

VOCAB_SIZE = 640
CONFIG = ModelConfig(
    dim=96, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=12, ffn_dim=256, vocab_size=VOCAB_SIZE, max_seq_len=512
)
HARD_SLIP_RATE = 0.6
EASY_SLIP_RATE = 0.03


def random_sum(rng: random.Random) -> generate.Equation:
    """An equation of the sizes that the problems have."""
    operation = rng.choice("++--x/")
    if operation == "+":
        return generate.equation(rng.randint(2, 80), "+", rng.randint(2, 60))
    if operation == "-":
        left = rng.randint(6, generate.LARGEST)
        return generate.equation(left, "-", rng.randint(2, min(left - 2, 60)))
    small = rng.randint(2, 9) if operation == "x" else rng.randint(2, 6)
    other = rng.randint(2, generate.LARGEST // small)
    if operation == "x":
        return generate.equation(other, "x", small)
    return generate.equation(small * other, "/", small)


def slips_here(e: generate.Equation, rng: random.Random) -> bool:
    """Whether the corpus shows this sum wrong here: hard ones more often."""
    return rng.random() < (HARD_SLIP_RATE if generate.is_hard(e) else EASY_SLIP_RATE)


def sums(rng: random.Random) -> str:
    """A row of bare sums, in some rows with a mark after each."""
    marked, parts = rng.random() < 0.7, []
    for _ in range(rng.randint(4, 9)):
        truth = random_sum(rng)
        found = generate.slip(truth, rng) if slips_here(truth, rng) else truth
        parts.append(f"{generate.write(found)}.")
        if marked:
            parts.append("yes" if found == truth else "no")
    return " ".join(parts)


def exercises(rng: random.Random, seen: set[str]) -> str:
    """Exercises without solutions."""
    return " ".join(p.instruction for p in generate.distinct_problems(rng, rng.randint(2, 3), seen))


def paper(rng: random.Random, seen: set[str]) -> str:
    """An exercise as a pupil worked it; on some papers the teacher marks every step and then the whole."""
    (problem,) = generate.distinct_problems(rng, 1, seen, levels=(rng.choice(generate.LEVELS),))
    slips = [slips_here(generate.read_step(step), rng) for step in problem.steps]
    steps = generate.with_slips(problem, rng, slips)
    worded = rng.random() < 0.8
    blocks = [f"{text}: {generate.write(e)}." if worded else f"{generate.write(e)}." for text, e in steps]
    space = rng.choice((" ", "\n\n"))
    text = f"{problem.instruction} Solution: {space.join(blocks)}{space}It is {steps[-1][1].result}."
    if rng.random() < 0.6:
        truths = [generate.read_step(step) for step in problem.steps]
        right = [generate.same_step(e, truth) for (_, e), truth in zip(steps, truths, strict=True)]
        text += f" Marks: {' '.join('yes' if r else 'no' for r in right)}. {'Right' if all(right) else 'Wrong'}."
    return text


def corpus(seed: int, seen: set[str]) -> Iterator[str]:
    """Endless documents; no exercise twice, and none that is in `seen`."""
    rng = random.Random(f"{seed} corpus")
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield sums(rng)
        elif kind < 0.3:
            yield exercises(rng, seen)
        else:
            yield paper(rng, seen)


def train_tokenizer(seed: int) -> bytes:
    """A sentencepiece model, settings as Llama's, except that a blank line and #### are pieces of their own."""
    rng = random.Random(f"{seed} tokenizer")
    problems = generate.distinct_problems(rng, 4000, set())
    texts = [p.instruction for p in problems] + [generate.solution(p) for p in problems]
    documents = corpus(seed, set())
    texts += [next(documents) for _ in range(1000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n\n", "####"], character_coverage=1.0, max_sentence_length=8192,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )
    return model.getvalue()


def write_scratch(folder: Path, seed: int) -> None:
    """A checkpoint of random weights: normal, residual outputs scaled down by depth (as GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(CONFIG).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape)
            continue
        spread = 0.1 if name == "tok_embeddings.weight" else shape[1] ** -0.5
        if name.endswith(("wo.weight", "w2.weight")):
            spread /= (2 * CONFIG.n_layers) ** 0.5
        tensors[name] = torch.empty(shape).normal_(0, spread, generator=generator)
    stored = {name: StoredTensor(tuple(whole.shape), lambda whole=whole: whole, whole.dtype)
              for name, whole in tensors.items()}
    vocabulary = folder.with_name("tokenizer.model")
    vocabulary.write_bytes(train_tokenizer(seed))
    # taken for Hugging Face's, as they were when the committed base was made
    split(Source(CONFIG, convert.as_ours(stored, CONFIG), [vocabulary], []), folder, 1, "random weights")


def main(save_dir: str, documents: int = 150_000, lr: float = 4e-3, seed: int = 1) -> None:
    """Make the base checkpoint.

    save_dir: Hugging Face directory to write
    documents: corpus size
    lr: peak learning rate
    seed: seed of weights, tokenizer, corpus and order
    """
    here = Path(__file__).parent
    files = [json.loads((here / f"{name}.json").read_text()) for name in ("train", "test", "steps")]
    seen = {row["instruction"] for rows in files for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_scratch(work / "random", seed)
        texts = itertools.islice(corpus(seed, seen), documents)
        rows = [{"instruction": "", "output": text} for text in texts]
        (work / "corpus.json").write_text(json.dumps(rows), encoding="utf-8")
        command = ["solver_train.py", "--ckpt_dir", work / "random", "--save_dir", work / "trained", "--seed", seed,
                   "--train_file", work / "corpus.json", "--max_batch_size", "96", "--lr", lr, "--weight_decay", "0.05"]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        export_hf(open_source(str(work / "trained")), Path(save_dir), "make_base.py", dtype="bfloat16")


if __name__ == "__main__":
    cli.run(main)
