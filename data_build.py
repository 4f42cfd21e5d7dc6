"""Build training files from graded samples.

python data_build.py pairs --samples_file log/samples.jsonl --save_file pairs.json
torchrun --nproc_per_node 8 data_build.py process --ckpt_dir out --task GSM8K --samples_file log/samples.jsonl \\
    --log_dir log/rollouts --save_file steps.json
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from src import cli, load, parallel, runlog
from src.checkpoint import storage
from src.code_solutions.tool_hook import Coding
from src.config import AtLeastOne, Count, CountOrOff, CountOrZero, NonNegative, Seed, Share
from src.construct import joined, steps, weak_to_strong
from src.construct.attempts import Enough, kinds, until_enough
from src.construct.continuation import Schedule, Solver, branching_sampler, replayable, rollout_sampler
from src.construct.drawing import asked_of, check_solver, draw, drawn_before, grader_of
from src.construct.files import read_faultless, read_graded, save, tell, write
from src.construct.origin import read_origin, same_rules, write_origin
from src.construct.outcomes import outcome_rows, right_solutions
from src.construct.pairs import mixed_pairs, pairs_from_samples, preferred_pairs
from src.construct.problems import ErrorPlace, without_similar
from src.data.encoding import STEP_ENDS, StepKind
from src.data.examples import (
    read_instruction_rows,
    read_judged,
    read_pairs,
    read_prompts,
    read_samples,
    read_votes,
)
from src.errors import UserError
from src.evaluation.prompting import Prompting, make_prompting, select_prompts
from src.evaluation.report import type_of
from src.evaluation.served import Backend, ServedSolver
from src.grading.grader import Grader
from src.grading.tasks import check_template, find_task
from src.inference.sampling import Sampling
from src.text.blocks import CODE_FORM, Marker

SAMPLE_MORE = "sample more a problem or at a higher temperature"
ONE_KIND = f"no problem has both a right and a wrong sample; {SAMPLE_MORE}"


def attempts(
    task: str, label_file: str, log_dir: str, ckpt_dir: str = "", right: Count = 1, wrong: Count = 1,
    attempts: Count = 100, temperature: NonNegative = 1.0, max_new_tokens: Count = 512, max_batch_size: Count = 64,
    max_rounds: Count = 24, isolation: Literal["", "bubblewrap", "namespaces", "none"] = "", prompt_template: str = "",
    split: str = "", backend: Backend = "engine", base_url: str = "", model_name: str = "", api_key_env: str = "",
    tokenizer_file: str = "", chat_template: str = "", template_args: str = "", seed: Seed = 1, dry_run: bool = False,
) -> None:
    """Graded samples of each problem until it has right and wrong ones, for the commands pairs and branch.

    Needs a solver: start it with torchrun, or give a server. A rerun continues. The accuracy in log_dir/results.json
    is no measure of the solver: samples that were not needed count as misses there.

    ckpt_dir: solver that is asked
    task: how problems are put, and answers found and compared
    label_file: problems with their answers
    log_dir: directory for samples.jsonl and what else an evaluation leaves
    right: right samples that are enough for a problem
    wrong: wrong samples that are enough; one that was cut off is neither right nor wrong
    attempts: samples of a problem at most
    temperature: of the samples
    max_new_tokens: longest response; of a solution with code the longest block
    max_batch_size: sequences that decode at once
    max_rounds: of solutions with code: blocks of text and code at most
    split: only problems of this part, as for solver_evaluate.py
    seed: seed of the samples
    """
    flags = locals().copy()
    check_solver(flags)
    benchmark, problems = find_task(task), select_prompts(read_prompts(label_file, need_label=True), split)
    runlog.logger().info("%d problems, %d attempts at most each", len(problems), attempts)
    if dry_run:
        return
    prompting = make_prompting(benchmark, prompt_template=prompt_template)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop=prompting.stop, seed=seed)
    solver = open_solver(flags, prompting, max_rounds)
    facts = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "right": right, "wrong": wrong,
             "max_rounds": max_rounds}
    with Grader(benchmark) as grader:
        sampler = until_enough(
            solver.sampler(sampling), Enough(right, wrong),
            lambda problem, response: grader.grade_one(response, problem.label, type_of(problem)).outcome,
            drawn_before(log_dir))
        path = draw(solver, sampler, problems, attempts, flags=flags, facts=facts, grade=benchmark)
    if parallel.rank() == 0:
        tell(kinds(problems, read_samples(str(path))))


def pairs(
    samples_file: str, save_file: str, pairs_a_problem: Count = 4, error_phrases: list[str] = [],  # noqa: B006
    error_place: ErrorPlace = "solution", similar_characters: CountOrZero = 0, seed: Seed = 1, dry_run: bool = False,
) -> None:
    """A right against a wrong solution of the same problem, for verifier_train.py.

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    pairs_a_problem: most pairs from one problem
    error_phrases: leave out right solutions that hold one of these, in any case, such as: error apolog
    error_place: where they are looked for: all of a solution, or only what its code printed, such as tracebacks
    similar_characters: leave out a solution of as many steps as an earlier one of its problem and outcome whose length
        is less than so many characters away; 0 = keep all
    seed: seed of the matching and of the order of rows
    """
    samples = without_similar(read_faultless(samples_file, save_file, error_phrases, error_place), similar_characters)
    rows = pairs_from_samples(samples, pairs_a_problem, seed)
    save(rows, "pairs", ONE_KIND, samples_file, save_file, dry_run)


def outcome(
    samples_file: str, save_file: str, max_ratio: AtLeastOne = 3.0, rows_a_problem: Count = 32, seed: Seed = 1,
    dry_run: bool = False,
) -> None:
    """Solutions with the word whether they are right, for verifier_train.py --objective outcome.

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    max_ratio: within a problem, at most so many times as many of one kind as of the other
    rows_a_problem: most rows from one problem
    seed: seed of the choice and of the order of rows
    """
    rows = outcome_rows(read_graded(samples_file, save_file), max_ratio, rows_a_problem, seed)
    save(rows, "solutions", ONE_KIND, samples_file, save_file, dry_run)


def reject(
    samples_file: str, save_file: str, solutions_a_problem: Count = 10, seed: Seed = 1, dry_run: bool = False
) -> None:
    """Right samples as instruction data for solver_train.py (rejection sampling, ReST-EM).

    samples_file: samples.jsonl with outcomes, as solver_evaluate.py leaves it
    solutions_a_problem: most solutions of one problem; equal texts count once
    seed: seed of the choice
    """
    rows = right_solutions(read_graded(samples_file, save_file), solutions_a_problem, seed)
    save(rows, "problems with solutions", f"no sample is right; {SAMPLE_MORE}", samples_file, save_file, dry_run)


def prefer(
    samples_file: str, save_file: str, margin: NonNegative = 1.0, pairs_a_problem: Count = 3, seed: Seed = 1,
    dry_run: bool = False,
) -> None:
    """Pairs that differ in the verifier's score and the answer together, for preference training.

    samples_file: scored samples.jsonl with outcomes, as verifier_evaluate.py leaves it with a verifier whose scores are
        probabilities (outcome or process)
    margin: score (0 to 1) plus 1 for a right answer must differ by more than this
    pairs_a_problem: most pairs from one problem
    seed: seed of the choice and of the order of rows
    """
    rows = preferred_pairs(read_graded(samples_file, save_file), margin, pairs_a_problem, seed)
    why_none = f"no two samples of a problem differ by more than {margin}; {SAMPLE_MORE}"
    save(rows, "pairs", why_none, samples_file, save_file, dry_run)


def select(train_file: str, split: str, save_file: str, dry_run: bool = False) -> None:
    """The rows of a data file whose problems a split names, with all their keys: easy problems to train on, say.

    train_file: rows with "instruction"
    split: level=1-3, subject=Algebra|Geometry, or a name that stands under "split"; a comma means and
    """
    prompts, rows = read_prompts(train_file, need_label=False), read_instruction_rows(train_file)
    chosen = {prompt.id for prompt in select_prompts(prompts, split)}
    kept = [row for prompt, row in zip(prompts, rows, strict=True) if prompt.id in chosen]
    save(kept, "rows", "none is in the split", train_file, save_file, dry_run)


def split(
    train_file: str, first_file: str, second_file: str, test_file: str = "", share: Share = 0.5,
    allow_overlap: bool = False, seed: Seed = 1, dry_run: bool = False,
) -> None:
    """Instruction data in two parts without a question in common: one to teach the weak model, one for it to label.

    Questions that differ in case, width or blanks count as the same.

    train_file: rows with "instruction"; all their keys are kept
    first_file: the json file for the first part
    second_file: the json file for the second part
    test_file: rows none of whose questions may be in train_file
    share: share of the questions in the first part
    allow_overlap: leave out what is in test_file, and count it, instead of ending with an error
    seed: seed of the choice
    """
    rows = read_instruction_rows(train_file)
    shared = weak_to_strong.overlap(rows, read_instruction_rows(test_file)) if test_file else set()
    if shared and not allow_overlap:
        raise UserError(f"{len(shared)} questions of {train_file} are in {test_file}, such as {min(shared)[:60]!r}; "
                        f"drop them with --allow_overlap")
    kept = [row for row in rows if weak_to_strong.normalized_question(row["instruction"]) not in shared]
    first, second = weak_to_strong.split_problems(kept, share, seed)
    runlog.logger().info("%d of %d rows left out: in the test file", len(rows) - len(kept), len(rows))
    for part, file in ((first, first_file), (second, second_file)):
        save(part, "rows", f"--share {share} leaves it none", train_file, file, dry_run)


def full_weak(samples_file: str, save_file: str, weak_model: str = "", dry_run: bool = False) -> None:
    """All that the weak model wrote, right or wrong, as instruction data: the baseline of weak-to-strong.

    samples_file: graded samples.jsonl of the weak model, one a problem
    weak_model: checkpoint directory, or name at a server, that the samples must be of; default: not checked
    """
    origin = read_origin(samples_file, weak_model)
    samples = weak_to_strong.one_each(read_samples(samples_file), samples_file)
    rows = [row for sample in samples.values() if (row := weak_to_strong.instruction_row(sample))["output"]]
    runlog.logger().info("%d of %d responses left out: empty", len(samples) - len(rows), len(samples))
    save(rows, "responses", "all are empty", samples_file, save_file, dry_run)
    if not dry_run:
        write_origin(save_file, origin)


def demonstrations(
    samples_file: str, save_file: str, shots: Count = 4, weak_model: str = "",
    prompt_template: str = "Question: {instruction}\\nAnswer:", stop: list[str] = ["Question:"],  # noqa: B006
    seed: Seed = 1, dry_run: bool = False,
) -> None:
    r"""Some of the weak model's responses as demonstrations for the strong one, for solver_evaluate.py --few_shot.

    No label is read: they may be wrong, but each holds an answer.

    samples_file: graded samples.jsonl of the weak model, one a problem
    shots: how many
    weak_model: checkpoint directory, or name at a server, that the samples must be of; default: not checked
    prompt_template: how the strong model is shown a problem, with {instruction} where it goes and \n for a new line
    stop: texts that end its response: a base model goes on with the next problem
    seed: seed of the choice
    dry_run: choose without writing
    """
    check_template(template := prompt_template.replace("\\n", "\n"), "--prompt_template")
    origin = read_origin(samples_file, weak_model)
    samples = weak_to_strong.one_each(read_samples(samples_file), samples_file)
    rows = weak_to_strong.demonstrations(samples, shots, seed)
    runlog.logger().info("demonstrations: problems %s", ", ".join(str(row["id"]) for row in rows))
    if not dry_run:
        values = {"prompt": template, "stop": stop, "demonstrations": rows}
        write(json.dumps(values, indent=1, ensure_ascii=False) + "\n", save_file)
        write_origin(save_file, origin)


def weak_icl(
    weak_file: str, icl_file: str, save_dir: str, weak_model: str = "", strong_model: str = "",
    demonstrations_file: str = "", fill_up_to: CountOrOff = -1, seed: Seed = 1, dry_run: bool = False,
) -> None:
    """Instruction data of problems on which the weak model and the strong one with demonstrations agree.

    No label is read. Writes weak.json, icl.json and hybrid.json, the rows of both in turns; train on each from the
    strong model as it was.

    weak_file: graded samples.jsonl of the weak model, one a problem
    icl_file: graded samples.jsonl of the strong model on the same problems, one a problem
    save_dir: directory to write to
    weak_model: checkpoint directory, or name at a server, that the weak samples must be of; default: not checked
    strong_model: the same for the strong samples
    demonstrations_file: what the strong model was shown; its problems are left out
    fill_up_to: where the models agree on fewer problems, add some of different answers, counted; -1 = none
    seed: seed of those
    """
    shown = weak_to_strong.shown_problems(demonstrations_file) if demonstrations_file else []
    origins = read_origin(weak_file, weak_model), read_origin(icl_file, strong_model)
    with grader_of(same_rules(weak_file, origins[0], icl_file, origins[1])) as grader:
        weak, icl = (weak_to_strong.one_each(read_samples(file), file) for file in (weak_file, icl_file))
        found = weak_to_strong.agreement(weak, icl, grader.equal, shown, fill_up_to=fill_up_to, seed=seed)
    tell(found.counts)
    for name in ("weak", "icl", "hybrid"):
        save(getattr(found, name), f"{name} rows", "the models agree on none", weak_file,
             str(Path(save_dir) / f"{name}.json"), dry_run)


def report(rows_file: str, samples_file: str, save_file: str) -> None:
    """How many problems a stage of weak-to-strong kept, and how many of its rows are right, where labels are known.

    rows_file: weak.json or icl.json of `weak_icl`, or what `full_weak` wrote
    samples_file: graded samples.jsonl that these rows were made of, one a problem
    save_file: json file for the numbers
    """
    samples = weak_to_strong.one_each(read_graded(samples_file, save_file), samples_file)
    found = weak_to_strong.kept_right(read_instruction_rows(rows_file), samples)
    runlog.logger().info("%s: %s", rows_file, found.words())
    write(json.dumps(found._asdict(), indent=1) + "\n", save_file)


def vote(samples_file: str, save_file: str, strong_model: str = "", dry_run: bool = False) -> None:
    """Samples by the majority of their answers, with its share of the votes, as jsonl for `contrast`.

    samples_file: graded samples.jsonl with several samples a problem
    save_file: the jsonl file to write
    strong_model: checkpoint directory, or name at a server, that the samples must be of; default: not checked
    """
    origin = read_origin(samples_file, strong_model)
    with grader_of(origin.rules) as grader:
        found = weak_to_strong.votes(read_samples(samples_file), grader.equal)
    tell(Counter("with a majority" if row.answer else "without any answer" for row in found))
    if not dry_run:
        write("".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in found), save_file)
        write_origin(save_file, origin)


def contrast(
    vote_file: str, weak_file: str, save_file: str, weak_model: str = "", strong_model: str = "",
    min_confidence: Share = 0.6, flip_confidence: Share = 0.8, pairs_a_problem: Count = 1, seed: Seed = 42,
    dry_run: bool = False,
) -> None:
    """Pairs of the weak model's response and the strong model's samples, for preference_train.py. No label is read.

    Where the weak answer is the majority's it is chosen, else rejected, with a higher confidence asked for.

    vote_file: what `vote` wrote
    weak_file: graded samples.jsonl of the weak model, one a problem
    weak_model: checkpoint directory, or name at a server, that the weak samples must be of; default: not checked
    strong_model: the same for the samples of the votes
    min_confidence: least share of the votes for the majority's answer
    flip_confidence: least share to reject the weak response
    pairs_a_problem: most pairs from one problem
    seed: seed of the choice of samples
    """
    origins = read_origin(vote_file, strong_model), read_origin(weak_file, weak_model)
    with grader_of(same_rules(vote_file, origins[0], weak_file, origins[1])) as grader:
        weak = weak_to_strong.one_each(read_samples(weak_file), weak_file)
        found = weak_to_strong.contrast(read_votes(vote_file), weak, grader.equal, min_confidence=min_confidence,
                                        flip_confidence=flip_confidence, pairs_a_problem=pairs_a_problem, seed=seed)
    tell(found.counts)
    save(found.pairs, "pairs", f"no problem passes; {SAMPLE_MORE}", vote_file, save_file, dry_run)


def process(
    task: str, samples_file: str, log_dir: str, save_file: str, ckpt_dir: str = "", rollouts: Count = 8,
    label: Literal["hard", "soft"] = "hard", solutions_a_problem: Count = 4, limit: CountOrOff = -1,
    step: StepKind = "paragraph", temperature: NonNegative = 0.7, max_new_tokens: Count = 512,
    max_batch_size: Count = 64, prompt_template: str = "", backend: Backend = "engine", base_url: str = "",
    model_name: str = "", api_key_env: str = "", tokenizer_file: str = "", chat_template: str = "",
    template_args: str = "", seed: Seed = 1, dry_run: bool = False,
) -> None:
    """Judge every step of solutions by rollouts from behind it, for verifier_train.py --objective process.

    Needs a solver: start it with torchrun, or give a server. A rerun continues.

    ckpt_dir: solver that goes on from behind each step
    task: how answers are found and compared; the samples must have been graded by the same rules
    samples_file: graded samples.jsonl with the solutions to judge
    log_dir: directory for the rollouts, samples.jsonl and results.json
    rollouts: samples from behind each step
    label: hard = is a way on known that comes out right: a rollout from here or a later step, or a solution;
        soft = the share of the step's own rollouts that do
    solutions_a_problem: most solutions of one problem
    limit: only the first so many problems; -1 = all
    step: what a step is: a paragraph, with a blank line behind it, or a line, as in GSM8K and MetaMath; train the
        verifier with the same --step
    temperature: of the rollouts
    max_new_tokens: longest rollout
    max_batch_size: sequences that decode at once
    seed: seed of the rollouts
    """
    flags = locals().copy()
    check_solver(flags, goes_on=True)
    chosen = steps.solutions_to_judge(read_graded(samples_file, save_file), solutions_a_problem, limit)
    prompting, benchmark = asked_of(task, prompt_template, samples_file, chosen)
    jobs = list(steps.beginnings(chosen, STEP_ENDS[step]).values())
    if not jobs:
        raise UserError(f"{samples_file} has no solution of two steps or more to judge; with --step {step} a step is a "
                        f"{step}")
    runlog.logger().info("%d beginnings of %d solutions to go on from, %d times each", len(jobs), len(chosen), rollouts)
    if dry_run:
        return
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop=prompting.stop, seed=seed)
    solver = open_solver(flags, prompting)
    if solver.coding:
        raise UserError("process judges the paragraphs of a solution; it has no labels for blocks of code")
    facts = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "step": step}
    sampler = rollout_sampler(solver, {job.prompt.id: job.prefix for job in jobs}, sampling)
    path = draw(solver, sampler, [job.prompt for job in jobs], rollouts, flags=flags, facts=facts, grade=benchmark)
    if parallel.rank() == 0:
        rows = steps.judged_steps(chosen, read_samples(str(path)), STEP_ENDS[step], hard=label == "hard")
        save(rows, "judged solutions", "no sample is graded", samples_file, save_file, dry_run)


def join(
    train_file: str, save_file: str, share: Share = 0.5, wrong_share: Share = 0.3, seed: Seed = 1, dry_run: bool = False
) -> None:
    """Judged solutions, some behind that of another problem, so that a verifier meets longer ones.

    A verifier of problems harder than those that it learns from needs this: their solutions have more steps.

    train_file: judged steps, as `process` leaves them, or outcomes, as `outcome` does
    save_file: the json file to write, with rows of the same kind
    share: share of the rows that get another problem's solution in front; the others stay as they are
    wrong_share: share of wrong ones among the solutions in front; what comes behind them counts as wrong
    seed: seed of the choice
    """
    rows, in_steps = read_judged(train_file), read_instruction_rows(train_file)[0].get("steps") is not None
    made = joined.joined(rows, share, wrong_share, seed, train_file)
    written = [row._asdict() if in_steps else joined.as_outcome(row) for row in made]
    save(written, "judged solutions", "", train_file, save_file, dry_run)


def branch(
    task: str, samples_file: str, log_dir: str, save_file: str, ckpt_dir: str = "", pairs_a_problem: Count = 2,
    attempts: Count = 100, temperature: NonNegative = 1.1, temperature_rise: NonNegative = 0.1,
    temperature_cap: NonNegative = 1.4,
    steps_a_solution: Count = 24, characters_a_step: Count = 3000, error_phrases: list[str] = [],  # noqa: B006
    error_place: ErrorPlace = "solution", step: StepKind = "paragraph",
    max_new_tokens: Count = 512, max_batch_size: Count = 64,
    isolation: Literal["", "bubblewrap", "namespaces", "none"] = "", prompt_template: str = "",
    backend: Backend = "engine", base_url: str = "", model_name: str = "", api_key_env: str = "",
    tokenizer_file: str = "", chat_template: str = "", template_args: str = "", seed: Seed = 1, dry_run: bool = False,
) -> None:
    """Step-controlled pairs for preference_train.py: wrong ways on from behind the first steps of a right solution.

    Needs a solver: start it with torchrun, or give a server. A rerun continues.

    ckpt_dir: solver that goes wrong
    task: how answers are found and compared; the samples must have been graded by the same rules
    samples_file: graded samples.jsonl with right solutions
    log_dir: directory for the wrong solutions, samples.jsonl, and failures.jsonl for branches that never went wrong
    pairs_a_problem: most points to leave the right solution of a problem at
    attempts: how often a branch is tried until it comes to a wrong answer
    temperature: of the first step behind the given ones
    temperature_rise: added for every further step
    temperature_cap: never above this
    steps_a_solution: longer solutions are left out
    characters_a_step: solutions with a longer step are left out
    error_phrases: leave out right solutions that hold one of these, in any case, such as: error apolog
    error_place: where they are looked for: all of a solution, or only what its code printed, such as tracebacks
    step: what a step is: a paragraph, with a blank line behind it, or a line; of solutions with code it is a block
    max_new_tokens: longest step
    max_batch_size: sequences that decode at once
    seed: seed of the points and of the samples
    """
    flags = locals().copy()
    check_solver(flags, goes_on=True)
    step_end = STEP_ENDS[step]
    if ckpt_dir and (chat_template or load.load_config(ckpt_dir, kind="solver").chat_template) == CODE_FORM:
        step_end = Marker.END_OF_BLOCK
    samples = read_faultless(samples_file, save_file, error_phrases, error_place)
    jobs = steps.branches(samples, pairs_a_problem, seed, step_end)
    prompting, benchmark = asked_of(task, prompt_template, samples_file, [job.sample for job in jobs])
    if not jobs:
        raise UserError(f"{samples_file} has no right solution of three steps or more to leave; {SAMPLE_MORE}")
    runlog.logger().info("%d branches of %d problems", len(jobs), len({job.sample.id for job in jobs}))
    if dry_run:
        return
    schedule = Schedule(temperature, temperature_rise, temperature_cap)
    solver = open_solver(flags, prompting, steps_a_solution)
    if solver.coding:
        jobs = replayable(jobs, solver.coding)
        runlog.logger().info("%d of them leave solutions whose code prints the same again", len(jobs))
    facts = schedule._asdict() | {"attempts": attempts, "steps_a_solution": steps_a_solution,
                                  "max_new_tokens": max_new_tokens, "seed": seed, "step": step}
    with Grader(benchmark) as grader:
        sampler = branching_sampler(
            solver, {job.prompt.id: job.prefix for job in jobs}, schedule,
            lambda response, answer: grader.grade_one(response, answer).outcome, attempts=attempts,
            max_steps=steps_a_solution, max_new_tokens=max_new_tokens, seed=seed, step_end=step_end)
        path = draw(solver, sampler, [job.prompt for job in jobs], 1, flags=flags, facts=facts)
    if parallel.rank() == 0:
        found = steps.step_controlled_pairs(jobs, read_samples(str(path)), schedule, max_steps=steps_a_solution,
                                            max_step_characters=characters_a_step)
        tell(found.counts)
        save(found.pairs, "pairs", "no branch is kept", samples_file, save_file, dry_run)


def mix(
    pairs_file: str, branch_file: str, save_file: str, control_file: str = "", share: Share = 0.5, seed: Seed = 1,
    dry_run: bool = False,
) -> None:
    """Ordinary and step-controlled pairs in one file, and a file of as many ordinary ones to compare with.

    pairs_file: ordinary pairs, as `pairs` leaves them
    branch_file: step-controlled pairs, as `branch` leaves them; all are taken
    control_file: json file for as many ordinary pairs, those of the mix among them
    share: share of ordinary pairs in the mix
    seed: seed of the choice and of the order of rows
    """
    for file in (pairs_file, branch_file):
        read_pairs(file)  # names the row that is no pair
    ordinary, branched = read_instruction_rows(pairs_file), read_instruction_rows(branch_file)
    mixed, control = mixed_pairs(ordinary, branched, share, seed)
    save(mixed, "pairs", "", pairs_file, save_file, dry_run)
    if control_file:
        save(control, "pairs", "", pairs_file, control_file, dry_run)


def open_solver(flags: Mapping[str, object], prompting: Prompting, max_rounds: int = 24) -> Solver | ServedSolver:
    """What a command's flags ask: a server, or the model of a checkpoint on this rank, with what runs its code."""
    parallel.start(seed=flags["seed"])
    if flags["backend"] == "openai":
        return ServedSolver(flags, prompting)
    ckpt_dir, template, args = flags["ckpt_dir"], flags["chat_template"], flags["template_args"]
    tokenizer = load.load_tokenizer(ckpt_dir, flags["tokenizer_file"], template, args)
    source = {"checkpoint": storage.fingerprint(Path(ckpt_dir)), **({"chat_template": template} if template else {}),
              "template_args": tokenizer.template_args or None}
    coding = Coding(tokenizer, max_rounds, flags.get("isolation") or None) if tokenizer.code else None
    return Solver(load.load_solver(ckpt_dir), tokenizer, prompting, flags["max_batch_size"], coding, source)


COMMANDS = {
    "attempts": attempts, "pairs": pairs, "outcome": outcome, "reject": reject, "prefer": prefer, "select": select,
    "split": split, "full_weak": full_weak, "demonstrations": demonstrations, "weak_icl": weak_icl, "report": report,
    "vote": vote, "contrast": contrast, "process": process, "join": join, "branch": branch,
    "mix": mix,
}

if __name__ == "__main__":
    cli.run(COMMANDS)
