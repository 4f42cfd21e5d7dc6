"""Make a smaller model of a base checkpoint by leaving out its last layers: the weak one of recipes/weak_to_strong.sh.

python dataset/toy/make_small.py --base_dir dataset/toy/base --save_dir runs/weak --layers 3

Unlike a model that is small from birth it costs nothing to make, and what it forgets for want of depth is another thing
from what the whole model does not know.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # a script's own folder is on the path, the repository is not

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import checkpoint_split  # noqa: E402
from src.command import cli  # noqa: E402
from src.errors import UserError  # noqa: E402


def main(base_dir: str, save_dir: str, layers: int) -> None:
    """Write a checkpoint of the first layers of a base.

    base_dir: Hugging Face directory of a Llama in one safetensors file
    save_dir: directory for the checkpoint, one shard
    layers: how many layers stay
    """
    base = Path(base_dir)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if not 0 < layers < config["num_hidden_layers"]:
        raise UserError(f"--layers is {layers}, but {base_dir} has {config['num_hidden_layers']}; expected fewer")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if layer_of(name) < layers}
    write_checkpoint(base, config | {"num_hidden_layers": layers}, kept, save_dir)


def write_checkpoint(base: Path, config: dict[str, object], tensors: dict[str, Tensor], save_dir: str) -> None:
    """A checkpoint of one shard from a Hugging Face config and tensors, with the tokenizer of a base."""
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch)
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        (changed / "config.json").write_text(json.dumps(config))
        shutil.copy(base / "tokenizer.model", changed)
        checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(changed), save_path=save_dir))


def layer_of(name: str) -> int:
    """The layer that a tensor of a Hugging Face Llama belongs to; -1 for those outside of all."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


if __name__ == "__main__":
    cli.run(main)
