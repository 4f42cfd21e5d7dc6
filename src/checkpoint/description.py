"""What describes the model of a checkpoint, and whether its counts can be true of the weights."""

import re
from collections.abc import Mapping
from pathlib import Path

from src.checkpoint.weight_files import OpenedFile
from src.errors import UserError
from src.jsonfile import read_json
from src.models.config import refuse_infinities
from src.models.foreign import family_of

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_EXPERTS_STACKED = re.compile(r"\.experts\.\w+_stacked")


def read_descriptions(folder: Path, config_file: str) -> dict[str, dict[str, object]]:
    """What describes the model, by file: the one named, or params.json and config.json as far as they are there.

    Raises UserError for a family that is not supported, and for numbers that are none.
    """
    candidates = [Path(config_file)] if config_file else [folder / "params.json", folder / "config.json"]
    found = {str(path): read_json(path) for path in candidates if config_file or path.is_file()}
    for described, values in found.items():
        refuse_infinities(values, described)
        if "model_type" in values and "dim" not in values:
            family_of(values, described)
    return found


def choose_description(
    found: dict[str, dict[str, object]], folder: Path, file: OpenedFile, hf: bool
) -> tuple[str, dict[str, object]]:
    """Where the model is described, and the description as it stands there."""
    if found:
        # tensors under Hugging Face's names go by config.json, as in transformers
        return list(found.items())[-1 if hf else 0]
    if file.params is not None:
        described = f"{file.path} (model_args)"
        refuse_infinities(file.params, described)
        return described, file.params
    raise UserError(f"{folder} has neither params.json nor config.json; name one with --config_file")


def check_counts(values: dict[str, object], shapes: Mapping[str, tuple[int, ...]], described: str) -> None:
    """Raise UserError where a description counts more layers or experts than the weights hold.

    Whatever is as large as these numbers say comes after this.
    """
    layers = {found[1] for name in shapes if (found := _LAYER.match(name))}
    experts = {found[1] for name in shapes if (found := _EXPERT.search(name))}
    stacked = [shape[0] for name, shape in shapes.items() if _EXPERTS_STACKED.search(name) and shape]
    held = {
        **dict.fromkeys(("n_layers", "num_hidden_layers"), ("layers", len(layers))),
        **dict.fromkeys(
            ("n_experts", "num_experts", "num_local_experts"), ("experts", max([len(experts), *stacked]))
        ),
    }
    meta_experts = values.get("moe")
    for key, value in (values | (meta_experts if isinstance(meta_experts, dict) else {})).items():
        if key in held and type(value) is int and value > held[key][1]:
            raise UserError(f"{described}: {key}={value}, but the weights hold {held[key][1]} {held[key][0]}")
