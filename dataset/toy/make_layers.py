"""Make a model of fewer or of more layers of a base checkpoint.

python dataset/toy/make_layers.py --base_dir dataset/toy/base --save_dir runs/weak --layers 3

Of fewer: the last ones are left out, for the weak model of recipes/weak_to_strong.sh. Unlike a model that is small from
birth it costs nothing to make, and what it forgets for want of depth is another thing from what the whole model does
not know.

Of more: copies of the last one, which change nothing yet, for the verifiers of recipes/easy_to_hard.sh. A model knows
the next digit of a sum in its last layers alone; to compare it with the digit that is there, which is what a verifier
does, it needs layers behind those. Their outputs start at zero, as those of adapters do.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is on the path, the repository is not

from src.checkpoint.shards import expected_shapes, layer_of  # noqa: E402
from src.checkpoint.sources import open_source  # noqa: E402
from src.checkpoint.split import split  # noqa: E402
from src.command import cli  # noqa: E402
from src.errors import UserError  # noqa: E402

OUTPUTS = ("wo.weight", "w2.weight")  # what a layer adds to the stream


def main(base_dir: str, save_dir: str, layers: int) -> None:
    """Write a checkpoint of a base with another number of layers.

    base_dir: checkpoint in any form
    save_dir: directory for the checkpoint, one shard
    layers: how many layers it is to have
    """
    base = open_source(base_dir)
    last = base.config.n_layers - 1
    if layers < 1 or layers == last + 1:
        raise UserError(f"--layers is {layers}, but {base_dir} has {last + 1}; expected fewer, at least 1, or more")
    config, tensors = dataclasses.replace(base.config, n_layers=layers), {}
    for name in expected_shapes(config):
        layer = layer_of(name) or 0
        source = base.tensors[name.replace(f"layers.{layer}.", f"layers.{min(layer, last)}.")]
        silent = layer > last and name.endswith(OUTPUTS)
        tensors[name] = source.then(torch.zeros_like) if silent else source
    split(base._replace(config=config, tensors=tensors), Path(save_dir), 1, base_dir)


if __name__ == "__main__":
    cli.run(main)
