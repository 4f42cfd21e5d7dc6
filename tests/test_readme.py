"""README and dataset/README stay true: their commands parse, their files exist."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dataset.prepare import BUILDERS
from src.command.flags import flags_of, parse

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def commands(path: Path) -> list[list[str]]:
    """The words of every python and torchrun command in a text's code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [shlex.split(line) for line in lines if line.startswith(("python ", "torchrun "))]


def docstring_commands() -> list[list[str]]:
    """The commands in the header of every entry script."""
    found = []
    for name in SCRIPTS:
        header = importlib.import_module(name).__doc__.replace("\\\n", " ")
        found += [
            shlex.split(line) for line in header.split("\n") if line.startswith(("python ", "torchrun "))
        ]
    return found


def quick_start_commands() -> list[list[str]]:
    """Every start of a script in the quick start, its shell functions written out."""
    text = (ROOT / "recipes" / "quick_start.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    sample = re.search(r"^sample\(\) \{ (python .*?) \"\$@\"; \}$", text, re.MULTILINE)[1]
    text = re.sub(r"^(\s*)sample ", rf"\1{sample} ", text, flags=re.MULTILINE)
    calls = re.findall(r"(?:python|two) (?!recipes)(\w+\.py [^;}\n]*)", text.replace('"$@"', ""))
    return [["python", *shlex.split(call)] for call in calls if "_dir" in call or "_file" in call]


def easy_to_hard_commands() -> list[list[str]]:
    """Every start of a script in the easy-to-hard recipe and in what improves its solvers, with the defaults of its
    variables, for each verifier."""
    texts = [(ROOT / "recipes" / f"{name}.sh").read_text(encoding="utf-8") for name in ("easy_to_hard", "improve")]
    text = "\n".join(texts).replace("\\\n", " ")
    values = dict(re.findall(r"(\w+)=\$\{\w+:-([^}]*)\}", text))
    sample = re.search(r'sample\(\) \{ many (.*?) "\$@"; \}', text)[1]
    text = re.sub(r" sample --", f" many {sample} --", text)
    calls = re.findall(r"(?:many|python) (?!recipes)(\w+\.py --[^;}\n]*|data_build\.py [^;}\n]*)", text)
    calls = [
        call.replace("$files", files) for files in re.findall(r'files="(.*?)"', text) for call in calls
    ]
    calls = [call for call in dict.fromkeys(calls) if "$@" not in call]  # the definition of sample itself
    filled = [re.sub(r"\$(\w+)", lambda name: values.get(name[1], "1"), call) for call in calls]
    return [["python", *shlex.split(call)] for call in filled]


ALL_COMMANDS = (
    commands(ROOT / "README.md") + docstring_commands() + quick_start_commands() + easy_to_hard_commands()
)


def test_every_script_has_a_command_in_its_header_and_in_readme() -> None:
    for found in (docstring_commands(), commands(ROOT / "README.md")):
        named = {word.removesuffix(".py") for words in found for word in words if word.endswith(".py")}
        assert named >= set(SCRIPTS)


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_parse_against_the_scripts_they_start(words: list[str]) -> None:
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place].removesuffix(".py"), words[place + 1 :]
    assert script in SCRIPTS
    module = importlib.import_module(script)
    main = module.main if hasattr(module, "main") else module.COMMANDS[flags.pop(0)]
    required, parsed = {flag.name for flag in flags_of(main).values() if flag.required}, parse(main, flags)
    assert required <= set(parsed)
    files = [value for name, value in parsed.items() if name.endswith("_file") and isinstance(value, str)]
    assert not any("," in file for file in files)  # one word is one file; several are several words


def test_prepare_commands_name_its_tasks() -> None:
    found = commands(ROOT / "dataset" / "README.md")
    assert {tuple(words[:2]) for words in found} == {("python", "dataset/prepare.py")}
    assert {words[2] for words in found} == set(BUILDERS)


def test_the_tree_names_every_script_module_and_room() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Read it", 1)[1]
    rooms = [f"{path.parent.name}/" for path in ROOT.glob("src/*/__init__.py")]
    files = [path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("src/*.py")] if path.stem != "__init__"]
    for name in rooms + files:
        assert re.search(rf"(^|  ){re.escape(name)}\s", tree, re.MULTILINE), name


def test_what_readme_says_of_the_size_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Read it", 1)[1].split("```", 1)[0]
    said = [int(number.replace(",", "")) for number in re.findall(r"([\d,]*\d{2,})", text.split("In this order")[0])]
    algorithms = [ROOT / name for name in re.findall(r"`([\w/]+\.py)`", text)]
    code = [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py")]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in code}
    counted = sum(lines[path] for path in algorithms)
    for number, true in zip(said, (counted, len(algorithms), sum(lines.values()) - counted), strict=True):
        assert abs(number - true) <= 0.05 * true, f"README says {number}, it is {true}"


def test_ci_runs_the_test_command_of_readme_and_nothing_else() -> None:
    lines = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert lines == ['exec bash "$(dirname "$0")/../recipes/test.sh"']
    assert "bash recipes/test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_clone_holds_no_links() -> None:
    """A link to a developer's own environment would take the place of the one that README's commands make."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git clone")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
