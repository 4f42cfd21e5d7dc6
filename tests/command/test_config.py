"""src/command/config.py and --config: a flag is declared once, and what a run recorded starts the same run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import ppo_train
import preference_train
import solver_train
import verifier_train
from src.command.config import Config, NonNegative, OptimizerFlags, TrainConfig, flag
from src.command.flags import bind, config_of, flags_of, parse
from src.errors import UserError

TRAINERS = {
    solver_train: ["--ckpt_dir=a", "--save_dir=b", "--train_file=c", "--lr=0.25", "--packing=false"],
    verifier_train: ["--ckpt_dir=a", "--save_dir=b", "--train_file=c,d", "--objective=outcome", "--weights=1,0.5"],
    preference_train: ["--ckpt_dir=a", "--save_dir=b", "--train_file=c", "--lora_rank=4", "--lora_targets=wq,wv"],
    ppo_train: ["--actor_ckpt_dir=a", "--actor_save_dir=b", "--advantage=grpo", "--reward=rule,x.py:f", "--phases"],
}


@dataclass(frozen=True, kw_only=True)
class Small(OptimizerFlags):
    """Something small"""

    ckpt_dir: str = flag(help="where the weights are")
    kinds: list[str] = flag(["a", "b"], "kinds of   things\n        there are")
    lr: NonNegative = 0.5


def small(config: Small) -> None:
    """Nothing."""


def test_flags_of_a_config_come_by_group_the_scripts_own_first() -> None:
    found = flags_of(small)
    assert list(found)[:3] == ["ckpt_dir", "kinds", "lr"] and list(found)[-1] == "dry_run"
    assert {flag.group for flag in found.values()} == {
        "Something small", "Optimizer", "Batches and steps", "What is random", "The run"}
    assert found["kinds"].meaning == "kinds of things there are" and found["kinds"].default == ["a", "b"]
    # another default leaves meaning, group and bounds as they are
    assert found["lr"].default == 0.5 and found["lr"].group == "Optimizer"
    assert found["lr"].meaning == flags_of(solver_train.main)["lr"].meaning
    assert found["lr"].bounds.expects == "0 or more"
    assert found["ckpt_dir"].required and not found["lr"].required


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_out_of_bounds_are_refused_at_birth_and_on_the_command_line(value: float) -> None:
    for refuse in (lambda: Small(ckpt_dir="x", lr=value), lambda: parse(small, ["--ckpt_dir=x", f"--lr={value}"])):
        with pytest.raises(UserError, match=f"--lr is {value}, expected 0 or more"):
            refuse()


def test_every_flag_of_the_trainers_has_a_meaning_and_a_group() -> None:
    for script in TRAINERS:
        for each in flags_of(script.main).values():
            assert each.meaning and each.group, each.name
        assert issubclass(config_of(script.main), Config)
    assert config_of(TrainConfig.flags) is None  # a function of no config


WITHOUT_EFFECT = [
    (solver_train, ["--lora_dropout=0.1"], "--lora_rank -1 trains all weights, without adapters"),
    (solver_train, ["--lora_rank=-1", "--dora"], "--lora_rank -1 trains all weights, without adapters"),
    (verifier_train, ["--margin=1"], "--objective outcome knows no such thing"),
    (verifier_train, ["--objective=pairwise", "--label_tokens=last"], "--objective pairwise knows no such thing"),
    (verifier_train, ["--objective=process", "--label_tokens=last"], "--objective process knows no such thing"),
    (verifier_train, ["--objective=pairwise", "--balance"], "--objective pairwise knows no such thing"),
    (ppo_train, ["--gae_lambda=0.9"], "--advantage grpo has no critic"),
    (ppo_train, ["--gamma=0.99"], "--advantage grpo gives all tokens of a response the same"),
    (ppo_train, ["--reward_model_ckpt_dir=v"], "--reward rule x.py:f asks no verifier"),
    (ppo_train, ["--kl_loss_coef=0.1"], "--kl_loss is none"),
    (ppo_train, ["--kl_horizon=100"], "there is no --kl_target"),
    (ppo_train, ["--truncated=mask", "--missing_eos_penalty=2"], "--truncated mask takes no penalty"),
    (ppo_train, ["--missing_eos_penalty=0", "--overlong_buffer=9"], "--missing_eos_penalty is 0"),
    (ppo_train, ["--teacher_coef=2"], "there is no --teacher_ckpt_dir"),
    (ppo_train, ["--eval_samples=4"], "there is no --eval_file"),
    (ppo_train, ["--eval_every=4"], "there is no --eval_file"),
    (solver_train, ["--eval_every=4"], "there is no --eval_file"),
    (solver_train, ["--schedule=constant", "--min_lr_ratio=0.5"], "--schedule constant keeps the rate at its peak"),
    (verifier_train, ["--label_file=x", "--held_out=0.2"], "--label_file has all held-out rows"),
    (preference_train, ["--label_file=x", "--held_out=0.2"], "--label_file has all held-out rows"),
    (ppo_train, ["--whiten_advantages=false"], "--advantage grpo compares within groups alone"),
    (ppo_train, ["--server_seconds=9"], "there is no --base_url"),
    (ppo_train, ["--lora_rank=4", "--quantize=int8"], "no frozen model is held apart from the actor"),
    (ppo_train, ["--lora_alpha=32"], "--lora_rank -1 trains all weights, without adapters"),
]


@pytest.mark.parametrize(("script", "words", "why"), WITHOUT_EFFECT, ids=lambda value: "-".join(value)[:30]
                         if isinstance(value, list) else "")
def test_a_flag_of_which_nothing_would_come_is_refused(script: object, words: list[str], why: str) -> None:
    name = words[-1].partition("=")[0]
    given = {word.partition("=")[0] for word in words}
    rest = [word for word in TRAINERS[script] if word.partition("=")[0] not in given]
    with pytest.raises(UserError, match=f"{name} has no effect: {why}"):
        bind(script.main, parse(script.main, [*rest, *words]))


@pytest.mark.parametrize("script", TRAINERS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("form", ["run.json", "flags.json", "flags.yaml"])
def test_what_a_run_recorded_starts_the_same_run(script: object, form: str, tmp_path: Path) -> None:
    import yaml

    words = TRAINERS[script]
    config = bind(script.main, parse(script.main, words)).args[0]
    file = tmp_path / form
    flags = config.flags()
    file.write_text(yaml.safe_dump(flags) if form.endswith("yaml") else json.dumps(
        {"command": words, "flags": flags} if form == "run.json" else flags))
    assert bind(script.main, parse(script.main, [f"--config={file}"])).args[0] == config
    # the command line wins, wherever it stands
    changed = bind(script.main, parse(script.main, ["--seed=7", f"--config={file}"])).args[0]
    assert changed.flags() == flags | {"seed": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "unknown flag --lrr; did you mean --lr"),
        ("lr: [1, 2]", "--lr is '1 2', expected number"),
        ("lr: []", "--lr has no value, expected number"),
        ("lr: {a: 1}", "found {'a': '1'}, expected a text, a number"),
        ("lr: -2", "--lr is -2.0, expected 0 or more"),
        ("schedule: cosin", "--schedule is 'cosin', expected cosine|linear|constant; did you mean cosine"),
        ("packing: maybe", "unknown flag --packing"),
        ("wandb: a/b", "unknown flag --wandb; it has become --trackers wandb:PROJECT/NAME"),
        ("dry_run: maybe", "--dry_run is 'maybe', expected true|false"),
        ("nodry_run: true", "write dry_run: false"),
        ("- 1", "holds list, expected flags by name"),
        ("a: [", "is not valid yaml"),
        ("", "holds NoneType, expected flags by name"),
        ("config: other.yaml", "unknown flag --config"),
        ("lr: 1e-3\nlr: 1e-4", "the key 'lr' stands twice"),
        ("dry-run: true\ndry_run: false", "dry_run stands there twice, spelt in two ways"),
        ("ckpt_dir:", "ckpt_dir is null, expected text; leave the line out"),
        ("kinds: [a, null]", "kinds is null, expected list of text"),
        ("lr: 1:30", "--lr is '1:30', expected number"),
    ],
)
def test_a_mistake_in_the_file_names_it(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as problem:
        parse(small, ["--ckpt_dir=x", f"--config={file}"])
    assert str(file) in str(problem.value) and message in str(problem.value)


def test_a_word_of_yaml_means_what_it_means_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    for word in ("1.10", "010", "1_000", "0x10", "1:30", "yes", "2024-07-26", "~x", "On", "off", "1e-5"):
        for name in ("ckpt_dir", "lr", "dry_run"):
            file.write_text(f"{name}: {word}\n")
            found = []
            for words in ([f"--{name}={word}"], [f"--config={file}"]):
                try:
                    found.append(parse(small, ["--ckpt_dir=x", *words] if name != "ckpt_dir" else words)[name])
                except UserError as problem:
                    found.append(str(problem).removeprefix(f"{file}: "))
            assert found[0] == found[1], (name, word)


def test_the_elements_of_a_list_in_a_file_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    for text, kinds in (('["Sorry, I", b]', ["Sorry, I", "b"]), ('["\\n", ", "]', ["\n", ", "]), ("a, b", ["a", "b"])):
        file.write_text(f"kinds: {text}\n")
        assert parse(small, ["--ckpt_dir=x", f"--config={file}"])["kinds"] == kinds


def test_the_presets_of_the_recipes_are_read() -> None:
    presets = list(Path("recipes/presets").glob("*.yaml"))
    assert presets
    for file in presets:
        folders = ["--actor_ckpt_dir=a", "--actor_save_dir=b", "--critic_ckpt_dir=c", "--critic_save_dir=d"]
        values = parse(ppo_train.main, [*folders, "--reward=rule", "--eval_file=e", f"--config={file}"])
        assert bind(ppo_train.main, values).args[0].task == "toy"


def test_a_config_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00lr")
    for file in ("none.yaml", "none.json", ".", "bytes.yaml"):
        with pytest.raises(UserError, match=str(tmp_path / file)):
            parse(small, ["--ckpt_dir=x", f"--config={tmp_path / file}"])
    (tmp_path / "empty.json").write_text("{}")
    assert parse(small, ["--ckpt_dir=x", f"--config={tmp_path / 'empty.json'}"]) == {"ckpt_dir": "x"}
    (tmp_path / "list.yaml").write_text("kinds: []\nlr: 1e-3\nckpt_dir: 12\n")
    assert parse(small, [f"--config={tmp_path / 'list.yaml'}"]) == {"kinds": [], "lr": 1e-3, "ckpt_dir": "12"}


def test_a_flag_is_changed_where_it_has_another_value_than_its_default() -> None:
    names = ("kinds", "lr", "seed", "unknown")
    assert Small(ckpt_dir="x").changed(names) == []
    assert Small(ckpt_dir="x", kinds=["a"], seed=2).changed(names) == ["seed", "kinds"]
    assert Small(ckpt_dir="x", seed=2).changed(["ckpt_dir"]) == ["ckpt_dir"]  # it has no default
