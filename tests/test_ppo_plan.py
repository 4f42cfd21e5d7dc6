"""The plan of ppo_train.py --dry_run: every arrangement by hand, and the flags that change it."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import ppo_train
from src import assemble, parallel, plan, ppo_plan
from src.checkpoint import storage
from src.errors import UserError
from src.memory import Pass, Training, activations
from src.models.decoder import Decoder
from src.ppo_plan import Models, Work
from src.training.ppo_config import ESTIMATORS, PPOConfig
from tests.conftest import Folders
from tests.test_memory import CONFIG, LORA

# CONFIG has 664 parameters, of them 80 in the output layer, in whose place a critic has a head of 8; a layer has 496
ACTOR, CRITIC, VERIFIER = 664, 592, 592 + 496
ADAPTERS, HEAD = 72, 8
CRITIC_CONFIG = assemble.solver_to_verifier(CONFIG)
VERIFIER_CONFIG = dataclasses.replace(CRITIC_CONFIG, n_layers=2)
FEW = Work(
    Pass(1, 1), n_rows=2, n_tokens=7
)  # a pass so small that learning has its peak at a backward pass's end
ROLLOUTS = 2 * 4 * 4 * 2 * 7 + 4 * 2 * 10  # keys and values of a layer's one head of 4; logits


def peaks(models: Models, work: Work = FEW) -> dict[str, dict[str, int]]:
    """The moments of each arrangement."""
    return {name: ppo_plan.moments(models, work, name) for name in ppo_plan.ARRANGEMENTS}


def test_four_models_at_once_and_in_phases_by_hand() -> None:
    found = peaks(Models(CONFIG, CRITIC_CONFIG, VERIFIER_CONFIG, 1, Training()))
    worked = [activations(config, 1, FEW.largest, Training())[1] for config in (CONFIG, CRITIC_CONFIG)]
    # weights, two moments and holes of both that learn; the reference's weights, and the verifier's own two layers
    lasting = (4 + 8 + 4) * (ACTOR + CRITIC) + 4 * ACTOR + 4 * VERIFIER
    assert found["all at once"] == {
        "the actor learns": lasting + 4 * ACTOR + worked[0],
        "the critic learns": lasting + 4 * CRITIC + worked[1],
        "the reference scores": lasting,
        "the verifier scores": lasting,
        "the actor samples": lasting + ROLLOUTS,
        "loading": 4 * (2 * ACTOR + CRITIC + VERIFIER) + 4 * VERIFIER,  # and the largest file
    }
    assert found["--phases"] == {
        "the actor learns": 20 * ACTOR + worked[0],
        "the critic learns": 20 * CRITIC + worked[1],
        "the reference scores": 4 * ACTOR,
        "the verifier scores": 4 * VERIFIER,
        "the actor samples": 4 * ACTOR + ROLLOUTS,
        "loading": 2 * 4 * VERIFIER,
    }
    assert found["--share_base"] == {}  # all weights learn


def test_adapters_on_one_base_by_hand() -> None:
    shallow = dataclasses.replace(VERIFIER_CONFIG, n_layers=1)
    models = Models(CONFIG, CRITIC_CONFIG, shallow, 1, Training(LORA))
    worked = activations(CONFIG, 1, FEW.largest, Training(LORA))[1]
    optimizers = 8 * ADAPTERS + 8 * (ADAPTERS + HEAD)
    at_once, shared = (peaks(models)[name]["the actor learns"] for name in ("all at once", "--share_base"))
    weights = 4 * (ACTOR + ADAPTERS) + 4 * (CRITIC + ADAPTERS + HEAD) + 4 * CRITIC
    assert at_once == weights + optimizers + 4 * ADAPTERS + worked  # no reference: the actor without adapters
    weights = 4 * (ACTOR + ADAPTERS) + 2 * 4 * (ADAPTERS + HEAD)
    assert shared == weights + optimizers + 4 * ADAPTERS + worked


@pytest.mark.parametrize(
    "changes",
    [
        {"verifier": VERIFIER_CONFIG},  # of another depth: on another base
        {"renewed": True},
        {"quantize": "int8"},
        {"how": Training(LORA, data_parallel=2)},
    ],
)
def test_where_no_base_can_be_shared(changes: dict[str, object]) -> None:
    models = Models(CONFIG, CRITIC_CONFIG, CRITIC_CONFIG, 1, Training(LORA))
    assert ppo_plan.moments(models, FEW, "--share_base")
    assert not ppo_plan.moments(models._replace(**changes), FEW, "--share_base")


def test_frozen_models_in_fewer_bits_and_a_renewed_reference() -> None:
    models = Models(CONFIG, None, VERIFIER_CONFIG, 1, Training(), "int8")
    found = ppo_plan.held(models, FEW, "all at once")
    assert found["reference"]["weights"] == int((1 + 4 / 128) * ACTOR)
    assert found["verifier"]["weights"] == int((1 + 4 / 128) * VERIFIER)
    assert found["actor"]["weights"] == 4 * ACTOR and "critic" not in found
    adapted = models._replace(how=Training(LORA), quantize="int4")
    assert "reference" not in ppo_plan.held(adapted, FEW, "all at once")
    renewed = ppo_plan.held(adapted._replace(renewed=True), FEW, "all at once")
    assert renewed["reference"]["weights"] == int((1 / 2 + 4 / 32) * ACTOR)


def test_a_rank_that_shares_its_weights_holds_them_whole_to_sample() -> None:
    models = Models(CONFIG, None, None, 1, Training(data_parallel=2))
    found = ppo_plan.held(models, FEW, "all at once")
    assert found["actor"]["weights"] == 4 * ACTOR // 2 and found["rollouts"]["gathered"] == 4 * ACTOR
    assert found["reference"]["weights"] == 4 * ACTOR  # frozen models are whole on every rank


def config_of(**changes: object) -> PPOConfig:
    """ppo_train.py's defaults with these flags."""
    flags = {"actor_ckpt_dir": "a", "actor_save_dir": "b", "reward": ["rule"]} | changes
    if ESTIMATORS[flags.get("advantage", "gae")].has_critic:
        flags |= {"critic_ckpt_dir": "c", "critic_save_dir": "d"}
    return PPOConfig(**flags)


@pytest.mark.parametrize(
    ("changes", "ranks", "lengths", "held_out", "work"),
    [
        # 96 episodes in 4 steps of 24; a pass takes 4; longest 9 + 20 tokens; all 96 may decode, 64 do
        ({}, 1, [3] * 200 + [9], [], (4 * 29, 4 * 20, 64, 29)),
        # a step has 3 episodes; 12 on 2 ranks decode 6 each, the held-out problems are more
        ({"max_buffer_size": 12}, 2, [3] * 200, [5] * 40, (3 * 23, 3 * 20, 20, 25)),
        # 2 prompts fill a smaller buffer than allowed: 8 episodes, 2 a step; the context ends after 32
        ({"group_size": 4, "advantage": "grpo"}, 1, [30, 2], [], (2 * 32, 2 * 20, 8, 32)),
    ],
)
def test_the_largest_work_by_hand(
    changes: dict[str, object],
    ranks: int,
    lengths: Sequence[int],
    held_out: Sequence[int],
    work: tuple[int, ...],
) -> None:
    models = Models(CONFIG, None, None, 1, Training(data_parallel=ranks))
    found = ppo_plan.work_of(models, config_of(max_new_tokens=20, **changes), lengths, held_out)
    assert (found.largest.n_tokens, found.largest.n_supervised, found.n_rows, found.n_tokens) == work


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((10, 4, -1, -1, 1), (3, 1)),  # the weights of 4, 8 and 10; 10 to resume from
        ((10, 4, 1, -1, 3), (4, 3)),  # 4, 8, 9, 10; the last three
        ((10, 5, -1, 4, 1), (3, 1)),  # 5, 10, and 8 as the newest reference
        ((3, 5, -1, -1, 2), (1, 1)),  # one save only
    ],
)
def test_saves_by_hand(given: tuple[int, ...], kept: tuple[int, int]) -> None:
    assert ppo_plan.saves(*given) == kept


def test_rewards_lie_where_they_are_laid() -> None:
    process = dataclasses.replace(VERIFIER_CONFIG, objective="process")
    weights = {"verifier": 1.0, "rule": 0.0, "mine.py:short": 0.5}
    for verifier, where in ((process, "the ends of steps"), (VERIFIER_CONFIG, "the last token")):
        expected = f"verifier at {where}, short at the last token"
        assert ppo_plan.places(weights, verifier, config_of(kl_coef=0.0)) == expected
        assert ppo_plan.places(weights, verifier, config_of()) == f"{expected}, KL at every token"


@pytest.fixture
def flags(folders: Folders, tmp_path: Path) -> dict[str, object]:
    """Flags of a run of 6 buffers of 2 prompts, whose verifier judges steps and has two layers more than the critic."""
    parallel.start()
    config = assemble.load_config(folders.verifier)
    deep = Decoder(dataclasses.replace(config, n_layers=config.n_layers + 2, objective="process"))
    for parameter in deep.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assemble.save_model(deep, str(tmp_path / "deep"), folders.verifier)
    rows = ", ".join(f'{{"instruction": "{n}+1=", "label": "{n + 1}"}}' for n in range(4))
    (tmp_path / "rows.json").write_text(f"[{rows}]")
    return {
        "actor_ckpt_dir": folders.one, "actor_save_dir": str(tmp_path / "actor"),
        "critic_ckpt_dir": folders.verifier, "critic_save_dir": str(tmp_path / "critic"),
        "reward_model_ckpt_dir": str(tmp_path / "deep"), "train_file": str(tmp_path / "rows.json"), "task": "toy",
        "max_new_tokens": 8, "max_buffer_size": 2, "minibatches": 1, "epochs": 3,
    }  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], flags: dict[str, object]) -> dict[str, str]:
    """The lines of a dry run by what they are of."""
    capsys.readouterr()
    ppo_train.main(ppo_train.PPOConfig(**flags, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    return {line[:24].strip(): line[24:] for line in lines}


def test_each_model_is_planned_by_its_own_config(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    told = planned(capsys, flags)
    for name, folder in (("critic", "critic_ckpt_dir"), ("verifier", "reward_model_ckpt_dir")):
        count = sum(p.numel() for p in assemble.load_verifier(str(flags[folder])).parameters())
        assert told[name].startswith(f"weights {plan.size(4 * count)}"), name
    assert told["rewards"] == "verifier at the ends of steps, KL at every token"
    assert told["rollout buffers"] == "6 of 2 episodes, each for 2 x 1 optimizer steps"
    # BOS, the space that sentencepiece puts in front, four characters
    assert told["an example"] == "<s>0+1=[[...]], 6 tokens and at most 8 to learn"


def test_the_table_has_every_arrangement_in_every_precision(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "resident_memory", lambda: 2**20)
    like = {
        "reward_model_ckpt_dir": flags["critic_ckpt_dir"]
    }  # of the actor's shape: it may be on the same base
    table = list(planned(capsys, flags | like).items())[-7:]
    assert (table[0][0], table[0][1].split("  ")[0]) == ("arrangements", "all at once")
    names = [
        f"{how}{bits}" for how in ("all weights", "LoRA of rank 16") for bits in ("", ", int8", ", int4")
    ]
    assert [name for name, _ in table[1:]] == names
    cells = [re.split(r" {2,}", row.strip()) for _, row in table[1:]]
    assert [row[2] == "-" for row in cells] == [True, True, True, False, True, True]
    sizes = [[float(cell.split()[0]) for cell in row[:2]] for row in cells]  # all in MiB
    assert sizes[0][0] > sizes[1][0] > sizes[2][0] > sizes[3][0] > sizes[4][0] > sizes[5][0]
    assert all(at_once > in_phases > 29 for at_once, in_phases in sizes)  # 1 MiB and what a run adds to it
    adapted = planned(capsys, flags | like | {"lora_rank": 2, "share_base": True})
    assert adapted["memory of each rank"].split(",")[0] == re.split(r" {2,}", adapted["LoRA of rank 2"])[2]


def test_flags_that_change_what_learning_holds(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def models(**changes: object) -> Models:
        seen: list[Models] = []
        with monkeypatch.context() as patch:
            patch.setattr(ppo_plan, "memory_table", lambda models, *_: seen.append(models) or "")
            planned(capsys, flags | changes)
        return seen[0]

    assert models().how == Training(on_gpu=torch.cuda.is_available())
    assert models(activation_checkpointing="full").how.checkpointing == "full"
    assert (
        models(max_batch_size=1).how.accumulates
        and not models(max_batch_size=1, minibatches=2).how.accumulates
    )
    assert models(quantize="int8").quantize == "int8" and models(reference_refresh=2).renewed


def test_data_parallel_ranks_share_a_step_s_passes(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel.stop()
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        told = planned(capsys, flags | {"tensor_parallel_size": 2})
    parallel.start()
    assert (told["tensor-parallel ranks"], told["data-parallel ranks"]) == ("2", "2")


def test_one_base_is_refused_where_the_run_would_refuse_it(flags: dict[str, object]) -> None:
    with pytest.raises(UserError, match="--share_base: one base cannot be below these models"):
        ppo_train.main(ppo_train.PPOConfig(**flags, share_base=True, lora_rank=2, dry_run=True))


@pytest.mark.parametrize("changes", [{"keep_last": 2, "save_every": 1}, {"lora_rank": 2}])
def test_checkpoints_take_what_the_plan_says(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    flags = flags | {"epochs": 1, "reward": ["rule"], "reward_model_ckpt_dir": ""} | changes
    told = planned(capsys, flags)["disk"]
    ppo_train.main(ppo_train.PPOConfig(**flags))
    files = {
        path.stat().st_ino: path
        for folder in ("actor_save_dir", "critic_save_dir")
        for path in Path(str(flags[folder])).rglob("*.pth")
    }
    written = sum(tensor.nbytes for path in files.values() for tensor in storage.read_shard(path).values())
    assert re.match(r"[\d.]+ \w+", told)[0] == plan.size(written)
