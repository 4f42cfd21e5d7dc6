"""recipes/stage.sh and stages.sh: stages that must leave their file, jobs side by side that name themselves."""

import shutil
import subprocess
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(folder: Path, text: str) -> Path:
    """A recipe in a project of its own that sources the real stages.sh."""
    (folder / "recipes").mkdir()
    for name in ("stage.sh", "stages.sh"):
        shutil.copy(RECIPES / name, folder / "recipes")
    path = folder / "recipes" / "own.sh"
    path.write_text(f"set -euo pipefail\nsource recipes/stages.sh\nexport JOBS=2 SEEDS='1 2 3'\n{text}\n")
    return path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "recipes/own.sh", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_a_stage_that_ends_well_without_its_file_stops_the_recipe(tmp_path: Path) -> None:
    recipe(tmp_path, "stage train out/manifest.json true\necho went on")
    done = run(tmp_path)
    assert done.returncode == 1 and "went on" not in done.stdout
    assert done.stderr == "error: train ended without out/manifest.json; start the recipe again to go on\n"


def test_jobs_run_with_their_arguments_for_each_seed(tmp_path: Path) -> None:
    text = 'work() { echo "$1-$2"; }\nshow() { echo "seed $1"; }\nstarted_as_job "$@"\n'
    recipe(tmp_path, text + 'at_once "work a 1" "work b 2"\nfor_each_seed show')
    done = run(tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["a-1", "b-2", "seed 1", "seed 2", "seed 3"]


def test_a_job_that_fails_is_named_and_no_further_one_starts(tmp_path: Path) -> None:
    text = 'work() { echo "$1"; [ "$1" != 1 ]; echo "after $1"; }\nstarted_as_job "$@"\nexport JOBS=1\n'
    recipe(tmp_path, text + "for_each_seed work\necho went on")
    done = run(tmp_path)
    assert done.returncode != 0
    assert done.stdout.splitlines() == ["1"]  # nothing behind the mistake, no seed 2, no word after the jobs
    assert "error: work 1 did not end well" in done.stderr


def test_a_stage_says_what_it_is_for_once(tmp_path: Path) -> None:
    recipe(tmp_path, "means='to have it'\nstage 'make a' a touch a\nstage 'make b' b touch b\nstage 'make a' a false")
    assert run(tmp_path).stdout.splitlines() == ["== make a: to have it", "== make b", "== make a: done before (a)"]


def test_results_are_kept_unless_asked_for_anew_and_other_words_are_refused(tmp_path: Path) -> None:
    recipe(tmp_path, 'begin out "$@"\nstage first out/first touch out/first')
    run(tmp_path)
    assert run(tmp_path).stdout == "== first: done before (out/first)\n"
    done = run(tmp_path, "--frehs")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: found '--frehs'; own.sh takes --fresh alone\n"
    assert run(tmp_path, "--fresh").stdout == "== first\n"
