"""What `docs/label_collection.md` says can be typed, and the files that it names exist."""

import re
import shlex
from pathlib import Path

import pytest

from speechbrain_mifuse.cli import labels as label_commands
from speechbrain_mifuse.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "label_collection.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^speechbrain-mifuse (.*)$", PAGE, re.MULTILINE)


def test_the_page_shows_every_command_of_label_collection():
    assert {command.split()[0] for command in COMMANDS} == {"collect", "probe", "labels", "batch", "serve"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command, monkeypatch):
    ran = []
    for module in (cli, label_commands):
        for name in [name for name in vars(module) if name.startswith("run_")]:
            monkeypatch.setattr(module, name, ran.append)
    cli.main(shlex.split(command))
    assert len(ran) == 1


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"\b(?:hparams|tests|benchmarks|docs)/[\w/.]+\w", PAGE))
    named |= {f"hparams/{name}" for name in re.findall(r"!include:([\w/.]+\w)", PAGE)}
    assert len(named) > 8 and not [name for name in named if not (ROOT / name).exists()]


def test_every_profile_is_in_the_table():
    profiles = {f"hparams/lalm/{path.name}" for path in (ROOT / "hparams" / "lalm").glob("*.yaml")}
    assert profiles == set(re.findall(r"^\| `(hparams/lalm/\w+\.yaml)`", PAGE, re.MULTILINE))
