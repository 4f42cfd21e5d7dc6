"""README, docs/ and dataset/README stay true: their commands parse, their files, functions and examples exist."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dataset.prepare import BUILDERS
from src.command.flags import bind, flags_of, parse
from src.data.examples import Prompt
from src.grading.tasks import find_task
from src.training.user_reward import UserReward

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
SCRIPTS_NAMED = {f"{name}.py" for name in SCRIPTS}
DOCS = sorted((ROOT / "docs").glob("*.md"))


# of commands that are no entry scripts: cli.py's own, recipes', dataset/prepare.py's, torchrun's
OTHER_FLAGS = "help config fresh improve levels level_file strict say_answer hide_answers raw_file".split()
OTHER_FLAGS += "nproc_per_node N model run nnodes max_restarts shutdown_timeout rdzv_conf node_rank master_addr".split()


def blocks(path: Path, language: str = r"\w*") -> list[str]:
    """The code blocks of a text, of one language or all."""
    text = path.read_text(encoding="utf-8")
    return [block for _, block in re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)]


def commands(path: Path, *programs: str) -> list[list[str]]:
    """The words of every command of these programs in a text's code blocks, continued lines joined."""
    lines = "\n".join(blocks(path)).replace("\\\n", " ").split("\n")
    starts = [line for line in map(str.strip, lines) if line.startswith(("python ", "torchrun ", "bash "))]
    words = [shlex.split(line, comments=True) for line in starts]
    return [line for line in words if line[0] in (programs or ("python", "torchrun"))]


def doc_commands() -> list[list[str]]:
    """The starts of entry scripts in docs/ and RESULTS.md, with 1 for a variable of the shell."""
    found = [words for path in (*DOCS, ROOT / "benchmarks" / "RESULTS.md") for words in commands(path)]
    return [[re.sub(r"\$\w+", "1", word) for word in words] for words in found if SCRIPTS_NAMED & set(words)]


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
    + doc_commands()
)


def test_every_script_has_a_command_in_its_header_and_in_readme() -> None:
    for found in (docstring_commands(), commands(ROOT / "README.md")):
        named = {word.removesuffix(".py") for words in found for word in words if word.endswith(".py")}
        assert named >= set(SCRIPTS)


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_are_taken_by_the_scripts_they_start(words: list[str]) -> None:
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place].removesuffix(".py"), words[place + 1 :]
    assert script in SCRIPTS
    module = importlib.import_module(script)
    main = module.main if hasattr(module, "main") else module.COMMANDS[flags.pop(0)]
    required, parsed = {flag.name for flag in flags_of(main).values() if flag.required}, parse(main, flags)
    assert required <= set(parsed)
    bind(main, parsed)  # refuses flags that do not go together
    files = [value for name, value in parsed.items() if name.endswith("_file") and isinstance(value, str)]
    assert not any("," in file for file in files)  # one word is one file; several are several words


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.stem)
def test_commands_of_a_page_read_a_file_by_the_same_columns(path: Path) -> None:
    columns: dict[str, object] = {}
    for words in commands(path):
        script = next((word.removesuffix(".py") for word in words if word in SCRIPTS_NAMED), "data_build")
        main = getattr(importlib.import_module(script), "main", None)
        if main and "columns" in flags_of(main):
            parsed = parse(main, words[words.index(f"{script}.py") + 1 :])
            file = str(parsed.get("label_file") or parsed.get("train_file"))
            assert columns.setdefault(file, parsed.get("columns")) == parsed.get("columns"), words


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.stem)
def test_other_commands_start_what_is_there(path: Path) -> None:
    for words in commands(path, "python", "torchrun", "bash"):
        if words[0] == "bash" or "/" in words[1]:
            assert (ROOT / words[1]).is_file(), words
            assert words[1] != "dataset/prepare.py" or words[2] in BUILDERS, words
        elif words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words
            assert words[2] != "pytest" or all((ROOT / name).is_file() for name in words[3:]), words
        else:
            assert SCRIPTS_NAMED & set(words), words


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.stem)
def test_files_functions_and_links_of_a_page_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for file, names in re.findall(r"`([\w/]+\.(?:py|sh))`((?: `\w+`,?)*)", text):
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(def|class) {name}\b", code), f"{file} has no {name}"
    for link, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([\w-]+))?\)", text):
        headings = re.findall(r"^#+ (.*)$", (path.parent / link).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_flags_that_docs_name_exist() -> None:
    modules = [importlib.import_module(name) for name in SCRIPTS]
    mains = [main for module in modules
             for main in (module.COMMANDS.values() if hasattr(module, "COMMANDS") else [module.main])]
    known = {name for main in mains for name in flags_of(main)} | set(OTHER_FLAGS)
    for path in [ROOT / "README.md", *DOCS]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"`[^`\n]*?--(\w+)", prose):
            assert name in known or name.removeprefix("no") in known, f"{path.name}: --{name}"


def test_the_reward_and_the_task_of_docs_work(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "reward.md", "python")
    (tmp_path / "my_reward.py").write_text(code, encoding="utf-8")
    prompts = [Prompt("0", "1 + 1?", "2", None, None)] * 2
    with UserReward(f"{tmp_path}/my_reward.py:short_and_boxed") as reward:
        found = reward.score(prompts, [r"It is \boxed{2}", "2"])
    assert found.values == pytest.approx([0.97, -0.01]) and found.stats == {"boxed_share": 0.5}
    (task,) = blocks(ROOT / "docs" / "task.md", "json")
    (tmp_path / "my_task.json").write_text(task, encoding="utf-8")
    assert find_task(f"{tmp_path}/my_task.json").text("1 + 1?").startswith("Problem: 1 + 1?\n")


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


def test_what_docs_say_of_the_size_is_true() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8").split("## ", 1)[0]
    said = [int(number.replace(",", "")) for number in re.findall(r"([\d,]*\d{2,})", text.split("In this order")[0])]
    algorithms = [ROOT / name for name in re.findall(r"`([\w/]+\.py)`", text)]
    code = [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py")]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in code}
    counted = sum(lines[path] for path in algorithms)
    for number, true in zip(said, (counted, len(algorithms), sum(lines.values()) - counted), strict=True):
        assert abs(number - true) <= 0.05 * true, f"docs/algorithms.md says {number}, it is {true}"


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
