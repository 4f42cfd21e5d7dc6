"""Where samples come from: the model that wrote them and the rules that found their answers."""

from pathlib import Path
from typing import NamedTuple

from src.checkpoint import storage
from src.errors import UserError
from src.evaluation.evaluator import identity_file
from src.jsonfile import read_json, write_json


class Provenance(NamedTuple):
    """The model's fingerprint, or its name at a server, and the rules of results.json."""

    model: str
    rules: dict[str, str]


def read_provenance(file: str, model: str = "") -> Provenance:
    """The provenance of graded samples, or of a file made from them.

    model: the checkpoint directory, or the name at a server, that it must be of; empty: any. Raises UserError for
    another model, and for samples that nobody can tell the provenance of.
    """
    path = Path(file)
    if not identity_file(path).is_file():
        raise UserError(f"{file} has no {identity_file(path).name} beside it, so its model is unknown; expected "
                        "samples in the directory where solver_evaluate.py sampled them, or a file of data_build.py")
    values = read_json(identity_file(path))
    rules = values.get("rules") or read_json(path.with_name("results.json")).get("rules")
    if not isinstance(rules, dict) or not rules.get("extraction"):
        raise UserError(f"{file} is not graded; grade it with solver_evaluate.py, so that answers can be compared")
    found = str(values.get("checkpoint") or values.get("model_name"))
    wanted = storage.fingerprint(Path(model)) if Path(model).is_dir() and model else model
    if wanted and found != wanted:
        raise UserError(f"{file} was sampled from the model {found[:16]}, but {model} is {wanted[:16]}; give the "
                        f"samples of {model}")
    return Provenance(found, rules)


def same_rules(first: str, one: Provenance, second: str, other: Provenance) -> dict[str, str]:
    """The rules that found the answers of both files. Raises UserError where they differ."""
    if one.rules != other.rules:
        named = [", ".join(each.rules.values()) for each in (one, other)]
        raise UserError(f"{first} was graded by {named[0]} and {second} by {named[1]}, so their answers cannot be "
                        "compared; grade both with one --task")
    return one.rules


def write_provenance(file: str, provenance: Provenance) -> None:
    """Write a file's provenance next to it."""
    write_json(identity_file(Path(file)), {"checkpoint": provenance.model, "rules": provenance.rules})
