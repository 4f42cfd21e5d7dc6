"""--compile: the blocks of a model compiled, for rows of any lengths; their graphs run without a compiler of C++."""

import functools
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src import load, parallel
from src.command.config import LoraFlags, OptimizerFlags, Recomputed
from src.data.batch import make_batch
from src.data.encoding import Encoded
from src.inference.engine import Request, Vocabulary, generate
from src.inference.sampling import Sampling
from src.models.config import ModelConfig
from src.models.decoder import Decoder
from src.runlog import RunLog
from src.training.sft import n_supervised, sft_loss
from src.training.trainer import Trainer

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=61,
                     max_seq_len=128)
LENGTHS = ((9, 14, 5), (20, 7), (30,), (4, 5, 6, 7, 8))


def trained(
    folder: Path, dtype: torch.dtype, lora: bool, recomputed: Recomputed, compiled: bool
) -> tuple[list[float], list[int]]:
    """The losses of a packed step for each of LENGTHS, and a greedy text of the model that learnt them."""
    torch.manual_seed(1)
    model = Decoder(CONFIG, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    load.put_lora_on(model, load.lora_config(LoraFlags(lora_rank=4)) if lora else None, 1)
    flags = OptimizerFlags(lr=1e-2, activation_checkpointing=recomputed, compile=compiled)
    trainer = Trainer(model.train(), RunLog(str(folder), {}), flags, total_steps=len(LENGTHS))
    losses = []
    for lengths in LENGTHS:
        batch = make_batch([Encoded([(7 * n + place) % 61 for place in range(n)], 2) for n in lengths], packing=True)
        # from the second step on other lengths must be other rows for the same graphs
        with torch.compiler.set_stance("fail_on_recompile" if losses else "default"):
            trainer.backward(sft_loss(model, batch) / n_supervised([batch]))
        losses.append(trainer.step().loss)
    (found,) = generate(model, [Request("", 0, [1, 2, 3])], Sampling(max_new_tokens=8),
                        vocabulary=Vocabulary((), 61, str), max_batch_size=1)
    return losses, found.tokens


@pytest.mark.parametrize(
    ("dtype", "lora", "recomputed"),
    [
        (torch.float32, False, "none"),
        (torch.float32, True, "full"),
        (torch.float32, False, "selective"),
        (torch.bfloat16, True, "none"),
    ],
    ids=str,
)
def test_compiled_blocks_learn_what_eager_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lora: bool, recomputed: Recomputed
) -> None:
    parallel.start()
    graphs = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, options: graphs(forward, dynamic=dynamic))
    torch.compiler.reset()
    eager = trained(tmp_path, dtype, lora, recomputed, False)
    compiled = trained(tmp_path, dtype, lora, recomputed, True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(compiled[0], eager[0], rtol=tolerance, atol=tolerance)
    assert dtype == torch.bfloat16 or compiled[1] == eager[1]
