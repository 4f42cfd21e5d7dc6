"""One html file of what one or two directories hold: it needs no network, no server and no other file."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src import jsonfile
from src.command.config import renamed
from src.data.encoding import STEP_ENDS
from src.data.examples import Prompt, Sample, StepLabels, read_prompts, read_samples
from src.errors import UserError
from src.evaluation.metrics import interval
from src.evaluation.report import curves_of
from src.evaluation.verifier_report import first_wrong
from src.grading.extract import EXTRACTIONS, extract
from src.runlog import METRICS, read_metrics

LARGEST = 4_500_000  # bytes of a page
REPORT = "report.html"
LONGEST = 20_000  # characters of a text that a page holds
MOST_POINTS = 300  # of a curve; more are averaged
MOST_CREDITS = 50
GROUPS = {  # of metrics, in the page's order: a metric belongs to the first whose pattern its name begins with
    "Reward": r"(eval_)?(accuracy|reward(?!_length))|graded|kept_share|dead_groups|margin|chosen|rejected|auc",
    "KL and clipping": r"kl|entropy|ratio|first_ratio|clipped|sampler_mismatch",
    "Loss": r"(eval_|policy_|value_|critic_)?loss|.*grad_norm|.*lr$|value|explained|critic",
    "Length": r"response_tokens|truncated|reward_length|supervised_tokens|refill",
    "Speed": r"seconds|tokens|supervised_per|mfu|peak_memory|step_seconds|data_seconds|padding",
    "Other": r"",
}


class ReportedProblem(NamedTuple):
    """A problem and its graded samples in one run."""

    prompt: str
    label: str
    samples: list[Sample]
    n: int  # samples that were asked for

    @property
    def share(self) -> float:
        """The share of right samples; those that are missing are wrong, as in results.json."""
        return sum(sample.outcome == "right" for sample in self.samples) / self.n

    @property
    def size(self) -> int:
        """Characters of its texts."""
        return sum(len(_cut(sample.response)) for sample in self.samples) + len(self.prompt)


class ReportedRun(NamedTuple):
    """What one directory holds; empty where it has nothing of a kind. shown: what is not of single problems."""

    shown: dict[str, object]
    problems: dict[tuple[str, str], ReportedProblem]  # by id and prompt: two label files may have the same ids
    n_problems: int  # with those that have no sample
    extraction: str  # how answers were found
    places: dict[str, Prompt]  # level and subject by problem, where the label file is still there


def read_run(folder: Path, prompts: Sequence[Prompt] = ()) -> ReportedRun:
    """Read the directory of an evaluation, a verifier's evaluation, a training run or of credits.

    prompts: the problems, with levels and subjects; default: those of the file that run.json names, if it is there.
    Raises UserError for a directory with none of their files.
    """
    results_file, samples_file = folder / "results.json", folder / "samples.jsonl"
    results = jsonfile.read_json(results_file) if results_file.is_file() else {}
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    samples = read_samples(str(samples_file)) if samples_file.is_file() and "samples_a_problem" in results else []
    if not (results or metrics):
        raise UserError(f"{folder} holds neither results.json nor {METRICS} with a line in it; give the --log_dir of "
                        f"an evaluation or the --save_dir of a training run")
    problems: dict[tuple[str, str], ReportedProblem] = {}
    for sample in samples:
        prompt, label = _cut(sample.prompt), str(sample.values.get("label", ""))
        empty = ReportedProblem(prompt, label, [], results["samples_a_problem"])
        problems.setdefault((sample.id, prompt), empty).samples.append(sample)
    credits_file, rollouts = folder / "credits.jsonl", sorted((folder / "rollouts").glob("step-*.jsonl"))
    curves = curves_of(results)  # points of k, accuracy and the ends of its interval, for each way of choosing
    if verifier := results.get("verifier"):
        curves = {name: list(zip(curve["n"], curve["accuracy"], curve["low"], curve["high"], strict=True))
                  for name, curve in verifier["curves"].items()}
    shown = {
        "name": str(folder),
        "samples_a_problem": results.get("samples_a_problem"),
        "subtitle": _subtitle(results, metrics),
        "figures": list(_figures(results)),
        "curves": [{"name": name, "points": points} for name, points in curves.items()],
        "groups": [{"kind": kind, "entries": [{"name": name, **entry} for name, entry in results[f"by_{kind}"].items()]}
                   for kind in ("level", "subject") if results.get(f"by_{kind}")],
        "metrics": _metrics(metrics),
        "alerts": [[row["step"], name, str(advice)]
                   for row in metrics for name, advice in row.get("alarms", {}).items()],
        "buffers": [{"step": int(path.stem.removeprefix("step-")), "rows": [
            {**row, "prompt": _cut(str(row["prompt"])), "response": _cut(str(row["response"]))} for row in _rows(path)]}
                    for path in rollouts],
        "n_buffers": len(rollouts),
        "credits": [{
            "prompt": _cut(row["instruction"]), "pieces": row["tokens"], "credits": row["credits"],
            "reward": row["reward"],
            "first_wrong": first_wrong([StepLabels(row["instruction"], row["steps"], row["labels"])])[0],
        } for row in list(_rows(credits_file))[:MOST_CREDITS]] if credits_file.is_file() else []}
    places = _places(folder, prompts) if problems else {}  # the label file of a training run has other rows
    n_problems = results.get("problems", len(problems))
    return ReportedRun(shown, problems, n_problems, results.get("rules", {}).get("extraction", ""), places)


def _rows(path: Path) -> Iterator[dict[str, object]]:
    return (row for _, row in jsonfile.read_rows(path))


def _cut(text: str) -> str:
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[:LONGEST]} [{left_out} more characters]"


def _places(folder: Path, prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """These problems, or those of the run's label file, by id; none if that is gone."""
    run_file = folder / "run.json"
    flags = jsonfile.read_json(run_file).get("flags", {}) if run_file.is_file() and not prompts else {}
    path = Path(str(flags.get("label_file") or ""))
    if path.is_file():
        prompts = read_prompts(str(path), renamed(flags.get("columns") or ()), need_label=False)
    return {prompt.id: prompt for prompt in prompts}


def _subtitle(results: Mapping[str, object], metrics: Sequence[Mapping[str, object]]) -> str:
    if "task" in results:
        rules = results["rules"]
        return (f"{results['task']}, {results['problems']} problems, {results['samples_a_problem']} samples each, read "
                f"by {rules['extraction']}, compared by {rules['equality']}")
    if metrics:
        hours, rest = divmod(int(metrics[-1].get("seconds", 0)), 3600)
        return f"{metrics[-1]['step']} steps, {hours} h {rest // 60:02} min"
    return "credit of tokens" if "with_a_wrong_step" in results else "labelled steps"


def _figures(results: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """The numbers at the top of the page: {"label", "value", "share", "interval"}."""

    def figure(label: str, value: object, interval: object = None, *, share: bool = False) -> dict[str, object]:
        """A figure as it is, or a share from 0 to 1, which is shown in percent."""
        return {"label": label, "value": value, "share": share, "interval": interval}

    if "accuracy" in results:
        yield figure("accuracy", results["accuracy"], results["interval"], share=True)
    if "acc_norm" in results:
        yield figure("acc_norm", results["acc_norm"], results["acc_norm_interval"], share=True)
    for label, points in curves_of(results).items():
        k, value, *interval = points[-1]
        yield figure(f"{label} {k}", value, interval, share=True)
    if "outcomes" in results:
        yield figure("samples", ", ".join(f"{n} {name}" for name, n in results["outcomes"].items() if n))
        yield figure("cut off", results["truncated"])
    report = results.get("verifier", results)
    for key in ("auc", "pair_accuracy", "calibration_error", "reward_auc", "step_accuracy", "step_auc", "f1"):
        if isinstance(report.get(key), int | float):
            yield figure(key.replace("_", " "), round(report[key], 3))
    for key in ("by_sum", "by_lowest_token"):
        if key in results:
            yield figure(f"wrong step found {key.replace('_', ' ')}", results[key]["accuracy"],
                         results[key]["interval"], share=True)


def _metrics(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Every metric of a run as {"name", "group", "points"}; of long runs means of neighbouring steps."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch", "seconds") and isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], value))
    found = []
    for name, points in curves.items():
        size = -(-len(points) // MOST_POINTS)
        means = [[sum(column) / len(part) for column in zip(*part, strict=True)]
                 for part in (points[at : at + size] for at in range(0, len(points), size))]
        group = next(title for title, pattern in GROUPS.items() if re.match(pattern, name))
        found.append({"name": name, "group": group, "points": means})
    return sorted(found, key=lambda metric: list(GROUPS).index(metric["group"]))


def show_sample(sample: Sample, label: str, extraction: str) -> dict[str, object]:
    """What the page says of a sample: its text, where the answer was read and by which rule, its steps and scores."""
    values, outcome = sample.values, sample.outcome or ""
    response, answer = _cut(sample.response), values.get("answer")
    span = answer_span(response, answer) if answer else None
    # the rules may be an older version's
    rule = extract(extraction, sample.response).rule if extraction in EXTRACTIONS else extraction
    reason = {
        "right": f"{answer} equals {label}, read by {rule}", "wrong": f"{answer} is not {label}, read by {rule}",
        "unparsed": "no answer was found", "timeout": f"{answer} could not be compared with {label} in time",
    }.get(outcome, f"the comparison of {answer} with {label} failed")
    scores = values.get("step_scores")
    return {
        "sample": sample.sample, "response": response, "answer": answer, "outcome": outcome, "reason": reason,
        # scripts count in halves of 32 bits
        "span": span and [len(response[:at].encode("utf-16-le")) // 2 for at in span], "score": values.get("score"),
        "step_scores": scores, "steps": _steps(response, scores) if scores else None,
        "tokens": values.get("token_count"), "finish": values.get("finish")}


def answer_span(response: str, answer: str) -> tuple[int, int] | None:
    """Where an extracted answer stands last in a response: [start, end). None if it does not stand there as such.
    Grading leaves out blanks, dollars and the commas of thousands; here they may stand between its characters."""
    # blanks stop short of the character that follows, so that there is one way to match and no search without end
    characters = [re.escape(character) for character in answer[:200] if not character.isspace()]
    pattern = "".join(characters[:1] + [rf"(?:(?!{each})[\s,$\\{{}}!]){{0,4}}{each}" for each in characters[1:]])
    found = list(re.finditer(rf"(?<![\w.]){pattern}(?!\w|\.\d)", response)) if pattern else []
    return found[-1].span() if found else None


def _steps(response: str, scores: Sequence[object]) -> list[str] | None:
    """A response in the pieces that a verifier scored, each with its end; None where none of the ways fits."""
    for end in STEP_ENDS.values():
        pieces = re.findall(rf"(?s).*?\S.*?(?:{re.escape(end)}\s*|\Z)", response)
        if len(pieces) == len(scores) and "".join(pieces) == response:
            return pieces
    return None


def write_report(folder: Path, other: Path | None = None, prompts: Sequence[Prompt] = ()) -> Path:
    """Write report.html into the folder; with another folder, a page that compares the two into that one.

    Problems, and buffers of rollouts, are left out evenly where the page would be larger than LARGEST; problems in
    which two runs differ are kept first. prompts: as read_run() takes them. Raises UserError for a folder with nothing
    to show, and for two runs of other problems.
    """
    folders = [folder] if other is None else [folder, other]
    runs = [read_run(each, prompts) for each in folders]
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
        text = json.dumps(jsonfile.finite({
            "comparison": comparison, "n_problems": len(names),
            "runs": [run.shown | {"buffers": _evenly(run.shown["buffers"], n_buffers)} for run in runs],
            "problems": [_problem(runs, name) for name in names if name in kept],
        }), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # none ends a script
        size = len(text.encode())
        if size <= largest or not (n_problems or n_buffers):
            return text
        n_problems, n_buffers = (int(n * min(0.9, largest / size)) for n in (n_problems, n_buffers))


def _evenly(items: Sequence[object], n: int) -> list[object]:
    """n items, spread over all from the first to the last."""
    if n >= len(items):
        return list(items)
    return [items[round(place * (len(items) - 1) / max(1, n - 1))] for place in range(max(0, n))]


def _problem(runs: Sequence[ReportedRun], name: tuple[str, str]) -> dict[str, object]:
    """A problem with its samples in each run."""
    known = next(run.problems[name] for run in runs if name in run.problems)
    place = next((run.places[name[0]] for run in runs if name in run.problems and name[0] in run.places), None)
    samples = [[show_sample(sample, known.label, run.extraction) for sample in run.problems[name].samples]
               if name in run.problems else [] for run in runs]
    return {"id": name[0], "prompt": known.prompt, "label": known.label, "level": place and place.level,
            "subject": place and place.subject, "runs": samples}


def _comparison(runs: Sequence[ReportedRun]) -> str | None:
    """The second run's accuracy beside the first's, over the problems of both; where both had as many, and all that
    either has samples of are among these, one without any is unsolved. Raises UserError if there is none."""
    before, after = (run.problems for run in runs)
    if not (before or after):
        return None
    both = [name for name in before if name in after]
    if not both:
        raise UserError(f"{runs[0].shown['name']} and {runs[1].shown['name']} have no problem in common; compare "
                        f"evaluations of one label file")
    n, names = runs[0].n_problems, dict.fromkeys([*before, *after])
    if n == runs[1].n_problems >= len(names):
        shares = [[problems[name].share if name in problems else 0.0 for name in names] for problems in (before, after)]
        differences = [*(new - old for old, new in zip(*shares, strict=True)), *[0.0] * (n - len(names))]
    else:
        differences = [after[name].share - before[name].share for name in both]
    low, high = (2 * end - 1 for end in interval([(1 + each) / 2 for each in differences]))  # of numbers from 0 to 1
    gained, lost = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    mean = sum(differences) / len(differences)
    return (f"Of {len(differences)} problems that both have, the second run solves {gained} more often and {lost} less "
            f"often: {mean:+.1%} (95% interval of the paired difference {low:+.1%} .. {high:+.1%}).")
