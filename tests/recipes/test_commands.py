"""Every command that a recipe starts is one that its script takes, with flags that go together."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from src.command.flags import bind, parse

ROOT = Path(__file__).parents[2]


def started(folder: Path, recipe: str, *words: str, **variables: str) -> list[list[str]]:
    """What a recipe starts, one list of words each: its stages run with programs that write down their words."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "recipes" / "stage.sh").write_text('stage() { shift 2; "$@"; }\nbegin() { mkdir -p "$1"; }\n')
    (folder / "recipes" / "environment.sh").write_text('cd "$(dirname "$0")/.."; export PATH="$PWD/bin:$PATH"\n')
    (folder / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = folder / "bin" / name
        # in one go: jobs run side by side
        program.write_text(f'#!/bin/bash\nline=$(printf "%q " {name} "$@"); echo "$line" >> "$PWD/started"; echo 2\n')
        program.chmod(0o755)
    subprocess.run(["bash", folder / "recipes" / recipe, *words], check=True, cwd=folder, env=os.environ | variables,
                   capture_output=True)
    return [shlex.split(line) for line in (folder / "started").read_text().splitlines()]


def script_of(words: list[str]) -> str:
    """The script at the root that a command starts; empty for one of a folder, or none."""
    script = next((word for word in words if word.endswith(".py")), "")
    return script.removesuffix(".py") if "/" not in script else ""


def check(commands: list[list[str]]) -> None:
    """Make the config of each command, which refuses what it does not take."""
    for words in commands:
        if script := script_of(words):
            flags, module = words[words.index(f"{script}.py") + 1 :], importlib.import_module(script)
            main = module.main if hasattr(module, "main") else module.COMMANDS[flags.pop(0)]
            bind(main, parse(main, flags))


def in_header(recipe: str) -> dict[str, str]:
    """The variables of the example in a recipe's header."""
    text = (ROOT / "recipes" / f"{recipe}.sh").read_text()
    example = re.search(r"((?:^#   .*\n)*^#   .*bash recipes/\w+\.sh$)", text, re.MULTILINE)[1]
    words = shlex.split(re.sub(r"^#|\\\n", "", example, flags=re.MULTILINE))
    return dict(word.split("=", 1) for word in words if word[0].isupper())


CASES: list[tuple[str, str, dict[str, str]]] = [
    *((name, "", {}) for name in ("quick_start", "ppo_toy", "revision", "new_problems")),
    *((name, "", variables) for name in ("easy_to_hard", "weak_to_strong", "step_controlled_dpo")
      for variables in ({}, in_header(name))),
    *(("easy_to_hard", f"--improve {how}", {}) for how in ("dpo", "rest_em", "ppo")),
    ("step_controlled_dpo", "", {"FORM": "code"}),
]


@pytest.mark.parametrize(("recipe", "words", "variables"), CASES)
def test_every_command_of_a_recipe_is_taken_by_its_script(
    recipe: str, words: str, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/easy_to_hard/seed-1").mkdir(parents=True)  # in which --improve links to what is there
    commands = started(tmp_path, f"{recipe}.sh", *words.split(), **{"SEEDS": "1"} | variables)
    assert len(list(filter(None, map(script_of, commands)))) >= 9
    monkeypatch.chdir(ROOT)  # of the presets
    check(commands)
