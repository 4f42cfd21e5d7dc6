"""The entry scripts: the whole path by real commands on two ranks, their flags, and one clear line for each mistake."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import checkpoint_split
import data_build
from src import load, parallel
from src.checkpoint import storage
from src.command import cli
from src.command.flags import bind, flags_of, is_path, parse
from src.errors import UserError
from src.evaluation.prompting import make_prompting
from src.grading.tasks import find_task
from tests.reference import hf_model
from tests.tiny import build, main_of, make_verifier, split, write_hf_llama, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PROBLEMS = [
    {"instruction": f"{a}+{b}=", "output": f"{a}+{b}={a + b}\n\n#### {a + b}", "label": str(a + b)}
    for a in range(1, 5)
    for b in range(1, 5)
]
EXACTLY_ONE_ERROR = re.compile(r"error: [^\n]+\n")

SCORED = ("ckpt_dir", "log_dir", "task", "samples_file", "label_file")  # flags of verifier_evaluate.py by position


def launch(
    folder: Path, script: str, *flags: object, n: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder, on n ranks if given. Under two minutes, or the test fails."""
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_json(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def teach(folder: Path) -> None:
    """Train transformers' model to answer the problems right about every other time."""
    model, tokenizer = hf_model(folder), load.load_tokenizer(split(folder, folder / "ours"))
    shutil.rmtree(folder / "ours")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompts = [[1, *tokenizer.encode(row["instruction"])] for row in PROBLEMS]
    for step in range(120):
        answers = [str(int(row["label"]) + (index + step) % 2) for index, row in enumerate(PROBLEMS)]
        rows = [p + tokenizer.encode(f"#### {a}") + [2] for p, a in zip(prompts, answers, strict=True)]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding_value=2)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def tear_samples(folder: Path, ckpt_dir: Path) -> None:
    """What an evaluation of this checkpoint leaves when it is killed within its first line."""
    numbers = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 12, "seed": 1}
    numbers |= {"chat_template": "none", "quantize": ""}
    numbers |= make_prompting(find_task("GSM8K")).facts()
    write_json(folder / "samples.identity.json", {"checkpoint": storage.fingerprint(ckpt_dir)} | numbers)
    (folder / "samples.jsonl").write_text('{"id": "0", "sam', encoding="utf-8")


@pytest.fixture(scope="module")
def whole_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the users' documents have run, from a Hugging Face directory to PPO."""
    parallel.start()
    folder = tmp_path_factory.mktemp("path")
    teach(write_hf_llama(folder / "hf"))
    write_json(folder / "dataset/GSM8K/train.json", PROBLEMS)
    samples = "--num_samples 4 --temperature 1 --max_new_tokens 12"
    trained = "--model_type llama --max_batch_size 4"
    problems = "--label_file dataset/GSM8K/train.json"
    train_solver = f"solver_train.py --ckpt_dir ckpt --train_file dataset/GSM8K/train.json {trained}"
    train_verifier = f"verifier_train.py --ckpt_dir solver --train_file pairs.json {trained}"
    for n, command in (
        (None, "checkpoint_split.py --ckpt_file hf --save_path ckpt --n 2"),
        (2, f"{train_solver} --save_dir solver --lora_rank -1"),
        (2, f"{train_solver} --save_dir solver_lora --lora_rank 8"),
        (
            2,
            f"solver_evaluate.py --task GSM8K --ckpt_dir solver_lora --log_dir log {problems} {trained} {samples}",
        ),
        (None, "data_build.py pairs --samples_file log/samples.jsonl --save_file pairs.json"),
        (2, f"{train_verifier} --save_dir verifier --lora_rank -1"),
        (2, f"{train_verifier} --save_dir verifier_lora --lora_rank 8"),
        (
            2,
            f"verifier_evaluate.py --task GSM8K --ckpt_dir verifier_lora --samples_file log/samples.jsonl {problems} "
            "--log_dir scored --max_batch_size 8",
        ),
        (
            2,
            "ppo_train.py --actor_ckpt_dir solver_lora --actor_save_dir ppo/actor --critic_ckpt_dir verifier "
            "--critic_save_dir ppo/critic --reward_model_ckpt_dir verifier_lora --max_batch_size 4 --max_buffer_size 8",
        ),
    ):
        if command.startswith("solver_evaluate"):
            tear_samples(folder / "log", folder / "solver_lora")
        done = launch(folder, *command.split(), n=n)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("ckpt", "consolidated"),
        ("solver", "consolidated"),
        ("solver/epoch-1", "consolidated"),
        ("solver_lora", "adapter"),
        ("verifier", "consolidated"),
        ("verifier_lora", "adapter"),
        ("ppo/actor", "consolidated"),
        ("ppo/critic", "consolidated"),
    ],
)
def test_every_step_leaves_a_checkpoint_of_two_shards(whole_path: Path, name: str, kind: str) -> None:
    folder = whole_path / name
    storage.check_complete(folder)
    assert [path.name for path in sorted(folder.glob("*.pth"))] == [f"{kind}.00.pth", f"{kind}.01.pth"]
    for path in folder.glob("*.pth"):
        assert all(torch.isfinite(tensor).all() for tensor in storage.read_shard(path).values())
    verifier = name.startswith("verifier") or name.endswith("critic")
    assert json.loads((folder / "params.json").read_text())["value_head"] is verifier
    assert (folder / "tokenizer.model").is_file()
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_training_left_its_record(whole_path: Path) -> None:
    for name in ("solver", "solver_lora"):
        rows = metrics(whole_path / name)
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
        run = json.loads((whole_path / name / "run.json").read_text())
        assert run["world_size"] == 2 and run["flags"]["train_file"] == "dataset/GSM8K/train.json"
    assert metrics(whole_path / "solver")[0]["loss"] == metrics(whole_path / "solver_lora")[0]["loss"]
    for name in ("verifier", "verifier_lora"):
        rows = metrics(whole_path / name)
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert 0 <= rows[-1]["held_out_accuracy"] <= 1
        params = json.loads((whole_path / name / "params.json").read_text())
        assert params["score_std"] == rows[-1]["score_std"] and params["score_mean"] == rows[-1]["score_mean"]
    rows = metrics(whole_path / "ppo/actor")
    assert len(rows) == 2 and rows[0]["kl"] == 0.0 and all(row["grad_norm"] > 0 for row in rows)
    assert all(row["sampler_mismatch"] < 1e-4 and row["tokens_per_second"] > 0 for row in rows)
    assert (whole_path / "ppo/actor/report.html").is_file()
    samples = (whole_path / "ppo/actor/rollouts/step-000002.jsonl").read_text().splitlines()
    assert len(samples) == 8 and json.loads(samples[0]).keys() >= {"prompt", "response", "rewards", "learned"}


def test_evaluation_counts_and_scores_every_sample(whole_path: Path) -> None:
    for name in ("log", "scored"):
        results = json.loads((whole_path / name / "results.json").read_text())
        assert results["problems"] == len(PROBLEMS) and results["samples"] == 4 * len(PROBLEMS)
        assert 0.1 < results["accuracy"] < 0.9  # it was taught to be right every other time
    assert results["best_of_at"].keys() == results["maj_at"].keys() == {"1", "2", "4"}
    lines = (whole_path / "scored/samples.jsonl").read_text().splitlines()
    assert len({json.loads(line)["score"] for line in lines}) > 1


def test_pairs_are_right_against_wrong(whole_path: Path) -> None:
    labels = {row["instruction"]: row["label"] for row in PROBLEMS}
    pairs = json.loads((whole_path / "pairs.json").read_text())
    assert len(pairs) > 5
    for row in pairs:
        label = labels[row["instruction"]]
        assert row["chosen"].endswith(f"#### {label}") and not row["rejected"].endswith(f"#### {label}")


def test_the_actor_can_be_resharded_and_evaluated_on_one_rank(whole_path: Path, tmp_path: Path) -> None:
    evaluate = main_of("solver_evaluate", "task", "label_file", "log_dir", "ckpt_dir")
    for source in ("ppo/actor", "solver_lora"):
        name = source.replace("/", "_")
        checkpoint_split.main(
            checkpoint_split.SplitConfig(
                ckpt_file=str(whole_path / source), save_path=str(tmp_path / name), n=1
            )
        )
        labels = str(whole_path / "dataset/GSM8K/train.json")
        evaluate("GSM8K", labels, str(tmp_path / f"log_{name}"), str(tmp_path / name), max_new_tokens=12)
        found = json.loads((tmp_path / f"log_{name}/results.json").read_text())
        assert found["problems"] == found["samples"] == len(PROBLEMS) and found["accuracy"] > 0


def entry(name: str) -> Callable[..., None]:
    """What a script's name, and a command behind it, start: `solver_train`, `data_build pairs`."""
    script, _, command = name.partition(" ")
    module = importlib.import_module(script)
    return module.COMMANDS[command] if command else module.main


ENTRIES = [
    name
    for script in SCRIPTS
    for name in [
        f"{script} {command}" for command in getattr(importlib.import_module(script), "COMMANDS", {})
    ]
    or [script]
]


@pytest.mark.parametrize("name", ENTRIES)
def test_flags_are_documented_and_their_numbers_have_bounds(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = entry(name)
    flags = flags_of(main)
    assert all(flag.meaning for flag in flags.values())
    assert [flag.name for flag in flags.values() if {int, float} & set(flag.kinds) and not flag.bounds] == []
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{flag}  " in shown for flag in flags)


def test_a_list_of_commands_keeps_names_and_words_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(data_build.COMMANDS, ["--help"])
    shown = capsys.readouterr().out
    words = {name: (command.__doc__ or "").split()[0] for name, command in data_build.COMMANDS.items()}
    assert [name for name, word in words.items() if not re.search(rf"^  {name}  +{word} ", shown, re.MULTILINE)] == []


def test_strings_that_python_joins_have_a_space_between_their_words() -> None:
    """In messages and in --help, whose words may stand in several strings."""
    joined, skipped = [], (tokenize.NL, tokenize.COMMENT)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py"), *ROOT.glob("dataset/**/*.py")]:
        lines = io.StringIO(path.read_text(encoding="utf-8")).readline
        tokens = [token for token in tokenize.generate_tokens(lines) if token.type not in skipped]
        for one, other in zip(tokens, tokens[1:], strict=False):
            if one.type == other.type == tokenize.STRING and "r" not in one.string.partition('"')[0]:  # no patterns
                if re.search(r"(?<!\\)[\w.,;:)}][\"']+$", one.string) and re.match(r"f?[\"']+[\w({-]", other.string):
                    joined.append(f"{path.name}:{one.start[0]}: {one.string[-20:]} {other.string[:20]}")
    assert joined == []


class World(NamedTuple):
    """Good directories and files, and the flags with which every script would run."""

    folder: Path
    flags: dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    parallel.start()
    folder = tmp_path_factory.mktemp("world")
    hf = write_hf_llama(folder / "hf")
    one = split(hf, folder / "one")
    split(hf, folder / "two", 2)
    make_verifier(one, folder / "verifier")
    write_json(folder / "train.json", PROBLEMS)
    write_json(
        folder / "pairs.json", [{"instruction": str(i), "chosen": "1", "rejected": "2"} for i in range(20)]
    )
    pair = {"instruction": "1", "chosen": "1", "rejected": "2", "prefix": ["0"]}
    write_json(folder / "prefix.json", [pair])
    steps = [{"instruction": str(i), "steps": ["1", "2"], "labels": [1, i % 2]} for i in range(20)]
    write_json(folder / "steps.json", steps)
    write_json(folder / "short.json", [steps[0] | {"labels": [1]}])
    write_json(folder / "empty_step.json", [steps[0] | {"steps": ["1", " "]}])
    write_json(folder / "beyond.json", [steps[0] | {"labels": [1, 2]}])
    write_json(folder / "samples.json", [{"response": f"#### {row['label']}"} for row in PROBLEMS])
    graded = [
        {"prompt": "q", "response": "1", "outcome": "right"},
        {"prompt": "q", "response": "2", "outcome": "wrong"},
    ]
    write_json(folder / "graded.json", [row | {"id": "0", "sample": n} for n, row in enumerate(graded)])
    train = {"ckpt_dir": "one", "save_dir": "out", "train_file": "train.json"}
    in_steps = [row | {"id": "0", "sample": n, "label": "1"} for n, row in enumerate(graded)]
    write_json(folder / "judged.json", [in_steps[0], in_steps[1] | {"response": "1\n\n2"}])
    write_json(folder / "three.json", [in_steps[0] | {"response": "2\n\n3\n\n#### 1"}])
    (folder / "mine.py").write_text("def found(completions):\n    return [0.0] * len(completions)\n")
    for name in ("judged", "three"):
        write_json(folder / f"{name}.identity.json", {"checkpoint": "m", "rules": find_task("toy").rules()})
    build = {"ckpt_dir": "one", "task": "toy", "samples_file": "judged.json", "log_dir": "out",
             "save_file": "out/pairs.json"}
    evaluate = {"task": "toy", "ckpt_dir": "one", "label_file": "train.json", "log_dir": "out"}
    return World(
        folder,
        {
            "checkpoint_split": {"ckpt_file": "hf", "save_path": "out", "n": 2},
            "solver_train": train,
            "solver_evaluate": evaluate,
            "data_build pairs": {"samples_file": "graded.json", "save_file": "out/pairs.json"},
            "data_build outcome": {"samples_file": "graded.json", "save_file": "out/pairs.json"},
            "data_build reject": {"samples_file": "graded.json", "save_file": "out/pairs.json"},
            "data_build prefer": {"samples_file": "graded.json", "save_file": "out/pairs.json"},
            "data_build select": {
                "train_file": "train.json",
                "split": "level=1-3",
                "save_file": "out/easy.json",
            },
            "data_build split": {
                "train_file": "train.json",
                "first_file": "out/a.json",
                "second_file": "out/b.json",
            },
            "data_build process": build,
            "data_build join": {"train_file": "steps.json", "save_file": "out/joined.json"},
            "data_build branch": build,
            "verifier_train": train | {"train_file": "pairs.json"},
            "preference_train": train | {"train_file": "pairs.json"},
            "preference_evaluate": {
                "ckpt_dir": "one",
                "reference_ckpt_dir": "one",
                "steps_file": "steps.json",
                "log_dir": "out",
            },
            "verifier_evaluate": evaluate | {"ckpt_dir": "verifier", "samples_file": "samples.json"},
            "ppo_train": {
                "actor_ckpt_dir": "one",
                "actor_save_dir": "out/actor",
                "critic_ckpt_dir": "verifier",
                "critic_save_dir": "out/critic",
                "reward_model_ckpt_dir": "verifier",
                "train_file": "train.json",
            },
        },
    )


def assert_refused(
    world: World, script: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    """The script stops with this one line and leaves nothing that looks like a result."""
    main = entry(script)
    flags = world.flags[script] | changes
    argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with pytest.raises(UserError, match=message) as problem:
        bind(main, parse(main, argv))()
    assert "\n" not in str(problem.value)
    left = {path.name for path in (tmp_path / "out").rglob("*")} if (tmp_path / "out").is_dir() else set()
    assert not left & {"params.json", "manifest.json", "results.json", "pairs.json", "samples.jsonl"}, left


@pytest.fixture
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory in which the names of `world` are links."""
    for path in world.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_copy(here: Path, name: str) -> Path:
    """A directory of `world` that may be damaged."""
    return Path(shutil.copytree(here / name, here / "damaged"))


def edit_params(folder: Path, **changes: object) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "two",
        lambda f: (f / "consolidated.01.pth").unlink(),
        "lacks consolidated.01.pth, which its manifest names",
    ),
    (
        "two",
        lambda f: cut(f / "consolidated.01.pth"),
        r"consolidated.01.pth has \d+ bytes but the manifest says \d+",
    ),
    (
        "one",
        lambda f: ((f / "manifest.json").unlink(), cut(f / "consolidated.00.pth")),
        "cannot be read as a checkpoint",
    ),
    (
        "one",
        lambda f: (f / "params.json").unlink(),
        "has no params.json: it is no checkpoint, or its save was",
    ),
    ("one", lambda f: (f / "params.json").write_text("{"), "params.json: not valid json"),
    (
        "one",
        lambda f: (f / "params.json").write_text("[]"),
        "params.json: found a list; expected a json object",
    ),
    ("one", lambda f: (f / "manifest.json").write_text("{}"), "manifest.json"),
    (
        "one",
        lambda f: (f / "tokenizer.model").unlink(),
        r"holds no tokenizer \(.*\); give checkpoint_split.py",
    ),
    ("one", lambda f: edit_params(f, n_layers=3), "params.json: n_layers=3, but the weights hold 2 layers"),
    ("one", lambda f: edit_params(f, n_layers=1), "unknown parameter 'layers.1.attention.wk.weight'"),
    (
        "one",
        lambda f: edit_params(f, ffn_dim=64),
        r"w1.weight has shape \[48, 32\] but params.json means \[64, 32\]",
    ),
    (
        "one",
        lambda f: edit_params(f, vocab_size=16),
        "has 27 pieces but damaged embeds 16|tok_embeddings.weight has shape",
    ),
    ("one", lambda f: edit_params(f, n_kv_heads=3), "n_heads=8 is not a multiple of n_kv_heads=3"),
    ("one", lambda f: edit_params(f, dim="32"), "dim"),
    ("one", lambda f: edit_params(f, n_heads=None), "n_heads"),
    ("one", lambda f: edit_params(f, size=7), "unknown key 'size'"),
]


@pytest.mark.parametrize("source, damage, message", DAMAGE, ids=[message for _, _, message in DAMAGE])
def test_a_damaged_checkpoint(
    world: World, here: Path, source: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(own_copy(here, source))
    for script in ("solver_train", "solver_evaluate"):
        assert_refused(world, script, {"ckpt_dir": "damaged"}, message, here)


DATA: list[tuple[str, str, str]] = [
    (
        '{"instruction": "a", "output": "b", "chosen": "b", "rejected": "c", "label": "1"}\n{"instruction": \n',
        "bad.json, line 2: not valid json", "all",
    ),
    ("", "bad.json holds no rows", "all"),
    ("[]", "bad.json holds no rows", "all"),
    ('[{"output": "b"}]', "bad.json, row 1: key 'instruction' is missing; found output", "all"),
    ('[{"instruction": "a"}]', "bad.json, row 1: key 'output' is missing", "solver_train"),
    ('[{"instruction": "a"}]', "bad.json, row 1: key 'chosen' is missing", "verifier_train"),
    ('[{"instruction": "a"}]', "bad.json, row 1: key 'chosen' is missing", "preference_train"),
    (
        '{"instruction": "a", "label": "1"}\n{"instruction": "b"}',
        "bad.json, line 2: key 'label' is",
        "solver_evaluate",
    ),
    (
        '{"instruction": "a", "label": "1"}\n{"instruction": "b"}',
        "bad.json, line 2: key 'label' is",
        "ppo_train",
    ),
    (
        json.dumps([{"instruction": "1" * n, "label": "1"} for n in (201, 200)]),
        r"bad.json: 2 of 2 prompts fill the context of one, 128 tokens; the first is row 1 \(id '0', 20\d tokens\)",
        "ppo_train",
    ),
]


@pytest.mark.parametrize("text, message, which", DATA)
def test_a_bad_data_file(world: World, here: Path, text: str, message: str, which: str) -> None:
    (here / "bad.json").write_text(text)
    files = {
        "solver_train": {"train_file": "bad.json"},
        "verifier_train": {"train_file": "bad.json"},
        "preference_train": {"train_file": "bad.json"},
        "solver_evaluate": {"label_file": "bad.json"},
        "verifier_evaluate": {"label_file": "bad.json"},
        "ppo_train": {"train_file": "bad.json", "reward": "rule", "reward_model_ckpt_dir": None},
    }
    for script in files if which == "all" else [which]:
        assert_refused(world, script, files[script], message, here)


STEPS_ALONE = {"task": None, "label_file": None, "samples_file": None, "steps_file": "steps.json"}
MISTAKES: list[tuple[str, dict[str, object], str]] = [
    ("solver_train", {"ckpt_dir": "nowhere"}, "nowhere"),
    ("solver_train", {"ckpt_dir": "hf"}, "hf has no params.json: it is no checkpoint"),
    (
        "solver_train",
        {"ckpt_dir": "verifier"},
        r"verifier is a verifier \(it has a value head\); a solver is needed",
    ),
    ("solver_evaluate", {"ckpt_dir": "verifier"}, "verifier is a verifier"),
    (
        "verifier_evaluate",
        {"ckpt_dir": "one"},
        r"one is a solver \(no value head\); train a verifier from it",
    ),
    ("ppo_train", {"actor_ckpt_dir": "verifier"}, "verifier is a verifier"),
    ("ppo_train", {"reward_model_ckpt_dir": "one"}, r"one is a solver \(no value head\)"),
    ("ppo_train", {"reward_model_ckpt_dir": None}, "--reward verifier needs --reward_model_ckpt_dir"),
    ("ppo_train", {"advantage": "grpo"}, "--advantage grpo has no critic; leave out --critic_ckpt_dir and"),
    ("ppo_train", {"critic_ckpt_dir": None}, "--advantage gae needs --critic_ckpt_dir and --critic_save_dir"),
    ("ppo_train", {"policy_loss": "cispo", "dual_clip": 3}, "--dual_clip bounds a clipped surrogate"),
    ("ppo_train", {"advantage": "gdpo", "kl_coef": 0.1}, "--advantage gdpo normalises each reward by itself"),
    ("ppo_train", {"advantage": "rloo", "group_size": 1}, "--group_size is 1, but --advantage rloo compares"),
    ("ppo_train", {"group_size": 5}, "--max_buffer_size 96 episodes are no whole number of groups"),
    ("ppo_train", {"dual_clip": 0.5}, "--dual_clip is 0.5, expected more than 1, or 0"),
    (
        "ppo_train",
        {"filter_groups": "true"},
        "--filter_groups drops groups of equal rewards, so --group_size",
    ),
    ("ppo_train", {"overlong_buffer": 300}, "--overlong_buffer 300 needs --truncated penalty and more"),
    ("ppo_train", {"kl_coef": 0, "kl_target": 1}, "--kl_target adapts a KL term, but --kl_coef is 0"),
    ("ppo_train", {"reward": "nowhere.py:f", "reward_model_ckpt_dir": None}, "--reward 'nowhere.py:f' is neither"),
    ("ppo_train", {"reward": "rul", "reward_model_ckpt_dir": None, "dry_run": "true"}, "--reward 'rul' is neither"),
    ("ppo_train", {"reward": "mine.py:lost", "reward_model_ckpt_dir": None, "dry_run": "true"},
     "--reward mine.py:lost: the process did not start .*has no attribute 'lost'"),
    ("ppo_train", {"reward_weights": "1,2"}, "--reward_weights has 2 numbers for 1 rewards"),
    ("ppo_train", {"temperature": 0}, "PPO learns from sampled responses; expected more than 0"),
    ("ppo_train", {"critic_save_dir": "out/actor"}, "are the same directory; one would overwrite the other"),
    (
        "solver_train",
        {"model_type": "llama-2-7b"},
        "one has dim=32, but --model_type llama-2-7b means dim=4096",
    ),
    ("solver_train", {"model_type": "lama"}, "--model_type lama is unknown; expected one of llama, "),
    ("verifier_evaluate", {"model_type": "llama-3-8b"}, "but --model_type llama-3-8b means"),
    ("solver_train", {"save_dir": "train.json/out"}, r"cannot write to train.json/out \(Not a directory\)"),
    ("verifier_train", {"save_dir": "train.json"}, r"cannot write to train.json \(File exists\)"),
    ("solver_evaluate", {"log_dir": "train.json/out"}, "cannot write to train.json/out"),
    ("verifier_evaluate", {"log_dir": "train.json/out"}, "cannot write to train.json/out"),
    ("ppo_train", {"critic_save_dir": "train.json/out"}, "cannot write to train.json/out"),
    ("checkpoint_split", {"save_path": "train.json/out"}, "cannot write to train.json/out"),
    ("solver_train", {"save_dir": "one"}, "saving to one would overwrite one, which is read"),
    (
        "ppo_train",
        {"actor_save_dir": "verifier"},
        "saving to verifier would overwrite verifier, which is read",
    ),
    ("solver_train", {"lora_rank": 8, "lora_targets": "wq,wx"}, "lora_targets names 'wx'"),
    *(
        (script, {"quantize": "int8"}, "--quantize int8 holds weights that are not trained, but --lora_rank -1")
        for script in ("solver_train", "verifier_train", "preference_train")
    ),
    ("solver_train", {"max_seq_len": 4}, "16 of 16 rows are longer than --max_seq_len 4"),
    ("solver_train", {"tokenizer_file": "train.json"}, "train.json is no tokenizer"),
    ("verifier_train", {"held_out": 0}, "--held_out 0.0 of 20 problems leaves nothing"),
    ("solver_evaluate", {"ckpt_dir": None}, "give one of --ckpt_dir, to sample, --samples_file"),
    (
        "solver_evaluate",
        {"samples_file": "samples.json"},
        "give one of --ckpt_dir, to sample, --samples_file",
    ),
    ("solver_evaluate", {"ckpt_dir": None, "samples_file": "samples.json", "task": "none"}, "grades nothing"),
    ("solver_evaluate", {"top_p": 0}, "top_p is 0.0, expected more than 0 and at most 1"),
    ("checkpoint_split", {"n": 9}, "hf: n_heads=8 leaves nothing to do for shard"),
    ("checkpoint_split", {"n": 0}, "--n is 0, expected 1 or more"),
    ("checkpoint_split", {"n": -1}, "--n is -1, expected 1 or more"),
    ("checkpoint_split", {"ckpt_file": "nowhere"}, "nowhere"),
    ("checkpoint_split", {"ckpt_file": "train.json"}, "train.json cannot be read as a checkpoint"),
    ("checkpoint_split", {"tokenizer_file": "nowhere"}, "--tokenizer_file nowhere does not exist"),
    ("data_build pairs", {"samples_file": "samples.json"}, "samples.json has no outcomes; grade it first"),
    ("data_build pairs", {"pairs_a_problem": 0}, "--pairs_a_problem is 0, expected 1 or more"),
    ("data_build outcome", {"max_ratio": 0.5}, "--max_ratio is 0.5, expected a number of at least 1"),
    ("data_build prefer", {}, "has the score None; expected a probability"),
    ("solver_evaluate", {"limit": 0}, "--limit is 0, expected 1 or more, or -1"),
    ("solver_evaluate", {"limit": -5}, "--limit is -5, expected 1 or more, or -1"),
    ("solver_evaluate", {"num_samples": 0}, "--num_samples is 0, expected 1 or more"),
    ("solver_evaluate", {"num_samples": -5}, "--num_samples is -5, expected 1 or more"),
    ("solver_evaluate", {"temperature": "nan"}, "--temperature is nan, expected 0 or more"),
    ("solver_train", {"epochs": 0}, "--epochs is 0, expected 1 or more"),
    ("solver_train", {"max_batch_size": 0}, "--max_batch_size is 0, expected 1 or more"),
    ("verifier_train", {"lr": -1e-5}, "--lr is -1e-05, expected 0 or more"),
    ("solver_train", {"lr": "nan"}, "--lr is nan, expected 0 or more"),
    ("solver_train", {"lora_rank": 0}, "--lora_rank is 0, expected 1 or more, or -1"),
    ("solver_train", {"max_grad_norm": 0}, "--max_grad_norm is 0.0, expected more than 0"),
    ("solver_train", {"seed": 10**30}, "--seed is 10+, expected a whole number of 64 bits"),
    ("ppo_train", {"max_buffer_size": 0}, "--max_buffer_size is 0, expected 1 or more"),
    ("ppo_train", {"max_steps": 0}, "--max_steps is 0, expected 1 or more, or -1"),
    ("ppo_train", {"critic_warmup": 1}, "--critic_warmup 1 leaves the actor none of 1 buffers"),
    (
        "ppo_train",
        {"share_base": "true"},
        "--share_base is of weights below adapters; give --lora_rank",
    ),
    (
        "ppo_train",
        {"share_base": "true", "lora_rank": 2, "phases": "true"},
        "one base in one type for the whole run",
    ),
    (
        "ppo_train",
        {"max_refills": 2},
        "--max_refills replaces the groups that --filter_groups drops; give both",
    ),
    ("ppo_train", {"gamma": 1.5}, "--gamma is 1.5, expected a number from 0 to 1"),
    ("ppo_train", {"critic_lr": "inf"}, "--critic_lr is inf, expected 0 or more"),
    ("verifier_train", {"train_file": "steps.json"}, "steps.json, row 1: key 'chosen' is missing"),
    (
        "verifier_train",
        {"train_file": "short.json", "objective": "process"},
        "short.json, row 1: .* found 2 and 1",
    ),
    ("verifier_train", {"train_file": "empty_step.json", "objective": "process"}, "row 1: step 1 is ' '"),
    (
        "verifier_train",
        {"train_file": "beyond.json", "objective": "process"},
        "row 1: label 1 is 2; expected 0 to 1",
    ),
    (
        "verifier_train",
        {"train_file": "pairs.json", "objective": "outcome"},
        "row 1: key 'output' is missing; found instruction, chosen, rejected; expected outcomes",
    ),
    ("verifier_train", {"weights": "1,2"}, "--weights has 2 numbers for 1 training files"),
    ("verifier_train", {"train_file": "pairs.json,nowhere.json"}, "^nowhere.json does not exist"),
    ("verifier_train", {"weights": "0"}, r"--weights is \[0.0\], expected more than 0 each"),
    ("verifier_evaluate", {"samples_file": None}, "give either --samples_file with --task and --label_file"),
    ("verifier_evaluate", STEPS_ALONE, "is a pairwise verifier"),
    *(
        ("verifier_evaluate", STEPS_ALONE | {name: value}, f"--{name} has no effect: each step of each row of --steps")
        for name, value in (("split", "a"), ("task", "toy"), ("label_file", "train.json"), ("aggregation", "min"))
    ),
    ("verifier_evaluate", {"threshold_file": "steps.json"}, "--threshold_file has no effect"),
    ("verifier_evaluate", {"aggregation": "min"}, "--aggregation has no effect: verifier gives one score"),
    *(
        ("solver_evaluate", {name: value}, f"--{name} has no effect: --temperature 0 takes the likeliest token")
        for name, value in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("num_samples", 8))
    ),
    ("solver_evaluate", {"max_rounds": 3}, "--max_rounds has no effect: one answers in text alone"),
    ("data_build branch", {"samples_file": "three.json", "code_seconds": 2}, "--code_seconds has no effect: one"),
    ("data_build branch", {"error_place": "executions"}, "--error_place has no effect: there are no --error_phrases"),
    ("data_build split", {"allow_overlap": True}, "--allow_overlap has no effect: there is no --test_file"),
    ("checkpoint_split", {"inspect": "one"}, "--.* has no effect: --inspect describes a checkpoint, and writes none"),
    ("checkpoint_split", {"certify": "one"}, "--.* has no effect: --certify writes no checkpoint"),
    ("checkpoint_split", {"certify_layers": 1}, "--certify_layers has no effect: there is no --certify"),
    ("checkpoint_split", {"format": "hf"}, "--n has no effect: --format hf is not cut into shards"),
    ("checkpoint_split", {"max_shard_size": 1}, "--max_shard_size has no effect: it is of --format hf alone"),
    ("checkpoint_split", {"merge_lora": False}, "--merge_lora false keeps an adapter one, but hf is none"),
    ("verifier_evaluate", {"ckpt_dir": "one"}, r"is a solver \(no value head\)"),
    (
        "data_build select",
        {"split": "difficulty=1"},
        "'difficulty=1' is no condition; expected NAME, level=4",
    ),
    ("data_build select", {"split": "level=9"}, "no problem has level 9; found"),
    ("verifier_evaluate", {"split": "level=9"}, "no problem has level 9; found"),
    ("data_build split", {"share": 0}, "--share 0.0 of 16 questions of train.json leaves one part none"),
    ("data_build split", {"share": 2}, "--share is 2.0, expected a number from 0 to 1"),
    ("data_build split", {"test_file": "train.json"}, "16 questions of train.json are in train.json"),
    ("data_build process", {"samples_file": "graded.json"}, "has no key 'label'; grade the file"),
    ("data_build process", {"task": "MATH"}, "was graded by gsm8k/hashes@5, exact@5, but --task MATH means"),
    (
        "data_build process",
        {"solutions_a_problem": 1},
        "judged.json has no solution of two steps or more to judge",
    ),
    ("data_build process", {"rollouts": 0}, "--rollouts is 0, expected 1 or more"),
    ("data_build process", {"temperature": 0}, "--temperature 0 would make all of --rollouts 8 alike; give more than"),
    ("data_build branch", {}, "judged.json has no right solution of three steps or more to leave"),
    ("data_build branch", {"samples_file": "pairs.json"}, "pairs.json, row 1: key 'response' is missing"),
    ("data_build branch", {"attempts": 0}, "--attempts is 0, expected 1 or more"),
    (
        "preference_train",
        {"objective": "cdpo"},
        "--label_smoothing is 0.0; --objective cdpo needs the share of wrong",
    ),
    ("preference_train", {"label_smoothing": 0.1}, "--label_smoothing is of --objective cdpo, not of dpo"),
    (
        "preference_train",
        {"label_smoothing": 0.5},
        "--label_smoothing is 0.5, expected 0 or more and less than 0.5",
    ),
    ("preference_evaluate", {"steps_file": "judged.json"}, "judged.json"),
    ("preference_evaluate", {"reference_ckpt_dir": "nowhere"}, "nowhere"),
    ("preference_train", {"margin": 1}, "--margin is of --objective simpo, not of dpo"),
    ("preference_train", {"objective": "ipo", "length_normalize": True}, "ipo always takes means a token"),
    (
        "preference_train",
        {"objective": "orpo", "reference_ckpt_dir": "two"},
        "--objective orpo has no reference",
    ),
    (
        "preference_train",
        {"objective": "simpo", "reference_file": "r"},
        "--reference_file is given, but --objective",
    ),
    ("preference_train", {"beta": 0}, "--beta is 0.0, expected more than 0"),
    ("preference_train", {"train_file": "steps.json"}, "steps.json, row 1: key 'chosen' is missing"),
    (
        "preference_train",
        {"train_file": "prefix.json"},
        "prefix.json, row 1: 'prefix' is a list; expected a string",
    ),
    (
        "preference_train",
        {"reference_ckpt_dir": "verifier"},
        r"verifier is a verifier \(it has a value head\)",
    ),
    (
        "preference_train",
        {"reference_file": "samples.json"},
        "samples.json, row 1: expected the keys 'key' and",
    ),
    (
        "preference_train",
        {"reference_ckpt_dir": "two", "save_dir": "two"},
        "would overwrite two, which is read",
    ),
    ("solver_train", {"max_seq_len": 129}, "--max_seq_len 129 is more than the context of one, 128 tokens"),
    (
        "verifier_train",
        {"max_seq_len": 4096},
        "--max_seq_len 4096 is more than the context of one, 128 tokens",
    ),
    (
        "preference_train",
        {"max_seq_len": 129},
        "--max_seq_len 129 is more than the context of one, 128 tokens",
    ),
    ("verifier_train", {"max_seq_len": 0}, "--max_seq_len is 0, expected 1 or more, or -1"),
    (
        "verifier_train",
        {"step": "line"},
        "--step has no effect: --objective pairwise knows no such thing; leave it out",
    ),
    (
        "verifier_evaluate",
        {"step": "line"},
        "verifier is no verifier of outcomes or steps; leave --step line out",
    ),
    (
        "ppo_train",
        {"step": "paragraph"},
        "verifier is no verifier of outcomes or steps; leave --step paragraph out",
    ),
    (
        "ppo_train",
        {"step": "line", "reward": "rule"},
        "--step has no effect: --reward rule asks no verifier; leave it out",
    ),
    ("solver_evaluate", {"step": "line"}, "--step says what a verifier judges; give --interactive and"),
    ("solver_train", {"lora_rnk": 8}, r"unknown flag --lora_rnk; did you mean --lora_rank\?"),
]


@pytest.mark.parametrize("script, changes, message", MISTAKES, ids=[f"{s} {c}" for s, c, _ in MISTAKES])
def test_a_mistake(world: World, here: Path, script: str, changes: dict[str, object], message: str) -> None:
    assert_refused(world, script, changes, message, here)


SOLVER, VERIFIER = (
    r"verifier is a verifier \(it has a value head\); a solver",
    r"one is a solver \(no value head\)",
)
FOREIGN = (
    "hf has no params.json: it is no checkpoint of ours but what config.json describes; bring it here with"
)
KINDS: list[tuple[str, dict[str, object], str]] = [
    ("checkpoint_split", {"certify": "verifier", "ckpt_file": None, "save_path": None, "n": None}, SOLVER),
    ("checkpoint_split", {"certify": "hf", "ckpt_file": None, "save_path": None, "n": None}, FOREIGN),
    ("solver_train", {"ckpt_dir": "verifier", "train_file": "gone"}, SOLVER),
    ("solver_evaluate", {"ckpt_dir": "verifier", "label_file": "gone"}, SOLVER),
    ("solver_evaluate", {"ckpt_dir": "verifier", "interactive": True, "label_file": None, "log_dir": None}, SOLVER),
    ("solver_evaluate", {"verifier_ckpt_dir": "one", "interactive": True, "label_file": None, "log_dir": None},
     VERIFIER),
    ("verifier_train", {"ckpt_dir": "hf", "train_file": "gone"}, FOREIGN),
    ("verifier_evaluate", {"ckpt_dir": "one", "label_file": "gone"}, VERIFIER),
    ("verifier_evaluate", STEPS_ALONE | {"ckpt_dir": "one", "steps_file": "gone", "dry_run": True}, VERIFIER),
    ("preference_train", {"ckpt_dir": "verifier", "train_file": "gone"}, SOLVER),
    ("preference_train", {"reference_ckpt_dir": "verifier", "train_file": "gone"}, SOLVER),
    ("preference_train", {"ckpt_dir": "verifier", "dry_run": True}, SOLVER),
    ("preference_evaluate", {"ckpt_dir": "verifier", "steps_file": "gone"}, SOLVER),
    ("preference_evaluate", {"reference_ckpt_dir": "verifier", "steps_file": "gone"}, SOLVER),
    ("preference_evaluate", {"reference_ckpt_dir": "hf", "steps_file": "gone"}, FOREIGN),
    ("ppo_train", {"actor_ckpt_dir": "verifier", "train_file": "gone"}, SOLVER),
    ("ppo_train", {"reward_model_ckpt_dir": "one", "train_file": "gone"}, VERIFIER),
    ("ppo_train", {"actor_ckpt_dir": "verifier", "dry_run": True}, SOLVER),
    ("data_build process", {"ckpt_dir": "verifier"}, SOLVER),
    ("data_build branch", {"ckpt_dir": "verifier", "samples_file": "gone"}, SOLVER),
]


@pytest.mark.parametrize("script, changes, message", KINDS, ids=[f"{s} {c}" for s, c, _ in KINDS])
def test_the_wrong_kind_of_checkpoint_is_refused_before_anything_else(
    world: World, here: Path, script: str, changes: dict[str, object], message: str
) -> None:
    """Before the data, which is not there at all."""
    assert_refused(world, script, changes, message, here)


def wrong_paths(folder: Path) -> dict[str, Path]:
    """Things that are no file or directory to read from, and stand in the way of one to write to."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "blank").write_text("")
    long = folder / ("n" * 300)
    return {name: folder / name for name in ("pipe", "loop", "bytes", "blank", "bytes/below")} | {"long": long}


@pytest.mark.parametrize("script", ENTRIES)
def test_a_wrong_path_under_any_flag_is_one_line(
    world: World, here: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every path flag of every script with each of them: an end with one line, or the flag is not read at all."""
    if script not in world.flags:
        pytest.skip("its flags are tested with what it does")
    main, wrong, refused = entry(script), wrong_paths(here), 0
    for flag in flags_of(main):
        if not is_path(flag) or flag in ("overwrite", "config"):
            continue
        for kind, path in wrong.items():
            values = world.flags[script] | {flag: path}
            argv = [f"--{name}={value}" for name, value in values.items() if value is not None]
            with pytest.raises(SystemExit) as stop:  # a dry run where the path is not to blame
                cli.run(main, [*argv, "--dry_run"])
                raise SystemExit(0)
            error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert len(error) == (stop.value.code != 0), (flag, kind, error)
            refused += bool(error)
    assert refused > len(wrong)
    assert (here / "pipe").is_fifo() and (here / "bytes").read_bytes() == bytes(range(256))


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("checkpoint_split", "heads"),
        ("solver_train", "[["),
        ("solver_evaluate", "kv cache"),
        ("data_build pairs", "pairs from"),
        ("data_build outcome", "solutions from"),
        ("data_build reject", "problems with solutions from"),
        ("data_build split", "8 rows from 8 problems"),
        ("data_build process", "1 beginnings of 2 solutions"),
        ("verifier_train", "optimizer"),
        ("preference_train", "[["),
        ("preference_evaluate", "weights"),
        ("verifier_evaluate", "weights"),
        ("ppo_train", "its peak while"),
    ],
)
def test_a_dry_run_shows_its_plan_and_writes_nothing(
    world: World, here: Path, capsys: pytest.CaptureFixture[str], script: str, shown: str
) -> None:
    before = sorted(here.rglob("*"))
    main = entry(script)
    bind(main, parse(main, [f"--{name}={value}" for name, value in world.flags[script].items()] + ["--dry_run"]))()
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("script", ["solver_train", "verifier_train", "preference_train"])
def test_a_dry_run_of_several_ranks_is_planned_for_them(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 4)  # as under torchrun
    main, held = entry(script), []
    for ranks in (1, 2, 4):
        flags = [f"--{name}={value}" for name, value in world.flags[script].items()]
        bind(main, parse(main, [*flags, f"--tensor_parallel_size={ranks}", "--dry_run"]))()
        held.append(
            next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  weights"))
        )
    assert len(set(held)) == 3  # a rank holds less of a model that more of them share


def test_a_run_is_resumed_with_the_chat_template_it_began_with(world: World, here: Path) -> None:
    main = entry("solver_train")
    words = "--ckpt_dir=one --save_dir=run --train_file=train.json --max_batch_size=8 --max_steps=1".split()
    bind(main, parse(main, words))()
    message = "step-1: chat_template was none and is llama-2 now; resume with the data and flags of then"
    with pytest.raises(UserError, match=message):
        bind(main, parse(main, [*words, "--resume=auto", "--chat_template=llama-2"]))()


def test_an_adapter_s_base_is_not_overwritten(world: World, here: Path) -> None:
    words = "--ckpt_dir=one --save_dir=adapter --train_file=train.json --lora_rank=2"
    main = entry("solver_train")
    bind(main, parse(main, words.split()))()
    assert_refused(
        world,
        "solver_train",
        {"ckpt_dir": "adapter", "save_dir": "one"},
        "would overwrite .*one, which",
        here,
    )
    assert_refused(
        world, "solver_train", {"ckpt_dir": "adapter/epoch-1", "save_dir": "adapter"}, "would overwrite", here
    )


def test_models_with_another_tokenizer_do_not_read_the_actor_s_ids(world: World, here: Path) -> None:
    folder = own_copy(here, "verifier")
    write_tokenizer(folder, "0123456789abc")
    for flag in ("critic_ckpt_dir", "reward_model_ckpt_dir"):
        assert_refused(world, "ppo_train", {flag: "damaged"}, "damaged has another tokenizer than", here)


def test_a_prompt_that_fills_the_context(world: World, here: Path) -> None:
    write_json(here / "long.json", [{"instruction": "a" * 200, "label": "1"}])
    told = r"1 of 1 prompts fill the context of one, 128 tokens; the first is row 1 \(id '0', 202 tokens\)"
    assert_refused(world, "ppo_train", {"train_file": "long.json"}, told, here)
    with pytest.raises(UserError, match="prompt '0' has 202 tokens but the model's context is 128"):
        main_of("solver_evaluate", "task", "label_file", "log_dir", "ckpt_dir")("toy", "long.json", "log", "one")
    assert not (here / "log/results.json").exists()


def test_a_mistake_in_a_real_process(here: Path) -> None:
    cut(own_copy(here, "one") / "consolidated.00.pth")
    flags = ("--ckpt_dir", "damaged", "--save_dir", "out", "--train_file", "train.json")
    for extra, status, message in (
        ((), 1, "has .* bytes but the manifest"),
        (("--lora_rnk", 8), 2, "unknown flag"),
    ):
        done = launch(here, "solver_train.py", *flags, *extra)
        assert done.returncode == status and EXACTLY_ONE_ERROR.fullmatch(done.stderr), done.stderr
        assert re.search(message, done.stderr) and not done.stdout


def test_a_rank_that_fails_ends_the_job(here: Path) -> None:
    folder = own_copy(here, "two")
    (folder / "manifest.json").unlink()  # with it both ranks would see the damage
    cut(folder / "consolidated.01.pth")
    start = time.monotonic()
    done = launch(
        here,
        "solver_train.py",
        "--ckpt_dir",
        "damaged",
        "--save_dir",
        "out",
        "--train_file",
        "train.json",
        n=2,
    )
    assert done.returncode != 0 and time.monotonic() - start < 60
    (line,) = set(re.findall("error: [^\n]*", done.stderr))  # told at once, and again in torchrun's final box
    assert "consolidated.01.pth cannot be read as a checkpoint" in line
    assert not (here / "out/params.json").exists()


@pytest.mark.parametrize(("objective", "files"), [("outcome", ["o"]), ("process", ["s", "o"])])
def test_verifiers_of_outcomes_and_steps_from_samples_to_scores(
    world: World, here: Path, objective: str, files: list[str]
) -> None:
    texts = [(f"{n}\n\n#### {row['label']}", f"{n}\n\n#### 9") for n, row in enumerate(PROBLEMS)]
    samples = [
        {"id": str(i), "sample": n, "prompt": row["instruction"], "response": text, "outcome": outcome}
        for i, row in enumerate(PROBLEMS)
        for n, (text, outcome) in enumerate(zip(texts[i], ("right", "wrong"), strict=True))
    ]
    write_json(here / "graded_two.json", samples)
    build.outcome("graded_two.json", "o.json")
    steps = [
        {
            "instruction": row["prompt"],
            "steps": row["response"].split("\n\n"),
            "labels": [1, int(row["sample"] == 0)],
        }
        for row in samples
    ]
    write_json(here / "s.json", steps)
    main_of("verifier_train", "ckpt_dir", "save_dir", "train_file")(
        "one",
        "trained",
        [f"{name}.json" for name in files],
        objective=objective,
        max_batch_size=8,
        packing=True,
        epochs=2,
        lr=1e-3,
        label_tokens="last" if objective == "outcome" else "all",
        balance=True,
    )
    config = load.load_config("trained")
    assert (config.objective, config.score) == (objective, "last" if objective == "outcome" else "steps")
    evaluate = main_of("verifier_evaluate", *SCORED)
    aggregation = {"aggregation": "min"} if objective == "process" else {}
    evaluate("trained", "log", "toy", "graded_two.json", "train.json", **aggregation)
    scored = [json.loads(line) for line in (here / "log/samples.jsonl").read_text().splitlines()]
    assert len(scored) == len(samples) and all(len(row["step_scores"]) == 2 for row in scored)
    for row in scored:
        assert row["score"] == (row["step_scores"][-1] if objective == "outcome" else min(row["step_scores"]))
    report = json.loads((here / "log/results.json").read_text())["verifier"]
    assert report["curves"]["pass"]["n"] == [1, 2] and (here / "log/verifier.png").is_file()
    evaluate("trained", "log_steps", steps_file="s.json", threshold_file="s.json")
    found = json.loads((here / "log_steps/results.json").read_text())
    assert found["steps"] == 2 * len(samples) and 0 <= found["f1"] <= 1


def test_what_a_step_is_is_learnt_once_and_followed(
    world: World, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that are lines, as in GSM8K: training records it, later commands follow, and a contradiction is refused."""
    texts = [f"{row['instruction'][:-1]}\n{row['label']}\n#### {row['label']}" for row in PROBLEMS]
    both = list(zip(PROBLEMS, texts, strict=True))
    steps = [row | {"steps": text.split("\n"), "labels": [1, 1, n % 2]} for n, (row, text) in enumerate(both)]
    write_json(here / "s.json", steps)
    write_json(here / "o.json", [row | {"output": text, "correct": True} for row, text in both])
    stale = {"sample": 0, "score": 7, "step_scores": [7]}
    rows = [stale | {"id": str(n), "response": text} for n, text in enumerate(texts)]
    write_json(here / "lines.json", [*rows, {"id": "0", "sample": 1, "response": "1" * 200}])
    train = main_of("verifier_train", "ckpt_dir", "save_dir", "train_file")
    evaluate = main_of("verifier_evaluate", *SCORED)
    train("one", "prm", ["s.json", "o.json"], objective="process", step="line", max_batch_size=8, lr=1e-3)
    assert load.load_config("prm").step == "line"
    counted = [json.loads(line) for line in Path("prm/metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("judged", 0) for row in counted) == 4 * 15  # of each row its labels: three and one
    evaluate("prm", "log", "toy", "lines.json", "train.json", step="line")
    *scored, long = [json.loads(line) for line in Path("log/samples.jsonl").read_text().splitlines()]
    assert [len(row["step_scores"]) for row in scored] == [3] * len(texts)
    report = json.loads(Path("log/results.json").read_text())
    assert "score" not in long and report["samples"] == len(texts) + 1 and report["verifier"]["too_long"] == 1
    train("prm", "further", ["s.json"], objective="process", max_batch_size=8)
    assert load.load_config("further").step == "line"
    message = "prm has learnt steps that are lines, but --step is paragraph; leave it out to follow"
    assert_refused(world, "verifier_train", {"ckpt_dir": "prm", "objective": "process", "train_file": "s.json",
                                     "step": "paragraph"}, message, here)
    assert_refused(world, "verifier_evaluate", {"ckpt_dir": "prm", "step": "paragraph"}, message, here)
    assert_refused(world, "ppo_train", {"reward_model_ckpt_dir": "prm", "step": "paragraph"}, message, here)
    with pytest.raises(UserError, match=message):
        main_of("solver_evaluate")(
            task="toy", ckpt_dir="one", interactive=True, verifier_ckpt_dir="prm", step="paragraph"
        )
    write_json(here / "s.json", [*steps, steps[0] | {"steps": ["1" * 80, "2" * 80], "labels": [1, 0]}])
    evaluate("prm", "log_steps", steps_file="s.json", threshold_file="s.json")
    assert json.loads(Path("log_steps/results.json").read_text())["too_long"] == 1
    assert "1 more are too long for the verifier" in capsys.readouterr().out
    folders = {"ckpt_dir": "one", "reference_ckpt_dir": "one", "log_dir": "credit"}
    main_of("preference_evaluate")(**folders, steps_file="s.json", step="line")
    assert json.loads(Path("credit/results.json").read_text())["too_long"] == 1


def test_ppo_leaves_out_prompts_that_are_too_long(world: World, here: Path) -> None:
    """They are counted and named; of --eval_file they are wrong."""
    rows = [{"instruction": "1+1=", "label": "2"}, {"instruction": "a" * 200, "label": "1"},
            {"instruction": "2+2=", "label": "4"}]
    write_json(here / "long.json", rows)
    done = launch(here, "ppo_train.py", "--actor_ckpt_dir", "one", "--actor_save_dir", "out", "--reward", "rule",
                  "--advantage", "grpo", "--group_size", 2, "--max_buffer_size", 4, "--max_new_tokens", 8,
                  "--train_file", "long.json", "--eval_file", "long.json", "--task", "toy", "--minibatches", 1,
                  "--format_penalty", 0.1)
    assert done.returncode == 0, done.stderr
    told = "long.json: 1 of 3 prompts fill the context of one, 128 tokens, and are left out: row 2 (id '1', 202 tokens)"
    assert done.stderr.count(told) == 2
    seen = {
        json.loads(line)["prompt"] for line in Path("out/rollouts/step-000001.jsonl").read_text().splitlines()
    }
    assert seen == {"1+1=", "2+2="}
    accuracies = [row["eval_accuracy"] for row in metrics(here / "out") if "eval_accuracy" in row]
    assert all(
        3 * accuracy == pytest.approx(round(3 * accuracy)) and accuracy <= 2 / 3 for accuracy in accuracies
    )
