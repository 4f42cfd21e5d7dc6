"""What every builder of training files reads and writes: graded samples in, a json array out."""

import json
import os
from collections import Counter
from pathlib import Path

from src import runlog
from src.construct.problems import ErrorPlace, without_phrases
from src.data.examples import Sample, read_samples
from src.errors import UserError


def read_graded(samples_file: str, save_file: str) -> list[Sample]:
    """The samples of a graded file. Raises UserError, also when the rows could not be saved afterwards."""
    if Path(save_file).is_dir():
        raise UserError(f"--save_file {save_file} is a directory; expected the name of a json file")
    samples = read_samples(samples_file)
    if not any(sample.outcome for sample in samples):
        raise UserError(
            f"{samples_file} has no outcomes; grade it first with solver_evaluate.py --samples_file"
        )
    return samples


def read_faultless(
    samples_file: str, save_file: str, error_phrases: list[str], error_place: ErrorPlace
) -> list[Sample]:
    """The samples of a graded file but for right ones with one of the phrases there, counted. Raises UserError."""
    samples = read_graded(samples_file, save_file)
    kept = without_phrases(samples, error_phrases, error_place)
    if error_phrases:
        runlog.logger().info("%d right samples left out: they speak of an error", len(samples) - len(kept))
    return kept


def save(
    rows: list[dict[str, object]], what: str, why_none: str, source: str, save_file: str, dry_run: bool
) -> None:
    """Write a json array, whole or not at all, and say what it holds. Raises UserError if there is nothing to write."""
    if not rows:
        raise UserError(f"{source} gives no {what}: {why_none}")
    if not dry_run:
        write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", save_file)
    problems = len({row["instruction"] for row in rows})
    ending = "" if dry_run else f" to {save_file}"
    runlog.logger().info("%d %s from %d problems%s", len(rows), what, problems, ending)


def write(text: str, save_file: str) -> None:
    """Write a file, whole or not at all."""
    target = Path(save_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


def tell(counts: Counter[str]) -> None:
    """Say what became of the problems."""
    runlog.logger().info("problems: %s", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
