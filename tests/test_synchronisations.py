"""How often a step waits for a GPU, counted without one: what would lie on it has no values here.

To read a value of the device, to ask which places a mask there picks, and to send it what lies in pageable memory: each
stops the host until all that the device was given is done. Tensors of PyTorch's meta device stand for a GPU's, so that
shapes, types and devices are checked along every path that a GPU alone takes.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src import load, parallel
from src.command.config import LoraFlags, OptimizerFlags
from src.data.batch import Batch, make_batch, pack_shared
from src.data.encoding import Encoded
from src.inference import engine
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.inference.step import EagerStep
from src.models import attention, forward
from src.models.cache import FixedCache
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.models.forward import response_logprobs, response_scores, response_values
from src.runlog import RunLog
from src.training.preference import KTO, Preference
from src.training.reward_model import LabelObjective, PairwiseObjective
from src.training.sft import sft_loss
from src.training.trainer import Trainer

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=61,
                     max_seq_len=128)
GPU = torch.device("meta")


class Waits(TorchDispatchMode):
    """Counts what would wait, and notes all that is done on the device. What is read there is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.n_done = 0

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs, name, x = kwargs or {}, func.overloadpacket.__name__, args[0] if args else None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            self.found["sent"] += name in ("to", "_to_copy") and str(kwargs.get("device")) == "meta"
            return func(*args, **kwargs)
        self.seen.add(name)
        self.n_done += 1
        if name in ("item", "_local_scalar_dense"):
            self.found["read"] += 1
            return 1
        if name in ("to", "_to_copy") and str(kwargs.get("device")) == "cpu":
            self.found["read"] += not kwargs.get("non_blocking")
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        indices = [each for each in tensors[1:] if name.startswith("index") and not each.is_floating_point()]
        self.found["asked"] += name in ("nonzero", "masked_select") or any(i.dtype == torch.bool for i in indices)
        self.found["sent"] += name == "copy_" and not args[1].is_meta or any(not index.is_meta for index in indices)
        return func(*args, **kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Inside a test this rank's device is a GPU without values."""
    parallel.start()
    monkeypatch.setattr(parallel, "device", lambda: GPU)
    for module in (parallel, attention):
        monkeypatch.setattr(module, "to_device", lambda x: torch.empty(x.shape, dtype=x.dtype, device=GPU))
    for table in (forward.CHUNK_BYTES, forward.SOFTMAX_BYTES):
        monkeypatch.setitem(table, "meta", table["cuda"])
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
    with Waits() as counting:

        class Event:
            """Waiting for it costs nothing as long as the device has been given more to do since."""

            def record(self) -> None:
                self.n_done = counting.n_done

            def synchronize(self) -> None:
                counting.found["idle"] += counting.n_done == self.n_done

        monkeypatch.setattr(torch.cuda, "Event", Event)
        yield counting


def model(value_head: bool = False, **changes: int) -> Decoder:
    config = dataclasses.replace(load.solver_to_verifier(CONFIG) if value_head else CONFIG, **changes)
    with torch.device(GPU):
        return Decoder(config, torch.bfloat16)


def rows(*lengths: int) -> list[Encoded]:
    return [Encoded([1 + place % 50 for place in range(n)], 3, targets=(1.0,) * (n - 3)) for n in lengths]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_waits_once_a_step(waits: Waits, tmp_path: Path, packing: bool, lora: bool) -> None:
    solver = model()
    load.put_lora_on(solver, load.lora_config(LoraFlags(lora_rank=4)) if lora else None, 1)
    trainer = Trainer(solver, RunLog(str(tmp_path), {}), OptimizerFlags(), total_steps=3)
    waits.found.clear()
    for batch in (make_batch(rows(9, 14, 5), packing=packing), make_batch(rows(20, 7), packing=packing)):
        trainer.backward(sft_loss(solver, batch))
    assert not waits.found.total()
    trainer.step()
    assert +waits.found == {"read": 1}  # loss and norm of the gradient


WAYS: dict[str, tuple[bool, Callable[[Decoder], Tensor]]] = {
    "log-probs": (False, lambda solver: response_logprobs(solver, *make_batch(rows(9, 6)).inputs)),
    "values": (True, lambda critic: response_values(critic, *make_batch(rows(9, 6)).inputs)),
    "scores": (True, lambda verifier: response_scores(verifier, *make_batch(rows(9, 6), packing=True).inputs)),
    "pairs": (True, lambda verifier: PairwiseObjective().loss(verifier, make_batch(rows(9, 6)))),
    "labels": (True, lambda verifier: LabelObjective().loss(verifier, make_batch(rows(9, 6), with_targets=True))),
    "responses": (False, lambda solver: KTO(beta=0.1).loss(solver, judged())[0]),
    "preferences": (False, lambda solver: Preference(objective="dpo", beta=0.1).loss(solver, pairs())[0]),
}


def judged() -> Batch:
    return make_batch(rows(9, 6), with_targets=True)._replace(reference=torch.zeros(2))


def pairs() -> Batch:
    return pack_shared([tuple(rows(9, 6))])._replace(reference=torch.zeros(2))


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_scores_wait_for_nothing(waits: Waits, way: str) -> None:
    value_head, compute = WAYS[way]
    solver = model(value_head)
    waits.found.clear()
    compute(solver).sum().backward()
    assert not waits.found.total(), waits.found


@pytest.mark.parametrize(("size", "fits"), [(8, True), (12, False)])
def test_packed_samples_go_to_the_kernel_where_it_takes_their_heads(waits: Waits, size: int, fits: bool) -> None:
    solver = model(head_dim=size)
    sft_loss(solver, make_batch(rows(9, 14, 5), packing=True)).backward()
    assert ("_varlen_attn" in waits.seen) == fits


class FixedStep(EagerStep):
    """What a CUDA graph records, computed for all slots."""

    def __init__(self, solver: Decoder, n_slots: int) -> None:
        self.model, self.cache = solver, FixedCache(n_slots)


@pytest.mark.parametrize("kind", [EagerStep, FixedStep])
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [({"temperature": 0.0}, 0), ({}, 0), ({"top_k": 5}, 0), ({"top_p": 0.5}, 1)],
    ids=["greedy", "all", "top_k", "top_p"],
)
def test_a_gpu_decodes_on_while_its_tokens_are_read(
    waits: Waits, monkeypatch: pytest.MonkeyPatch, kind: type[EagerStep], sampling: dict[str, float], expected: int
) -> None:
    monkeypatch.setattr(engine, "make_step", lambda solver, n_slots, compiled: kind(solver, n_slots))
    requests = [Request(str(row), 0, [1, 2, 3]) for row in range(3)]
    solver, counted = model(), []
    waits.found.clear()
    for n in (4, 9):
        asked = Sampling(max_new_tokens=n, **{"temperature": 1.0} | sampling)
        list(generate(solver, requests, asked, vocabulary=Vocabulary((), 61, str), max_batch_size=3))
        counted.append(waits.found.total())
        waits.found.clear()
    assert counted[1] - counted[0] == 5 * expected
