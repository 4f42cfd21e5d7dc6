"""Imports flow down, and every third-party library has one door. The rules are the tables at the top."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}

# A room of src/ -> the rooms it may import. src/errors.py and src/jsonfile.py above it are for everyone.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "jsonfile": set(),
    "command": {"processes"},
    "plot": set(),
    "processes": set(),
    "trackers": set(),
    "runlog": {"command", "plot", "processes", "trackers"},
    "losses": set(),
    "context_parallel": set(),
    "parallel": {"context_parallel", "processes"},
    "text": {"processes"},
    "models": {"context_parallel", "parallel"},
    "checkpoint": {"models", "parallel", "runlog", "text"},
    "data": {"text"},
    "load": {"checkpoint", "command", "models", "parallel", "runlog", "text"},
    "inference": {"models", "parallel", "text"},
    "grading": {"processes", "text"},
    "code_solutions": {"inference", "parallel", "processes", "text"},
    "evaluation": {
        "code_solutions", "command", "data", "grading", "inference", "models", "parallel", "runlog", "text"
    },
    "serving": {"command", "data", "evaluation", "inference", "models", "parallel", "runlog", "text"},
    "report": {"command", "data", "evaluation", "grading", "runlog"},
    "construct": {
        "checkpoint", "code_solutions", "command", "data", "evaluation", "grading", "inference", "load",
        "models", "parallel", "runlog", "serving", "text",
    },
    "training": {
        "checkpoint", "code_solutions", "command", "context_parallel", "data", "evaluation", "grading", "inference",
        "load", "losses", "models", "parallel", "processes", "runlog", "serving", "text", "trackers",
    },
    "planning": {
        "checkpoint", "command", "data", "load", "models", "parallel", "processes", "runlog", "text", "training",
    },
}

# What src/ and the scripts may import from outside, and where alone; None = anywhere.
DOORS: dict[str, str | set[str] | None] = {
    "torch": None,
    "numpy": None,
    "torch.distributed": {"src/parallel.py", "src/context_parallel.py"},
    "torch.save": "src/checkpoint/tensor_files.py",
    "torch.load": "src/checkpoint/tensor_files.py",
    "fairscale": None,
    "fairscale.nn.model_parallel.initialize": "src/parallel.py",
    "fairscale.nn.model_parallel.mappings": "src/parallel.py",
    "fairscale.nn.model_parallel.layers": "src/models/layers.py",
    "tools": "checkpoint_split.py",  # --certify
    "fire": "src/command/cli.py",
    "yaml": "src/command/flags.py",
    "huggingface_hub": "src/command/hub.py",
    "datasets": None,  # also the word for what is trained on
    "datasets.load_dataset": "src/command/hub.py",
    "tqdm": "src/runlog.py",
    "wandb": "src/trackers.py",
    "trackio": "src/trackers.py",
    "torchao": "src/training/optimizers.py",
    "safetensors": "src/checkpoint/tensor_files.py",
    "blake3": "src/checkpoint/tensor_files.py",
    "gguf": "src/checkpoint/gguf.py",
    "matplotlib": "src/plot.py",
    "pyarrow": "src/data/rows.py",
    "httpx2": "src/serving/server_client.py",
    "sentencepiece": None,
    "sentencepiece.SentencePieceProcessor": "src/text/vocabulary.py",
    "sentencepiece.sentencepiece_model_pb2": {"src/text/vocabulary.py", "src/text/gguf_tokenizer.py"},
    "tiktoken": "src/text/vocabulary.py",
    "tokenizers": "src/text/vocabulary.py",
    # templates of strangers are rendered in a process that can be killed
    "jinja2": "src/text/chat_worker.py",
    # answers of a model meet the equality library in a process that can be killed
    "math_verify": "src/grading/worker.py",
    "latex2sympy2_extended": "src/grading/worker.py",
    "sympy": "src/grading/worker.py",
}

# Names that write to the terminal, and the files that may use them; the workers' output is a pipe.
SPEAKERS: dict[str, set[str]] = {
    "print": set(),
    "sys.stdout": {"src/code_solutions/worker.py", "src/command/cli.py"},
    "sys.stderr": {"src/errors.py", "src/command/cli.py", "src/runlog.py", "src/trackers.py"},
}

FILES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("*.py")])


class Use(NamedTuple):
    """A dotted name that a file imports or spells out, and the line."""

    name: str
    line: int


def imports(tree: ast.Module) -> Iterator[Use]:
    """Every imported module, or module.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Use(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it from src"
            yield from (Use(f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def spelled(tree: ast.Module) -> Iterator[Use]:
    """Every bare name, and every dotted name such as torch.load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield Use(node.id, node.lineno)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield Use(f"{node.value.id}.{node.attr}", node.lineno)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_the_rules_are_a_hierarchy() -> None:
    settled: set[str] = set()
    while left := MAY_IMPORT.keys() - settled:
        lowest = {room for room in left if MAY_IMPORT[room] <= settled}
        assert lowest, f"these may import each other in a circle: {', '.join(sorted(left))}"
        settled |= lowest


def test_every_room_has_a_rule_and_every_rule_a_room() -> None:
    rooms = {path.stem for path in (ROOT / "src").iterdir() if not path.name.startswith("_")}
    assert rooms == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rules(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    room = path.relative_to(ROOT / "src").parts[0].removesuffix(".py") if place.startswith("src/") else None
    for name, line in imports(parse(path)):
        top, *rest = name.split(".")
        assert top not in SCRIPTS, f"{place}:{line} imports the entry script {top}"
        if top == "src":
            allowed = {room, "errors", "jsonfile"} | MAY_IMPORT[room] if room else MAY_IMPORT.keys()
            assert rest[0] in allowed, f"{place}:{line}: {room} may not import {rest[0]}"
        elif top not in sys.stdlib_module_names:
            assert top in DOORS, f"{place}:{line} imports {top}, which no table allows"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_door_and_few_speakers(path: Path) -> None:
    place, tree = str(path.relative_to(ROOT)), parse(path)
    for name, line in (*imports(tree), *spelled(tree)):
        for module, door in DOORS.items():
            assert door in (None, place) or place in door or not is_under(name, module), (
                f"{place}:{line}: {module} belongs in {door}"
            )
        for speaker, allowed in SPEAKERS.items():
            assert place in allowed or not is_under(name, speaker), f"{place}:{line} uses {speaker}"


def test_no_file_of_ours_shadows_the_standard_library() -> None:
    for path in FILES:
        assert path.stem not in sys.stdlib_module_names, path


@pytest.mark.parametrize("path", sorted(ROOT.glob("[bdrt]*/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_beside_src_name_what_is_there(path: Path) -> None:
    """Benchmarks, recipes and tools are seldom run; a name of src/ that has moved must not wait for that."""
    tree, modules = parse(path), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "src":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    modules[name] = importlib.import_module(f"{node.module}.{name}")
                elif isinstance(getattr(module, name), type(ast)):
                    modules[name] = getattr(module, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{path}:{node.lineno}: {node.value.id}.{node.attr}"
