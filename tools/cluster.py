"""What models would take on a cluster of nodes of 8 GPUs, computed from their sizes alone: memory and network.

python -m tools.cluster llama-2-7b llama-2-13b llama-2-70b
shows what each GPU of tensor-parallel 8 x data-parallel 1 .. 64 would hold of these, trained on packs of 4096 tokens,
and what a node would send in a step, within it and to others, with a model shared by all GPUs or a replica on each
node (--replicas).
"""

import sys
from collections.abc import Sequence

from src import runlog
from src.checkpoint.foreign_config import released_config
from src.command import cli
from src.errors import UserError
from src.models.lora import LINEARS, LoraConfig
from src.planning.memory import FLOAT32, Training, local_parameters, training_memory

GROUPS = (1, 2, 4, 8, 16, 32, 64)
GPUS, TOKENS, PASSES = 8, 4096, 4  # of a node, of a forward pass, and passes in a step
CARD_BYTES = 75 * 2**30  # that a card of 80 GB leaves to tensors: CUDA, NCCL and holes between blocks take the rest


def cluster(model_types: Sequence[str]) -> str:
    """GiB on each GPU by model and number of data-parallel groups of 8 ranks; a star: does not fit a card of 80 GB.
    Packs of 4096 tokens, all supervised, blocks computed again; LoRA of rank 16 on all linears of a bfloat16 base."""
    lora = LoraConfig(rank=16, alpha=16.0, dropout=0.0, targets=LINEARS)
    lines = [f"{f'GiB a GPU, tp {GPUS} x dp':24}" + "".join(f"{groups:>8}" for groups in GROUPS)]
    for model_type in model_types:
        config = released_config(model_type, TOKENS)
        for name, how in (("full", Training()), ("LoRA", Training(lora, "bfloat16"))):
            row = f"{model_type + ' ' + name:24}"
            for groups in GROUPS:
                how = how._replace(checkpointing="full", data_parallel=groups, on_gpu=True, half=True)
                held = sum(training_memory(config, GPUS, TOKENS, how).values())
                row += f"{f'{held / 2**30:.1f}' + '*' * (held > CARD_BYTES):>8}"
            lines.append(row)
    return "\n".join(lines)


def traffic(model_types: Sequence[str]) -> str:
    """GB that a node sends in a step, within it / to others, by model and number of nodes, shared over all GPUs or over
    those of each node (--replicas NODES). A ring joins the ranks that share, and leaves a node once; weights are
    gathered in bfloat16 twice a pass, for it and its gradient, and gradients sent once in float32."""
    lines = [f"{f'GB a step, {PASSES} passes':24}" + "".join(f"{f'{nodes} nodes':>16}" for nodes in GROUPS)]
    for model_type in model_types:
        size = local_parameters(released_config(model_type, TOKENS), 1)
        for name in ("shared", "replicas"):
            row = f"{model_type + ' ' + name:24}"
            for nodes in GROUPS:
                ranks = GPUS * nodes if name == "shared" else GPUS
                link = (2 * 2 * PASSES + FLOAT32) * size * (ranks - 1) / ranks  # of the ring, from a rank to the next
                out = link * (nodes > 1) if name == "shared" else 0.0
                within = GPUS * link - out
                if name == "replicas":  # each GPU's part of the gradients, summed over the nodes by a ring
                    out = 2 * FLOAT32 * size * (nodes - 1) / nodes
                row += f"{f'{within / 1e9:,.0f} / {out / 1e9:,.0f}':>16}"
            lines.append(row)
    return "\n".join(lines)


def main(model_types: Sequence[str]) -> None:
    """Show both tables of the models. Raises UserError for none, and for one that is not known."""
    if not model_types:
        raise UserError("found no model; expected names of released ones: python -m tools.cluster llama-2-7b ...")
    runlog.table(f"{cluster(model_types)}\n\n{traffic(model_types)}")


if __name__ == "__main__":
    cli.guarded(lambda: main(sys.argv[1:]))
