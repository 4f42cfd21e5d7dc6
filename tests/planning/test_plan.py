"""The plan of --dry_run says what a run will really hold."""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoint_split
import ppo_train
import solver_train
from src import load, parallel
from src.checkpoint import saving, sources, storage
from src.checkpoint.tensor_files import read_safetensors
from src.command.config import SavingFlags
from src.errors import UserError
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.planning import plan
from src.planning.memory import (
    Training,
    local_parameters,
    scoring_memory,
    training_memory,
)
from src.planning.plan import Memory, PPOWork
from src.processes import heap
from src.training.ppo_config import ESTIMATORS, PPOConfig
from tests import tiny
from tests.conftest import Folders
from tests.planning.test_memory import CONFIG, LORA


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes_as_a_person_reads_them(n_bytes: int, text: str) -> None:
    assert plan.size(n_bytes) == text


@pytest.mark.parametrize(("flop", "text"), [(1, "1 min"), (30 * 45, "46 min"), (30 * 60 * 3, "3.0 h")])
def test_the_time_of_a_run_is_twice_that_of_its_products(flop: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "matrix_rate", lambda dtype: 1e9)
    config = PPOConfig(actor_ckpt_dir="a", actor_save_dir="b", precision="float32", advantage="grpo", reward=["rule"])
    said = plan.duration(flop * 10**9, config)
    assert said == f"about {text} where a rank multiplies matrices as fast as here, 1 GFLOP/s"


@pytest.mark.parametrize("free, verdict", [(1 << 40, "fits: 1.00 TiB free"), (1 << 20, "does not fit: 1.00 MiB free")])
def test_a_plan_says_whether_this_machine_has_it(free: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: free)
    told = plan.report({}, {"model": {"weights": 1 << 30}}, {"learning": 1 << 30})
    assert f"this machine            {verdict}" in told


def test_the_plan_counts_what_shards_and_loaded_models_hold(tmp_path: Path) -> None:
    source = tiny.write_hf_llama(tmp_path / "hf")
    halves = tiny.split(source, tmp_path / "two", n=2)
    config = load.load_config(halves)
    for path in storage.shard_paths(Path(halves)):
        held = sum(tensor.numel() for tensor in storage.read_shard(path).values())
        assert held == local_parameters(config, 2)
    parallel.start()
    model = load.load_verifier(tiny.split(source, tmp_path / "one"), from_solver=True)
    assert sum(p.numel() for p in model.parameters()) == local_parameters(model.config, 1)
    load.put_lora_on(model, LORA, seed=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == local_parameters(model.config, 1, LORA)


def test_inspection_says_what_each_number_of_ranks_would_hold(tmp_path: Path) -> None:
    halves = tiny.split(tiny.write_hf_llama(tmp_path / "hf"), tmp_path / "two", n=2)
    facts, _, table = plan.inspection(*sources.describe(halves), ranks=(1, 3, 8, 9)).partition("\n\n")
    assert "llama, a solver" in facts
    assert "float32, " in facts and "shards: 2" in facts
    assert "8 query, 4 key-value, of 4" in facts
    one, three, eight, nine = table.splitlines()[1:]
    assert one.split()[:3] == [
        "1",
        plan.size(4 * local_parameters(load.load_config(halves), 1)).split()[0],
        "KiB",
    ]
    assert "uneven: 2 to 4 query heads; 2 rows of padding in the vocabulary" in three
    assert "each key-value head lies on 2 ranks" in eight
    assert "n_heads=8 leaves nothing to do for shard" in nine


def test_an_inspection_counts_the_files_that_are_read(tmp_path: Path, folders: Folders) -> None:
    hf = Path(shutil.copytree(folders.hf, tmp_path / "hf"))
    for name in ("training_args.bin", "other.safetensors", "pytorch_model.bin"):
        (hf / name).write_bytes(b"")
    assert sources.describe(str(hf))[1] == "Hugging Face files: 1"
    assert sources.describe(str(hf / "model.safetensors"))[1] == "Hugging Face files: 1"
    assert sources.describe(folders.two)[1] == "shards: 2"
    lora = tmp_path / "lora"
    parallel.start()
    model = load.load_solver(folders.two)
    load.put_lora_on(model, LORA, seed=1)
    saving.begin_save(model, str(lora), folders.two, lora=LORA).complete()
    assert sources.describe(str(lora))[1] == "files of the adapter and its base: 3"


def test_a_split_s_plan_is_of_the_form_that_is_asked_for(
    tmp_path: Path, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards, Hugging Face's files, an adapter: what the plan says the disk must hold, it holds afterwards."""
    adapter = tmp_path / "adapter"
    rows = '[{"instruction": "1+1=", "output": "2"}]'
    (tmp_path / "rows.json").write_text(rows)
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=folders.one,
            save_dir=str(adapter),
            train_file=str(tmp_path / "rows.json"),
            lora_rank=2,
            max_steps=1,
        )
    )
    for source, flags, word in (
        (folders.one, {"format": "hf"}, "files"),
        (str(adapter), {"format": "peft"}, "adapter"),
        (folders.one, {"n": 2}, "shards"),
    ):
        target = tmp_path / "written" / word
        capsys.readouterr()
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=source, save_path=str(target), dry_run=True, **flags)
        )
        told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert word in told and not target.exists()
        checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=source, save_path=str(target), **flags))
        tensors = [
            tensor
            for path in target.iterdir()
            if path.suffix in (".safetensors", ".pth")
            for tensor in read(path)
        ]
        assert told["disk"].strip() == plan.size(sum(tensor.nbytes for tensor in tensors))


def read(path: Path) -> list[Tensor]:
    if path.suffix == ".pth":
        return list(storage.read_shard(path).values())
    return [stored.load() for stored in read_safetensors(path).values()]


# CONFIG has 664 parameters, of them 80 in the output layer, in whose place a critic has a head of 8; a layer has 496
ACTOR, CRITIC, VERIFIER = 664, 592, 592 + 496
ADAPTERS, HEAD = 72, 8
CRITIC_CONFIG = load.solver_to_verifier(CONFIG)
VERIFIER_CONFIG = dataclasses.replace(CRITIC_CONFIG, n_layers=2)
FULL = {"actor": CONFIG, "critic": CRITIC_CONFIG, "reference": CONFIG, "verifier": VERIFIER_CONFIG}
WORK = PPOWork(n_tokens=1, accumulates=False, n_rows=2, n_decoded=7)
# 14 tokens are read at once: their keys and values, and what a block makes
PREFILL = 2 * 4 * 4 * 14 + scoring_memory(CRITIC_CONFIG, 1, 14, Training())["forward pass"]
ROLLOUTS = 2 * 4 * 4 * 2 * 64 + PREFILL + 4 * 2 * 10  # room for keys and values of a layer's one head of 4; logits


def held(
    models: Mapping[str, ModelConfig], how: Training, arrangement: str = "all at once", quantize: str = ""
) -> Memory:
    return plan.ppo_memory(models, 1, how, WORK, quantize, arrangement)


def peaks(models: Mapping[str, ModelConfig], how: Training, arrangement: str) -> dict[str, int]:
    return plan.moments(held(models, how, arrangement), models, 1, phases=arrangement == "--phases")


def test_four_models_at_once_and_in_phases_by_hand() -> None:
    # what learning adds: the activations of one token and, of the actor, its logits
    parts = (training_memory(config, 1, 1, Training()) for config in (CONFIG, CRITIC_CONFIG))
    actor, critic = (learning["activations"] + learning["logits"] for learning in parts)
    # and what scoring adds to weights
    reference, verifier = (scoring_memory(config, 1, 1, Training())["forward pass"] for config in (
        CONFIG, VERIFIER_CONFIG))
    # weights, two moments and the holes of gradients; weights alone
    lasting = (4 + 8 + 4) * (ACTOR + CRITIC) + 4 * ACTOR + 4 * VERIFIER
    assert peaks(FULL, Training(), "all at once") == {
        "the actor learns": lasting + actor,
        "the critic learns": lasting + critic,
        "the reference scores": lasting + reference,
        "the verifier scores": lasting + verifier,
        "the actor samples": lasting + ROLLOUTS,
        "loading": 4 * (2 * ACTOR + CRITIC + VERIFIER) + 4 * VERIFIER,  # and the largest file
    }
    assert peaks(FULL, Training(), "--phases") == {
        "the actor learns": 16 * ACTOR + actor,
        "the critic learns": 16 * CRITIC + critic,
        "the reference scores": 4 * ACTOR + reference,
        "the verifier scores": 4 * VERIFIER + verifier,
        "the actor samples": 4 * ACTOR + ROLLOUTS,
        "loading": 2 * 4 * VERIFIER,
    }


def test_adapters_on_one_base_by_hand() -> None:
    models = {"actor": CONFIG, "critic": CRITIC_CONFIG, "verifier": CRITIC_CONFIG}
    apart, shared = (held(models, Training(LORA), name) for name in ("all at once", "--share_base"))
    assert [parts.get("weights", 0) for parts in apart.values()] == [
        4 * (ACTOR + ADAPTERS), 4 * (CRITIC + ADAPTERS + HEAD), 4 * CRITIC, 0
    ]
    own = 4 * (ADAPTERS + HEAD)
    assert [parts.get("weights", 0) for parts in shared.values()] == [4 * (ACTOR + ADAPTERS), own, own, 0]
    taught = {"actor": CONFIG, "teacher": CONFIG}  # which is loaded whole
    assert held(taught, Training(LORA), "--share_base")["teacher"]["weights"] == 4 * ACTOR


def test_frozen_models_in_fewer_bits() -> None:
    found = held(FULL, Training(), quantize="int8")
    assert found["reference"]["weights"] == int((1 + 4 / 128) * ACTOR)
    assert found["verifier"]["weights"] == int((1 + 4 / 128) * VERIFIER)
    assert found["actor"]["weights"] == 4 * ACTOR


def test_a_rank_that_shares_its_weights_holds_them_whole_to_sample() -> None:
    found = held({"actor": CONFIG, "reference": CONFIG}, Training(data_parallel=2))
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
        ({}, 1, [3] * 200 + [9], [], (4 * 29, True, 64, 29)),
        # a step has 3 episodes; 12 on 2 ranks decode 6 each, the held-out problems are more
        ({"max_buffer_size": 12}, 2, [3] * 200, [5] * 40, (3 * 23, False, 20, 25)),
        # 24 episodes are 6 passes: one for each of 6 ranks, two where pairs of ranks share them; all sample
        ({}, 6, [3] * 200, [], (4 * 23, False, 16, 23)),
        ({"context_parallel_size": 2}, 6, [3] * 200, [], (4 * 23, True, 16, 23)),
        # 2 prompts fill a smaller buffer than allowed: 8 episodes, 2 a step; the context ends after 32
        ({"group_size": 4, "advantage": "grpo"}, 1, [30, 2], [], (2 * 32, False, 8, 32)),
    ],
)
def test_the_largest_work_by_hand(
    changes: dict[str, object],
    ranks: int,
    lengths: Sequence[int],
    held_out: Sequence[int],
    work: tuple[int, ...],
) -> None:
    found = plan.ppo_work(config_of(max_new_tokens=20, **changes), CONFIG.max_seq_len, 20, lengths, held_out, ranks)
    assert found == work


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
    n_steps, per_epoch, save_every, refresh, keep_last = given
    flags = SavingFlags(save_every=save_every, keep_last=keep_last)
    told = plan.disk([CONFIG], 1, Training(), flags, n_steps, per_epoch, refresh)
    n_bytes = 4 * 664 * kept[0] + 12 * 664 * kept[1]
    assert told.startswith(f"{plan.size(n_bytes)}: weights of {kept[0]} saves, {kept[1]} of them to resume from; ")


def test_rewards_lie_where_they_are_laid() -> None:
    process = dataclasses.replace(VERIFIER_CONFIG, objective="process")
    flags = {"reward": ["verifier", "rule", "mine.py:short"], "reward_weights": [1.0, 0.0, 0.5],
             "reward_model_ckpt_dir": "e"}
    for verifier, where in ((process, "the ends of steps"), (VERIFIER_CONFIG, "the last token")):
        expected = f"verifier at {where}, short at the last token"
        assert plan.places(config_of(**flags, kl_coef=0.0), verifier) == expected
        assert plan.places(config_of(**flags), verifier) == f"{expected}, KL at every token"


@pytest.fixture
def flags(folders: Folders, tmp_path: Path) -> dict[str, object]:
    """Flags of a run of 6 buffers of 2 prompts, whose verifier judges steps and has two layers more than the critic."""
    parallel.start()
    config = load.load_config(folders.verifier)
    deep = Decoder(dataclasses.replace(config, n_layers=config.n_layers + 2, objective="process"))
    for parameter in deep.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    saving.begin_save(deep, str(tmp_path / "deep"), folders.verifier).complete()
    rows = ", ".join(f'{{"instruction": "{n}+1=", "label": "{n + 1}"}}' for n in range(4))
    (tmp_path / "rows.json").write_text(f"[{rows}]")
    return {
        "actor_ckpt_dir": folders.one, "actor_save_dir": str(tmp_path / "actor"),
        "critic_ckpt_dir": folders.verifier, "critic_save_dir": str(tmp_path / "critic"),
        "reward_model_ckpt_dir": str(tmp_path / "deep"), "train_file": str(tmp_path / "rows.json"), "task": "toy",
        "max_new_tokens": 8, "max_buffer_size": 2, "minibatches": 1, "epochs": 3,
    }


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
    models, weights = told[""].split(), re.split(r" {2,}", told["weights"])
    assert models == ["actor", "critic", "reference", "verifier", "rollouts"]
    for name, folder in (("critic", "critic_ckpt_dir"), ("verifier", "reward_model_ckpt_dir")):
        count = sum(p.numel() for p in load.load_verifier(str(flags[folder])).parameters())
        assert weights[models.index(name)] == plan.size(4 * count), name
    assert told["rewards"] == "verifier at the ends of steps, KL at every token"
    assert told["rollout buffers"] == "6 of 2 episodes, each for 2 x 1 optimizer steps"
    # BOS, the space that sentencepiece puts in front, four characters
    assert told["an example"] == "<s>0+1=[[...]], 6 tokens and at most 8 to learn"


def test_every_arrangement_is_told_and_the_one_asked_for_is_the_peak(
    flags: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap, "resident_memory", lambda: 2**20)
    found = {}
    for asked in ({}, {"phases": True}, {"phases": True, "quantize": "int4"}, {"phases": True, "lora_rank": 2}):
        told = planned(capsys, flags | asked)
        found[str(asked)] = [told[name].strip() for name in plan.ARRANGEMENTS]
        assert told["memory of each rank"].split(",")[0] == told["--phases" if asked else "all at once"].strip()
    whole, phases, bits, adapted = found.values()
    assert whole == phases and whole[0] > bits[0] > adapted[0]  # all in MiB
    assert all(row[2] == "-" and row[0] > row[1] for row in found.values())  # the verifier stands on other weights


def test_flags_that_change_what_learning_holds(flags: dict[str, object]) -> None:
    def models(**changes: object) -> set[str]:
        return set(plan.ppo_models(PPOConfig(**flags | changes), 1))

    assert models() == {"actor", "critic", "reference", "verifier"}
    assert models(lora_rank=2) == {"actor", "critic", "verifier"}
    assert "reference" in models(lora_rank=2, reference_refresh=2)


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
