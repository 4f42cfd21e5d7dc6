"""src/training/trainer.py: the schedule, the clipping, the guard, and AdamW against torch's on transformers' model."""

import math
from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close

from src import load
from src.checkpoint.convert import from_hf_name, rotary_from_hf, rotary_to_hf
from src.checkpoint.saving import record
from src.command.config import LoraFlags, OptimizerFlags
from src.errors import UserError
from src.models.lora import LINEARS, LoraConfig
from src.runlog import RunLog
from src.training.sft import n_supervised, sft_loss
from src.training.trainer import Trainer, lr_factor
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.reference import batch, hf_logits_and_loss, hf_model
from tests.training.workers import clipped_steps


def make_trainer(folder: str, tmp_path: Path, lora_rank: int = -1, **options: float) -> Trainer:
    """A trainer of a solver of that directory."""
    options = {"lr": 1e-2, "warmup_ratio": 0.0} | options
    others = {name: options.pop(name) for name in ("adam_eps", "optimizer") if name in options}
    total_steps = options.pop("total_steps", 10)
    model = load.load_solver(folder)
    load.put_lora_on(
        model,
        load.lora_config(LoraFlags(lora_rank=lora_rank, lora_alpha=16.0, lora_targets=list(LINEARS))),
        seed=1,
    )
    return Trainer(model, RunLog(str(tmp_path), {}), OptimizerFlags(**options), total_steps=total_steps, **others)


def test_schedule_by_hand() -> None:
    # 2 steps up, then a cosine from 1 at step 2 to 0.1 at step 10; its middle is (1 + 0.1) / 2
    found = [lr_factor(step, 11, 2, 0.1) for step in (0, 1, 2, 6, 10, 11)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    # a quarter of the way cos(pi / 4) = sqrt(1/2) is left
    assert lr_factor(4, 11, 2, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert [lr_factor(step, 3, 0, 0.0) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert lr_factor(0, 1, 1, 0.1) == lr_factor(0, 1, 0, 0.1) == 1.0
    line = [lr_factor(step, 11, 2, 0.1, "linear") for step in (0, 1, 2, 6, 10)]
    assert line == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert [lr_factor(step, 11, 2, 0.1, "constant") for step in (0, 5, 10)] == [0.5, 1.0, 1.0]


def test_the_trainer_follows_the_schedule(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        folders.one, tmp_path, lr=1e-3, warmup_ratio=0.2, total_steps=11
    )  # ceil(2.2) = 3 steps up
    rates, step_at = [], trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda lr: (rates.append(lr), step_at(lr)))
    for step in range(11):
        trainer.backward(sft_loss(trainer.model, batch()) / 16)
        report = trainer.step()
        assert report.lr == pytest.approx(1e-3 * lr_factor(step, 11, 3, 0.1))
        assert rates[-1] == report.lr


def test_gradients_are_clipped_to_their_global_norm(folders: Folders, tmp_path: Path) -> None:
    for limit in (0.01, 1e6):
        trainer = make_trainer(folders.one, tmp_path, lr=0.0, max_grad_norm=limit)
        trainer.backward(sft_loss(trainer.model, batch()) / 16)
        true_norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
        trainer.optimizer.zero_grad = lambda: None  # keep what step() leaves
        report = trainer.step()
        left = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
        assert 0.01 < true_norm < 1e6
        assert report.grad_norm == pytest.approx(true_norm, rel=1e-5)
        assert left == pytest.approx(min(true_norm, limit), rel=1e-5)


def test_what_training_leaves_out_of_a_config_is_said(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load.load_solver(folders.one)
    for said in ({"attention_dropout": 0.0}, {"attention_dropout": 0.1, "output_router_logits": True}):
        record(model, carried=said)
        Trainer(model, RunLog(str(tmp_path), {}), OptimizerFlags(), total_steps=1)
    (warning,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert warning.startswith("attention_dropout=0.1, output_router_logits=True of the model's config.json: ")


def test_clipping_and_steps_are_the_same_on_two_ranks(folders: Folders, tmp_path: Path) -> None:
    one = clipped_steps(folders.one, str(tmp_path))
    two = run_ranks(
        2,
        "tests.training.workers:clipped_steps",
        tmp_path,
        folder=folders.two,
        log_dir=str(tmp_path / "log"),
    )
    for name, reports in one.items():
        assert (reports[:, 1] > 0.5).all()  # the limit is felt
        assert reports[2, 0] < reports[0, 0]
        for found in two:
            assert_close(found[name], reports, rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_anew_each_pass_and_recomputed_as_it_was(folders: Folders, tmp_path: Path) -> None:
    lora, found = LoraConfig(rank=4, alpha=16.0, dropout=0.3, targets=("wq", "wo", "w1", "w2")), {}
    for kind in ("none", "selective", "full"):
        model = load.load_solver(folders.one, trained=load.Trained(lora))
        learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in learnt.values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        flags = OptimizerFlags(lr=1e-3, activation_checkpointing=kind)
        trainer = Trainer(model, RunLog(str(tmp_path), {}), flags, total_steps=3)
        model.train()
        for step in range(2):
            losses = []
            for last in (False, True):
                losses.append(sft_loss(model, batch()) / 32)
                trainer.backward(losses[-1], last=last)
            assert losses[0] != losses[1]
            found[kind, step] = {name: parameter.grad.clone() for name, parameter in learnt.items()}
            trainer.step()
    for (_, step), gradients in found.items():
        assert all(torch.equal(gradients[name], expected) for name, expected in found["none", step].items())


def test_a_non_finite_step_is_skipped(folders: Folders, tmp_path: Path) -> None:
    trainer = make_trainer(folders.one, tmp_path)
    weight = trainer.model.norm.weight
    for poison in (math.nan, math.inf):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.backward(sft_loss(trainer.model, batch()) / 16 + weight.sum() * poison)
        report = trainer.step()
        assert not math.isfinite(report.loss)
        assert all(map(torch.equal, before, trainer.model.parameters()))
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not list(trainer.optimizer.held())  # the moments were not touched
    trainer.backward(sft_loss(trainer.model, batch()) / 16)
    assert math.isfinite(trainer.step().loss) and trainer.steps == 3
    assert not torch.equal(before[0], next(trainer.model.parameters()))


def test_five_bad_steps_in_a_row_end_the_run(folders: Folders, tmp_path: Path) -> None:
    trainer = make_trainer(folders.one, tmp_path)
    for poison in (math.nan, 1.0, math.nan, math.nan, math.nan, math.nan):
        trainer.backward(trainer.model.norm.weight.sum() * poison)
        trainer.step()
    trainer.backward(trainer.model.norm.weight.sum() * math.nan)
    with pytest.raises(
        UserError, match="5 steps in a row had a non-finite loss or gradient; lower the learning rate"
    ):
        trainer.step()


def test_adamw_equals_torch_on_transformers_model(folders: Folders, tmp_path: Path) -> None:
    steps, lr, decay, limit, eps = 50, 1e-3, 0.1, 1.0, 1e-4
    trainer = make_trainer(
        folders.one, tmp_path, lr=lr, total_steps=steps, weight_decay=decay, warmup_ratio=0.3, adam_eps=eps
    )
    model = hf_model(folders.hf)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is flat] for flat in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps)
    for step in range(steps):
        trainer.backward(sft_loss(trainer.model, batch()) / n_supervised([batch()]))
        report = trainer.step()
        loss = hf_logits_and_loss(model)[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, 15, 0.1)  # ceil(0.3 * 50) = 15
        optimizer.step()
        assert report.loss == pytest.approx(loss.item(), abs=1e-4)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    assert report.loss < 0.8 * loss_at_start(folders.one)


def loss_at_start(folder: str) -> float:
    """The loss of the untrained model."""
    return sft_loss(load.load_solver(folder), batch()).item() / n_supervised([batch()])


def test_ten_steps_of_adapters_equal_peft(folders: Folders, tmp_path: Path) -> None:
    steps, lr = 10, 1e-3
    trainer = make_trainer(folders.one, tmp_path, lora_rank=4, lr=lr, total_steps=steps, max_grad_norm=1e6)
    config = trainer.model.config
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf_model(folders.hf), settings)
    ours = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    theirs = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            stem, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            stem = from_hf_name(f"{stem}.weight").removesuffix(".weight")
            name = f"{stem}.lora_{factor[0].lower()}.weight"
            # a B has the outputs of its base, which in wq and wk lie in another order
            base = f"{stem}.weight" if factor[0] == "B" else name
            theirs[name] = (base, parameter)
            parameter.data = rotary_to_hf(base, ours[name].detach().clone(), config)
    assert theirs.keys() == ours.keys() and len(ours) == 2 * 7 * config.n_layers
    optimizer = torch.optim.AdamW(
        [parameter for _, parameter in theirs.values()], betas=(0.9, 0.95), weight_decay=0
    )
    for step in range(steps):
        trainer.backward(sft_loss(trainer.model, batch()) / n_supervised([batch()]))
        report = trainer.step()
        loss = hf_logits_and_loss(model)[1]
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, 0, 0.1)
        optimizer.step()
        assert report.loss == pytest.approx(loss.item(), abs=1e-5)
    for name, (base, parameter) in theirs.items():
        assert_close(ours[name].detach(), rotary_from_hf(base, parameter.detach(), config), rtol=0, atol=1e-5)
        assert ours[name].abs().max() > 1e-3
