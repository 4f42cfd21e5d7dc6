"""src/training/resuming.py: a run goes on with what it began with, and no other takes its directory."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ppo_train
import preference_train
import solver_train
import verifier_train
from src import load
from src.checkpoint import saving
from src.command import cli
from src.command.flags import FREE_ON_RESUME, flags_of
from src.errors import UserError
from src.text.tokenizer import Tokenizer
from src.training import resuming
from tests.conftest import TOY_BASE, Folders
from tests.ranks import command, succeed
from tests.reference import shared
from tests.tiny import split, write_tokenizer
from tests.training.workers import INSTRUCTIONS, PROMPTS

TRAINERS = (solver_train, verifier_train, preference_train, ppo_train)
ROWS = [{"instruction": row.instruction, "output": row[1]} for row in INSTRUCTIONS]


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def other_weights(ckpt_dir: str, folder: Path) -> str:
    """A checkpoint like another one but for its weights."""
    model = load.load_solver(ckpt_dir)
    model.norm.weight.data.mul_(2)
    saving.begin_save(model, str(folder), ckpt_dir).complete()
    return str(folder)


def copy_of(source: str | Path, target: Path) -> str:
    shutil.copytree(source, target)
    return str(target)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a directory holds but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def stopped(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of inputs, and in run/ a run with adapters that stopped behind 2 of 4 steps."""
    here = tmp_path_factory.mktemp("stopped")
    copy_of(folders.one, here / "base")
    write(here / "a.json", ROWS)
    with contextlib.chdir(here):
        train()
    for left in ("step-3", "step-4", "epoch-2"):
        shutil.rmtree(here / "run" / left)
    for path in here.glob("run/*.*"):
        if path.is_file() and path.suffix != ".jsonl":
            path.unlink()
    return here


def train(ckpt_dir: str = "base", train_file: str = "a.json", save_dir: str = "run", **flags: object) -> None:
    flags = {"max_batch_size": 4, "epochs": 2, "lora_rank": 2, "save_every": 1, "keep_last": 4} | flags
    solver_train.main(
        solver_train.SolverTrainConfig(ckpt_dir=ckpt_dir, save_dir=save_dir, train_file=train_file, **flags)
    )


@pytest.fixture
def run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may spoil, and works in."""
    monkeypatch.chdir(copy_of(stopped, tmp_path / "copy"))
    return tmp_path / "copy"


CHANGES = {
    "lora_rank": (4, "lora_rank was 2 and is 4 now"),
    "lora_alpha": (8.0, r"lora_alpha was 16.0 and is 8.0 now"),
    "lora_dropout": (0.1, "lora_dropout was 0.0 and is 0.1 now"),
    "lora_targets": (["wq"], r"lora_targets was \['wq', 'wk', .*\] and is \['wq'\] now"),
    "quantize": ("int8", "quantize was nothing and is int8 now"),
    "chat_template": ("llama-2", "chat_template was none and is llama-2 now"),
    "max_seq_len": (100, "max_seq_len was .* and is 100 now"),
    "truncation": ("left", "truncation was drop and is left now"),
    "loss_on": ("all", "loss_on was assistant_no_execution and is all now"),
    "optimizer": ("adamw_8bit", "optimizer was adamw and is adamw_8bit now"),
    "weight_decay": (0.1, "weight_decay was 0.0 and is 0.1 now"),
    "max_grad_norm": (2.0, "max_grad_norm was 1.0 and is 2.0 now"),
    "seed": (2, "seed was 1 and is 2 now"),
    "accumulation_steps": (2, "rows_a_step was 4 and is 8 now"),
    "max_batch_size": (2, "rows_a_step was 4 and is 2 now"),
}


@pytest.mark.parametrize("flag", CHANGES)
def test_a_changed_flag_is_refused_by_name_before_anything_is_touched(run: Path, flag: str) -> None:
    value, message = CHANGES[flag]
    before = contents(run)
    with pytest.raises(UserError, match=f"step-2: .*{message}.*; resume with the data and flags of then"):
        train(resume="auto", **{flag: value})
    assert contents(run) == before


def edited(run: Path) -> None:
    write(run / "a.json", [*ROWS[:-1], ROWS[-1] | {"output": ["#### 2"]}])


def with_another_tokenizer(run: Path) -> None:
    (run / "base/tokenizer.model").unlink()
    write_tokenizer(run / "base", "0123456789+-=# \nabcdefg")


def with_another_form(run: Path) -> None:
    values = json.loads((run / "base/params.json").read_text()) | {"rope_theta": 500.0}
    write(run / "base/params.json", values)


@pytest.mark.parametrize("change, message", [
    (edited, "train_file a.json had other contents"),
    (with_another_tokenizer, "ckpt_dir base had other contents"),
    (with_another_form, "ckpt_dir base had other contents"),
])
def test_an_edited_input_is_refused_though_its_name_and_rows_are_the_same(
    run: Path, change: Callable[[Path], None], message: str
) -> None:
    change(run)
    with pytest.raises(UserError, match=f"step-2: .*{message}; resume with the data"):
        train(resume="auto")


def test_a_tokenizer_is_known_with_what_lies_beside_it_and_by_that_alone(run: Path) -> None:
    def go_on(**flags: object) -> None:
        train(save_dir="named", tokenizer_file="T/tokenizer.model", max_steps=2, **flags)

    (run / "T").mkdir()
    (run / "base/tokenizer.model").rename(run / "T/tokenizer.model")
    template = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}
    write(run / "T/tokenizer_config.json", template)
    go_on()
    (run / "T/notes.json").write_text("of something else")
    go_on(resume="auto")
    for name, values in {
        "tokenizer_config.json": {"chat_template": template["chat_template"].replace(":", " says")},
        "generation_config.json": {"eos_token_id": 5},
    }.items():
        before = (run / "T" / name).read_text() if (run / "T" / name).is_file() else None
        write(run / "T" / name, values)
        with pytest.raises(UserError, match="tokenizer_file T/tokenizer.model had other contents"):
            go_on(resume="auto")
        (run / "T" / name).unlink() if before is None else (run / "T" / name).write_text(before)


def test_another_input_is_refused_by_both_names(run: Path) -> None:
    other = write(Path("b.json"), ROWS[::-1])
    with pytest.raises(UserError, match=r"train_file was a.json and is b.json now"):
        train(train_file=other, resume="auto")
    with pytest.raises(UserError, match="ckpt_dir was base and is other now"):
        train(other_weights("base", Path("other")), resume="auto")
    with pytest.raises(UserError, match="eval_file was nothing and is .*b.json now"):
        train(eval_file=other, resume="auto")
    with pytest.raises(
        UserError, match="chat_template was none and is llama-2 now; train_file was "
    ):  # all at once
        train(train_file=other, chat_template="llama-2", resume="auto")


def test_what_is_in_the_list_may_differ_and_what_was_moved_is_the_same(run: Path) -> None:
    names = ("run", "moved"), ("base", "moved-base"), ("a.json", "moved.json")
    for old, new in names:
        (run / old).rename(run / new)
    train(
        "moved-base", "moved.json", "moved", resume="auto", lr=2e-3, schedule="linear",
        warmup_ratio=0.0, min_lr_ratio=0.5, epochs=3, max_batch_size=2, accumulation_steps=2, packing=False,
        save_every=2, keep_last=1, save_dtype="bfloat16", activation_checkpointing="full",
        background_save=True, model_type="llama",
    )
    steps = [json.loads(line)["step"] for line in (run / "moved/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and (run / "moved/adapter.json").is_file()
    with pytest.raises(
        UserError, match="holds a run of 6 steps, more than the 2 that are asked for now; give more"
    ):
        train("moved-base", "moved.json", "moved", resume="auto", epochs=1)


@pytest.mark.parametrize("module", TRAINERS)
def test_help_lists_what_may_differ_and_every_other_flag_is_compared(
    module: object, toy_tokenizer: Tokenizer
) -> None:
    flags = flags_of(module.main)
    text = " ".join(cli.usage(module.main, 200).split())
    listed = text.partition("when the run began: ")[2].partition(";")[0].split(", ")
    assert listed == [name for name in FREE_ON_RESUME if name in flags] and {"lr", "schedule", "epochs"} <= {
        *listed
    }
    found = resuming.run_fingerprint("trainer", {name: 1 for name in flags} | {"invented": 1}, toy_tokenizer)
    assert found.keys() == flags.keys() - {*listed} | {"trainer", "invented"}
    # no flag of the list is misspelt or gone
    assert set(FREE_ON_RESUME) <= set().union(*(flags_of(other.main) for other in TRAINERS))


def test_rewards_are_compared_by_their_functions_and_their_order_too(
    tmp_path: Path, toy_tokenizer: Tokenizer
) -> None:
    file = tmp_path / "m.py"
    file.write_text("def f(completions): ...\n")
    lists = [["rule", f"{file}:f"], ["rule", f"{file}:g"], ["code", f"{file}:f"], [f"{file}:f", "rule"], [f"{file}:f"]]
    known = [resuming.run_fingerprint("ppo_train", {"reward": each}, toy_tokenizer)["reward"] for each in lists]
    assert len({each["hash"] for each in known}) == len(lists)
    file.rename(tmp_path / "moved.py")  # its contents count, not its name
    moved = resuming.run_fingerprint("ppo_train", {"reward": ["rule", f"{tmp_path}/moved.py:f"]}, toy_tokenizer)
    assert moved["reward"]["hash"] == known[0]["hash"]


def test_a_flag_of_another_version_is_named(run: Path) -> None:
    path = run / "run/step-2/state.json"
    state = json.loads(path.read_text())
    gone = state["run"].pop("loss_on")
    write(path, state | {"run": state["run"] | {"tilt": 3}})
    with pytest.raises(UserError, match=r"tilt is not known now \(.*\); loss_on is not known then"):
        train(resume="auto")
    assert gone == "assistant_no_execution"


@pytest.mark.parametrize("change", [
    {"loop": [1]}, {"loop": {"steps": "2", "updates": 2, "bad_steps": 0}}, {"loop": None}, {"step": 3}, {"step": "2"},
    {"run": None}, {"run": "solver_train"}, {"total_steps": True}, {"best": "high"}, {"best": [1]}, {"best_step": 1.5},
])
def test_a_state_of_odd_types_is_refused_by_key_and_nothing_begins_anew(
    run: Path, change: dict[str, object]
) -> None:
    path = run / "run/step-2/state.json"
    write(path, json.loads(path.read_text()) | change)
    with pytest.raises(
        UserError, match=rf"step-2/state.json: '{next(iter(change))}' is .*; remove .*step-2 to go on"
    ):
        train(resume="auto")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\0"])
def test_a_state_that_is_no_object_is_refused(run: Path, text: str) -> None:
    (run / "run/step-2/state.json").write_text(text)
    for resume in ("auto", "none"):
        with pytest.raises(UserError, match="step-2/state.json"):
            train(resume=resume)


def test_weights_without_a_step_to_resume_from_are_not_replaced(run: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(run / f"run/step-{step}")
    before = contents(run)
    with pytest.raises(UserError, match=r"run holds trained weights \(epoch-1/params.json\) but no step-N"):
        train(resume="auto")
    assert contents(run) == before
    train(save_dir="new/run", resume="auto", max_steps=1)  # nothing is there yet


def test_a_directory_of_another_trainer_is_refused(run: Path) -> None:
    rows = [{"instruction": "1+1=", "chosen": "2", "rejected": "3"}] * 3
    pairs = write(run / "pairs.json", [row | {"instruction": f"{n}+1="} for n, row in enumerate(rows)])
    with pytest.raises(UserError, match="trainer was solver_train and is preference_train now"):
        preference_train.main(
            preference_train.PreferenceTrainConfig(
                ckpt_dir="base",
                save_dir="run",
                train_file=pairs,
                resume="auto",
                lora_rank=2,
                held_out=0.4,
                epochs=4,
            )
        )


def ppo(folders: Folders, here: Path, **flags: object) -> None:
    rows = write(here / "prompts.json", [{"instruction": row.instruction, "label": "4"} for row in PROMPTS])
    (here / "mine.py").exists() or (here / "mine.py").write_text(
        "def length(prompt, response, label):\n    return 1\n"
    )
    flags = {
        "critic_ckpt_dir": folders.verifier, "critic_save_dir": str(here / "critic"), "train_file": rows,
        "reward": ["rule", f"{here}/mine.py:length"], "max_new_tokens": 3, "max_buffer_size": 2, "lora_rank": 2,
        "save_every": 1, "keep_last": 9, "max_steps": 2, "resume": "auto",
    } | flags
    ppo_train.main(
        ppo_train.PPOConfig(
            actor_ckpt_dir=flags.pop("actor_ckpt_dir", folders.one),
            actor_save_dir=flags.pop("actor_save_dir", str(here / "actor")),
            **flags,
        )
    )


def test_a_run_of_ppo_is_not_begun_anew_over_its_own_checkpoints(folders: Folders, tmp_path: Path) -> None:
    ppo(folders, tmp_path)
    before = contents(tmp_path)
    actor, critic = str(tmp_path / "actor"), str(tmp_path / "critic")
    for message, flags in {
        "actor holds step-1, step-2 of a run, but .*other none": {"critic_save_dir": str(tmp_path / "other")},
        "critic holds step-1, step-2 of a run, but .*other none": {"actor_save_dir": str(tmp_path / "other")},
        "exchange the actor's directory": {"critic_save_dir": actor, "actor_save_dir": critic},
        "critic_ckpt_dir was .*verifier and is .*one now": {"critic_ckpt_dir": folders.one},
        "teacher_ckpt_dir was nothing and is .*two": {"teacher_ckpt_dir": folders.two},
        "kl_coef was .* and is 0.5 now": {"kl_coef": 0.5},
        r"reward was rule, .*mine.py:length and is \['rule'\]": {"reward": ["rule"]},
        "advantage was gae and is rloo now": {
            "advantage": "rloo", "group_size": 2, "critic_save_dir": "", "critic_ckpt_dir": ""
        },
    }.items():
        with pytest.raises(UserError, match=message):
            ppo(folders, tmp_path, **flags)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        assert {**contents(tmp_path), "actor/run.json": b""} == {**before, "actor/run.json": b""}, message
    ppo(folders, tmp_path, max_steps=3)
    assert (tmp_path / "critic/step-3/manifest.json").is_file()


def test_an_edited_reward_function_and_steps_that_do_not_meet_are_refused(
    folders: Folders, tmp_path: Path
) -> None:
    ppo(folders, tmp_path)
    (tmp_path / "mine.py").write_text("def length(prompt, response, label):\n    return len(response)\n")
    with pytest.raises(UserError, match="reward rule, .*mine.py:length had other contents"):
        ppo(folders, tmp_path)
    shutil.rmtree(tmp_path / "actor/step-2")
    shutil.rmtree(tmp_path / "critic/step-1")
    with pytest.raises(
        UserError, match="actor holds step-1 of a run, but .*critic step-2; a run goes on from a step"
    ):
        ppo(folders, tmp_path)


def test_the_reported_run_on_other_rows(tmp_path: Path) -> None:
    """../shared/data/reports/RS1_resume_edited_file, as its README says."""
    files = [shared(f"reports/RS1_resume_edited_file/{name}.json") for name in "ab"]
    base = split(TOY_BASE, tmp_path / "base")
    words = ("solver_train.py", "--ckpt_dir", base, "--save_dir", tmp_path / "S", "--max_batch_size", 4, "--epochs",
             2, "--save_every", 1, "--keep_last", 4)
    succeed(*words, "--train_file", files[0])
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"S/step-{step}")
    done = command(*words, "--train_file", files[1], "--resume", "auto")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train_file was" in done.stderr and "b.json now" in done.stderr
