"""Put layers on top of a base checkpoint that change nothing yet, for the verifiers of recipes/easy_to_hard.sh.

python dataset/toy/make_deep.py --base_dir dataset/toy/base --save_dir runs/deep --layers 6

A model knows the next digit of a sum in its last layers alone; to compare it with the digit that is there, which is
what a verifier does, it needs layers behind those. Their outputs start at zero, as those of adapters do.
"""

import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # a script's own folder is on the path, the repository is not

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from dataset.toy.make_small import write_checkpoint  # noqa: E402
from src.command import cli  # noqa: E402
from src.errors import UserError  # noqa: E402

OUTPUTS = ("o_proj.weight", "down_proj.weight")  # what a layer adds to the stream


def main(base_dir: str, save_dir: str, layers: int) -> None:
    """Write a checkpoint of a base with more layers.

    base_dir: Hugging Face directory of a Llama in one safetensors file
    save_dir: directory for the checkpoint, one shard
    layers: how many layers it is to have
    """
    base = Path(base_dir)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    n_layers = config["num_hidden_layers"]
    if layers <= n_layers:
        raise UserError(f"--layers is {layers}, but {base_dir} has {n_layers}; expected more")
    tensors = load_file(base / "model.safetensors")
    for layer in range(n_layers, layers):
        tensors |= silent_layer(tensors, n_layers - 1, layer)
    write_checkpoint(base, config | {"num_hidden_layers": layers}, tensors, save_dir)


def silent_layer(tensors: dict[str, Tensor], source: int, layer: int) -> dict[str, Tensor]:
    """The tensors of layer `source` under the names of layer `layer`, its outputs zero."""
    start = f"model.layers.{source}."
    copied = {
        name.replace(start, f"model.layers.{layer}."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    return {name: tensor.zero_() if name.endswith(OUTPUTS) else tensor for name, tensor in copied.items()}


if __name__ == "__main__":
    cli.run(main)
