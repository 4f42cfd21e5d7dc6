"""src/training/run.py: a step by hand, a rate that a machine can have, and tokens that adapters cannot tell apart."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import solver_train
import verifier_train
from src import parallel
from src.data.batch import Step, make_batch
from src.data.encoding import Encoded
from src.errors import UserError
from src.models.config import ModelConfig
from src.training import run as module
from src.training.run import ThroughputMeter
from tests.conftest import CODE_BLOCKS
from tests.text.files import write_json

CONFIG = ModelConfig(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=12, vocab_size=10, max_seq_len=32
)
SAMPLES = [Encoded([1, 5, 2], 1), Encoded([1, 5, 6, 7, 2], 3)]


@pytest.mark.parametrize(("packing", "padding"), [(False, 2 / 10), (True, 0.0)])
def test_a_step_by_hand(monkeypatch: pytest.MonkeyPatch, packing: bool, padding: float) -> None:
    parallel.start()
    monkeypatch.setattr(module, "matrix_rate", lambda dtype: 1e6)
    clock = iter([0.0, 10.0, 11.0, 13.0])  # made; asked for a step; got it; done with it
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter, batches = ThroughputMeter(CONFIG, torch.float32), [make_batch(SAMPLES, packing=packing)]
    next(meter.timed(iter([Step(1, 1, batches)])))
    clock = iter([13.0])
    found = meter.measure(batches, 4)
    # wq, wo 2*64; wk, wv 2*32; w1, w2, w3 3*96; 8 tokens; the head's 80 for 4; attention 6*1*2*4 * (9 + 25)
    flops = 6 * (480 * 8 + 80 * 4) + 48 * 34
    assert found["padding_share"] == pytest.approx(padding) and found["tokens"] == 8
    assert found["step_seconds"] == 2.0 and found["data_seconds"] == 1.0
    assert found["tokens_per_second"] == 4.0 and found["supervised_per_second"] == 2.0
    assert found["mfu"] == pytest.approx(flops / 2.0 / 1e6)


def test_experts_that_a_token_does_not_pass_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.start()
    monkeypatch.setattr(module, "matrix_rate", lambda dtype: 1e6)
    experts = replace(CONFIG, n_layers=2, n_experts=8, n_active_experts=2)
    clock = iter([0.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter, batches = ThroughputMeter(experts, torch.float32), [make_batch(SAMPLES, packing=True)]
    next(meter.timed(iter([Step(1, 1, batches)])))
    # in each layer the projections' 192, the router's 8*8, two experts of 288; two layers' attention
    flops = 6 * (2 * (192 + 64 + 2 * 288) * 8 + 80 * 4) + 2 * 48 * 34
    assert meter.measure(batches, 4)["mfu"] == pytest.approx(flops / 1e6)


def test_the_rate_of_matrix_products_is_one_a_machine_can_have() -> None:
    parallel.start()
    assert 1e8 < module.matrix_rate(torch.float32) < 1e16


def test_adapters_are_refused_where_no_adapter_tells_the_ends_of_blocks_apart(code_base: str, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": CODE_BLOCKS}]}]
    with pytest.raises(UserError, match=r"has for <\|text\|>, <\|code\|>, .* the same weights as for another token"):
        solver_train.main(solver_train.SolverTrainConfig(
            ckpt_dir=code_base, save_dir=str(tmp_path / "run"), lora_rank=2,
            train_file=str(write_json(tmp_path / "rows.json", rows))))


def test_a_verifier_of_them_may_learn_by_adapters(code_base: str, tmp_path: Path) -> None:
    """It predicts no token."""
    texts = ["".join(f"<|{kind}|>{text}<|endofblock|>" for kind, text in (("text", "so"), ("code", code)))
             for code in ("print(1)", "print(2)")]
    rows = [{"instruction": problem, "chosen": texts[0], "rejected": texts[1]} for problem in ("1", "2")]
    verifier_train.main(verifier_train.VerifierTrainConfig(
        ckpt_dir=code_base, save_dir=str(tmp_path / "run"), lora_rank=2, held_out=0.5,
        train_file=[str(write_json(tmp_path / "pairs.json", rows))]))
    assert (tmp_path / "run" / "manifest.json").is_file()
