"""One html file of what one or two directories hold: it needs no network, no server and no other file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from src import jsonfile
from src.errors import UserError
from src.evaluation.metrics import interval
from src.report.collect import ReportedRun, read_run, show_sample

LARGEST = 4_500_000  # bytes of a page
REPORT = "report.html"


def write_report(folder: Path, other: Path | None = None, label_file: str = "") -> Path:
    """Write report.html into the folder; with another folder, a page that compares the two into that one.

    Problems, and buffers of rollouts, are left out evenly where the page would be larger than LARGEST; problems in
    which two runs differ are kept first. label_file: as read_run() takes it. Raises UserError for a folder with nothing
    to show, and for two runs of other problems.
    """
    folders = [folder] if other is None else [folder, other]
    runs = [read_run(each, label_file) for each in folders]
    path = folders[-1] / (REPORT if other is None else f"report-{folder.resolve().name}.html")
    here = Path(__file__).parent
    page, style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    page = page.replace("/*CSS*/", style).replace("/*JS*/", script)
    data = _fitting(runs, LARGEST - len(page.encode()))
    jsonfile.write_text(path, page.replace("/*DATA*/", data))
    return path


def _fitting(runs: Sequence[ReportedRun], largest: int) -> str:
    """The page's data as json of at most so many bytes, by leaving out problems and buffers."""
    names = list(dict.fromkeys(name for run in runs for name in run.problems))
    # a problem that a run has not got counts as unsolved there
    changed = [name for name in names
               if len({run.problems[name].share if name in run.problems else 0.0 for run in runs}) > 1]
    others = [name for name in names if name not in set(changed)]
    comparison = _comparison(runs) if len(runs) > 1 else None
    size = sum(problem.size for run in runs for problem in run.problems.values())
    n_problems = int(len(names) * min(1.0, largest / max(1, size)))
    n_buffers = max(len(run.shown["buffers"]) for run in runs)
    while True:
        first = _evenly(changed, n_problems)
        kept = {*first, *_evenly(others, n_problems - len(first))}
        text = json.dumps(_finite({
            "comparison": comparison, "n_problems": len(names),
            "runs": [run.shown | {"buffers": _evenly(run.shown["buffers"], n_buffers)} for run in runs],
            "problems": [_problem(runs, name) for name in names if name in kept],
        }), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # none ends a script
        size = len(text.encode())
        if size <= largest or not (n_problems or n_buffers):
            return text
        n_problems, n_buffers = (int(n * min(0.9, largest / size)) for n in (n_problems, n_buffers))


def _finite(value: object) -> object:
    """The value with null for numbers that json lacks."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _evenly(items: Sequence[object], n: int) -> list[object]:
    """n items, spread over all from the first to the last."""
    if n >= len(items):
        return list(items)
    return [items[round(place * (len(items) - 1) / max(1, n - 1))] for place in range(max(0, n))]


def _problem(runs: Sequence[ReportedRun], name: str) -> dict[str, object]:
    """A problem with its samples in each run."""
    known = next(run.problems[name] for run in runs if name in run.problems)
    place = next((run.places[name] for run in runs if name in run.places), None)
    samples = [[show_sample(sample, known.label, run.extraction) for sample in run.problems[name].samples]
               if name in run.problems else [] for run in runs]
    return {"id": name, "prompt": known.prompt, "label": known.label, "level": place and place.level,
            "subject": place and place.subject, "runs": samples}


def _comparison(runs: Sequence[ReportedRun]) -> str | None:
    """The second run's accuracy beside the first's, over the problems of both. Raises UserError if there is none."""
    before, after = (run.problems for run in runs)
    if not (before or after):
        return None
    both = [name for name in before if name in after and before[name].prompt == after[name].prompt]
    if not both:
        raise UserError(f"{runs[0].shown['name']} and {runs[1].shown['name']} have no problem in common; compare "
                        f"evaluations of one label file")
    differences = [after[name].share - before[name].share for name in both]
    low, high = interval(differences)
    gained, lost = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    return (f"Of {len(both)} problems that both have, the second run solves {gained} more often and {lost} less often: "
            f"{sum(differences) / len(both):+.1%} (95% interval of the paired difference {low:+.1%} .. {high:+.1%}).")
