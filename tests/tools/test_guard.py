"""tools/guard.py: its commands are those that the scripts take."""

from tests.recipes.test_commands import check
from tools.guard import runs


def test_every_command_is_taken_by_its_script() -> None:
    commands = [run.words.split() for run in runs() if run.words]
    assert len(commands) > 40
    check(commands)
