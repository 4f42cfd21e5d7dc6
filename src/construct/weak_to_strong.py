"""Supervision from a weak model (Yang et al. 2024, Weak-to-Strong Reasoning): agreement, votes, contrast.

Each command with its flags, then what it computes. Nothing but `report` reads a gold answer: only `answer`, what was
found in a response, and never `label` or `outcome`.
"""

import json
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src import runlog
from src.command.config import Count, CountOrOff, Seed, Share, flag
from src.construct.samples import (
    SAMPLE_MORE,
    BuildConfig,
    OneFileConfig,
    Row,
    SamplesConfig,
    log_counts,
    read_graded,
    save,
)
from src.construct.solver import grader_of, read_provenance, same_rules, write_provenance
from src.data.examples import Sample, Vote, read_instruction_rows, read_samples, read_votes
from src.errors import UserError
from src.evaluation.metrics import Equal, answer_classes, winners
from src.evaluation.report import type_of
from src.grading.answer_types import ANY
from src.grading.tasks import check_template
from src.jsonfile import read_json, write_text


@dataclass(frozen=True, kw_only=True)
class WeakSamplesConfig(SamplesConfig):
    """Samples of the weak model"""

    samples_file: str = flag(help="graded samples.jsonl of the weak model, one a problem")
    weak_model: str = flag("", """checkpoint directory, or name at a server, that the samples must be of; default:
        not checked""")


def full_weak(config: WeakSamplesConfig) -> None:
    """All that the weak model wrote to its end, right or wrong, as instruction data: the baseline of weak-to-strong."""
    provenance = read_provenance(config.samples_file, config.weak_model)
    samples = read_one_per_problem(config.samples_file)
    rows = [row for sample in samples.values() if (row := instruction_row(sample))["output"] and sample.finished]
    runlog.logger().info("%d of %d responses left out: empty or cut off", len(samples) - len(rows), len(samples))
    save(rows, "responses", "all are empty or cut off", config.samples_file, config.save_file, config.dry_run)
    if not config.dry_run:
        write_provenance(config.save_file, provenance)


def read_one_per_problem(file: str) -> dict[str, Sample]:
    """Read samples by problem. Raises UserError for a second one of a problem."""
    found: dict[str, Sample] = {}
    for sample in read_samples(file):
        if sample.id in found:
            raise UserError(f"{file} has several samples of problem {sample.id!r}; expected one, of greedy decoding")
        found[sample.id] = sample
    return found


def instruction_row(sample: Sample) -> Row:
    """Make a row of instruction data, without the blanks around a response that a few-shot prompt's form brings."""
    return {"id": sample.id, "instruction": sample.prompt, "output": sample.response.strip()}


def answer_of(sample: Sample) -> str | None:
    """What was found in a response; None for nothing, and for an empty answer."""
    answer = sample.values.get("answer")
    return answer if isinstance(answer, str) and answer else None


def finished_answer(sample: Sample) -> str | None:
    """answer_of() a response that came to its end: who learns one that was cut off learns to end there."""
    return answer_of(sample) if sample.finished else None


@dataclass(frozen=True, kw_only=True)
class DemonstrationsConfig(WeakSamplesConfig):
    """Demonstrations"""

    shots: Count = flag(4, "how many")
    prompt_template: str = flag("Question: {instruction}\\nAnswer:", """how the strong model is shown a problem,
        with {instruction} where it goes and \\n for a new line""")
    stop: list[str] = flag(["Question:"], """texts that end its response, \\n for a new line: a base model goes on with
        the next problem""")
    seed: Seed = flag(1, "seed of the choice")


def demonstrations(config: DemonstrationsConfig) -> None:
    """Some of the weak model's responses as demonstrations for the strong one, for solver_evaluate.py --few_shot.

    No label is read: they may be wrong, but each holds an answer (section 3.1).
    """
    check_template(template := config.prompt_template.replace("\\n", "\n"), "--prompt_template")
    provenance = read_provenance(config.samples_file, config.weak_model)
    answered = [sample for sample in read_one_per_problem(config.samples_file).values() if finished_answer(sample)]
    if len(answered) < config.shots:
        raise UserError(f"{len(answered)} responses hold an answer, fewer than --shots {config.shots}; lower it")
    rows = [instruction_row(sample) for sample in random.Random(config.seed).sample(answered, config.shots)]
    runlog.logger().info("demonstrations: problems %s", ", ".join(str(row["id"]) for row in rows))
    if not config.dry_run:
        stop = [text.replace("\\n", "\n") for text in config.stop]
        values = {"prompt": template, "stop": stop, "demonstrations": rows}
        write_text(config.save_file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        write_provenance(config.save_file, provenance)


@dataclass(frozen=True, kw_only=True)
class WeakIclConfig(BuildConfig):
    """Samples of both models"""

    weak_file: str = flag(help="graded samples.jsonl of the weak model, one a problem")
    icl_file: str = flag(help="graded samples.jsonl of the strong model on the same problems, one a problem")
    save_dir: str = flag(help="directory to write to")
    weak_model: str = flag("", """checkpoint directory, or name at a server, that the weak samples must be of;
        default: not checked""")
    strong_model: str = flag("", "the same for the strong samples")
    demonstrations_file: str = flag("", "what the strong model was shown; its problems are left out")
    fill_up_to: CountOrOff = flag(-1, """where the models agree on fewer problems, add some of different answers,
        counted; -1 = none""")
    seed: Seed = flag(1, "seed of those")


def weak_icl(config: WeakIclConfig) -> None:
    """Instruction data of problems on which the weak model and the strong one with demonstrations agree.

    No label is read. Writes weak.json, icl.json and hybrid.json, the rows of both in turns; train on each from the
    strong model as it was.
    """
    weak_file, icl_file = config.weak_file, config.icl_file
    shown = []
    if file := config.demonstrations_file:
        shown = read_json(file).get("demonstrations")
        if not isinstance(shown, list) or not all(isinstance(row, dict) and "id" in row for row in shown):
            raise UserError(f"{file}: expected an id in each row of 'demonstrations', as data_build.py demonstrations "
                            "leaves it")
    provenances = read_provenance(weak_file, config.weak_model), read_provenance(icl_file, config.strong_model)
    with grader_of(same_rules(weak_file, provenances[0], icl_file, provenances[1])) as grader:
        weak, icl = read_one_per_problem(weak_file), read_one_per_problem(icl_file)
        found, counts = agreement(weak, icl, grader.equal, [str(row["id"]) for row in shown],
                                  fill_up_to=config.fill_up_to, seed=config.seed)
    log_counts(counts)
    for name, rows in found.items():
        save(rows, f"{name} rows", "the models agree on none", weak_file,
             str(Path(config.save_dir) / f"{name}.json"), config.dry_run)


def agreement(
    weak: dict[str, Sample], icl: dict[str, Sample], equal: Equal, shown: Collection[str] = (), *,
    fill_up_to: int = -1, seed: int = 1,
) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Find the problems to which both models give an answer and the same one (section 3.1). -> the rows of the weak
    model, of the strong one (icl) and of both in turns (hybrid), and how many problems ended how.

    shown: problems that the strong model saw with their weak solution, which are left out. fill_up_to: where fewer are
    kept, problems of two different answers, chosen by the seed, until there are so many, in the order of the file; the
    paper's sets for MATH are filled so. Raises UserError unless both have the same problems.
    """
    if weak.keys() != icl.keys():
        other = sorted(weak.keys() ^ icl.keys())[0]
        raise UserError(f"problem {other!r} was answered by one of the two models only; sample both to the end")
    counts: Counter[str] = Counter()
    kept: dict[str, tuple[Row, Row]] = {}
    different: dict[str, tuple[Row, Row]] = {}
    for name, first in weak.items():
        second = icl[name]
        if first.prompt != second.prompt:
            raise UserError(f"problem {name!r} is {first.prompt[:40]!r} to one model and another to the other")
        answers = finished_answer(first), finished_answer(second)
        if name in shown:
            counts["shown as demonstrations"] += 1
        elif None in answers:
            counts["without an answer"] += 1
        elif not typed(equal, first)(*answers):
            counts["of different answers"] += 1
            different[name] = instruction_row(first), instruction_row(second)
        else:
            counts["kept"] += 1
            kept[name] = instruction_row(first), instruction_row(second)
    n_missing = max(0, fill_up_to - len(kept))
    added = random.Random(seed).sample(sorted(different), min(n_missing, len(different)))
    if added:
        counts["kept although of different answers"] = len(added)
        kept |= {name: different[name] for name in added}
    pairs = [kept[name] for name in weak if name in kept]
    weak_rows, icl_rows = ([pair[side] for pair in pairs] for side in (0, 1))
    return {"weak": weak_rows, "icl": icl_rows, "hybrid": [row for pair in pairs for row in pair]}, counts


def typed(equal: Equal, sample: Sample) -> Equal:
    """`equal` with the kind of answer that the sample's problem has, where it names one."""
    kind = type_of(sample.problem)
    return equal if kind == ANY else partial(equal, answer_type=kind)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(SamplesConfig):
    """Rows and samples"""

    rows_file: str = flag(help="weak.json or icl.json of `weak_icl`, or what `full_weak` wrote")
    samples_file: str = flag(help="graded samples.jsonl that these rows were made of, one a problem")
    save_file: str = flag(help="json file for the numbers")


def report(config: ReportConfig) -> None:
    """How many problems a stage of weak-to-strong kept, and how many of its rows are right, where labels are known.

    It alone reads outcomes. Raises UserError for a row whose response is not the sample's.
    """
    read_graded(config.samples_file)  # refuses samples without outcomes
    samples = read_one_per_problem(config.samples_file)
    kept = set()
    for row in read_instruction_rows(config.rows_file):
        name = str(row.get("id"))
        if name not in samples or instruction_row(samples[name])["output"] != row.get("output"):
            raise UserError(f"the row of problem {name!r} is not made of these samples; give those that it is made of")
        kept.add(name)
    right = {name for name, sample in samples.items() if sample.outcome == "right"}
    numbers = {"problems": len(samples), "kept": len(kept), "right": len(right), "right_of_kept": len(right & kept)}
    runlog.logger().info(
        "%s: %d of %d problems kept; right: %.1f%% of the kept, %.1f%% of all", config.rows_file, len(kept),
        len(samples), 100 * len(right & kept) / len(kept), 100 * len(right) / len(samples))
    if not config.dry_run:
        write_text(config.save_file, json.dumps(numbers, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class VoteConfig(SamplesConfig):
    """Samples of the strong model"""

    samples_file: str = flag(help="graded samples.jsonl with several samples a problem")
    save_file: str = flag(help="the jsonl file to write")
    strong_model: str = flag("", """checkpoint directory, or name at a server, that the samples must be of;
        default: not checked""")


def vote(config: VoteConfig) -> None:
    """Samples by the majority of their answers, with its share of the votes, as jsonl for `contrast`."""
    provenance = read_provenance(config.samples_file, config.strong_model)
    with grader_of(provenance.rules) as grader:
        found = votes(read_samples(config.samples_file), grader.equal)
    log_counts(Counter("with a majority" if row.answer else "without any answer" for row in found))
    if not config.dry_run:
        lines = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in found)
        write_text(config.save_file, lines)
        write_provenance(config.save_file, provenance)


def votes(samples: Sequence[Sample], equal: Equal) -> list[Vote]:
    """Find the majority among the samples of each problem; of answers with as many votes the one seen first wins. One
    that was cut off votes too, but is no example: if it is of the majority it is on neither side.

    Raises UserError where problems have unequal numbers of samples, for their confidences would mean different things.
    """
    problems: dict[str, list[Sample]] = {sample.id: [] for sample in samples}
    for sample in sorted(samples, key=lambda sample: sample.sample):
        problems[sample.id].append(sample)
    most = max(map(len, problems.values()))
    found = []
    for name, group in problems.items():
        if len(group) != most:
            raise UserError(f"problem {name!r} has {len(group)} samples, others {most}; sample it to the end")
        classes = answer_classes([answer_of(sample) for sample in group], typed(equal, group[0]))
        top = next(iter(winners(classes, [1] * len(classes))), None)
        agree = [top is not None and first == top for first in classes]
        positives = [sample.response for sample, agrees in zip(group, agree, strict=True) if agrees and sample.finished]
        negatives = [sample.response for sample, agrees in zip(group, agree, strict=True) if not agrees]
        answer = None if top is None else answer_of(group[top])
        found.append(Vote(name, group[0].prompt, answer, sum(agree) / len(group), positives, negatives))
    return found


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(OneFileConfig):
    """Votes and weak samples"""

    vote_file: str = flag(help="what `vote` wrote")
    weak_file: str = flag(help="graded samples.jsonl of the weak model, one a problem")
    weak_model: str = flag("", """checkpoint directory, or name at a server, that the weak samples must be of;
        default: not checked""")
    strong_model: str = flag("", "the same for the samples of the votes")
    min_confidence: Share = flag(0.6, "least share of the votes for the majority's answer")
    flip_confidence: Share = flag(0.8, "least share to reject the weak response")
    pairs_a_problem: Count = flag(1, "most pairs from one problem")
    seed: Seed = flag(42, "seed of the choice of samples")


def contrast(config: ContrastConfig) -> None:
    """Pairs of the weak model's response and the strong model's samples, for preference_train.py. No label is read.

    Where the weak answer is the majority's it is chosen, else rejected, with a higher confidence asked for.
    """
    provenances = (read_provenance(config.vote_file, config.strong_model),
                   read_provenance(config.weak_file, config.weak_model))
    with grader_of(same_rules(config.vote_file, provenances[0], config.weak_file, provenances[1])) as grader:
        weak = read_one_per_problem(config.weak_file)
        rows, counts = contrast_pairs(
            read_votes(config.vote_file), weak, grader.equal, min_confidence=config.min_confidence,
            flip_confidence=config.flip_confidence, pairs_per_problem=config.pairs_a_problem, seed=config.seed)
    log_counts(counts)
    save(rows, "pairs", f"no problem passes; {SAMPLE_MORE}", config.vote_file, config.save_file, config.dry_run)


def contrast_pairs(
    found: Iterable[Vote], weak: dict[str, Sample], equal: Equal, *, min_confidence: float,
    flip_confidence: float, pairs_per_problem: int, seed: int,
) -> tuple[list[Row], Counter[str]]:
    """Pair the weak model's response with the strong one's samples (section 3.2). -> pairs, and problems by their end.

    Where the weak answer is the majority's, it is chosen over samples with another answer; where it is not, and the
    confidence reaches flip_confidence, samples of the majority are chosen over it. Raises UserError for a problem that
    the weak model has not answered.
    """
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    pairs: list[Row] = []
    for vote in found:
        if vote.id not in weak or weak[vote.id].prompt != vote.prompt:
            raise UserError(f"problem {vote.id!r} of the votes has no sample of the weak model, or is another problem")
        sample = weak[vote.id]
        answer = finished_answer(sample)
        agrees = answer is not None and vote.answer is not None and typed(equal, sample)(answer, vote.answer)
        others = [text for text in dict.fromkeys(vote.negatives if agrees else vote.positives) if text.strip()]
        if vote.answer is None or vote.confidence < min_confidence:
            counts["of low confidence"] += 1
        elif not agrees and vote.confidence < flip_confidence:
            counts["not sure enough against the weak answer"] += 1
        elif not sample.response.strip() or not others:
            counts["with nothing to contrast"] += 1
        else:
            counts["weak chosen" if agrees else "weak rejected"] += 1
            for other in generator.sample(others, min(pairs_per_problem, len(others))):
                chosen, rejected = (sample.response, other) if agrees else (other, sample.response)
                pairs.append({"id": vote.id, "instruction": vote.prompt, "chosen": chosen, "rejected": rejected,
                              "weak": "chosen" if agrees else "rejected"})
    return pairs, counts
