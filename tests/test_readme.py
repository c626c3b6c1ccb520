"""Claims about the README: its table of equations, its commands and its files are real."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import train
from toy import claims, claims_digits, claims_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EQUATIONS = re.findall(r"^\| ([\d, ]+) \|.*\| (`.*`) \|$", README, re.M)


def names(text: str):
    """(module, function) of each `file.py:function` in a cell."""
    return re.findall(r"`([\w/]+)\.py:(\w+)`", text)


def test_every_equation_of_the_paper_has_its_row():
    found = {int(n) for numbers, _ in EQUATIONS for n in numbers.split(",")}
    assert found == set(range(1, 14))


@pytest.mark.parametrize("numbers,cell", EQUATIONS)
def test_each_function_of_the_table_exists_and_names_its_equation(numbers, cell):
    """In its docstring; a function that does not name it fails, and so does one that is gone."""
    assert names(cell)
    for file, function in names(cell):
        doc = getattr(importlib.import_module(file.replace("/", ".")), function).__doc__
        for number in numbers.split(","):
            assert re.search(rf"Eqs?\. ([\d, and]+)?\b{number.strip()}\b", doc), (function, number)


def test_the_check_of_the_table_can_fail():
    """Negative control: sde.step names no equation 13."""
    assert not re.search(r"Eqs?\. ([\d, and]+)?\b13\b", importlib.import_module("sde").step.__doc__)


def commands():
    blocks = "\n".join(re.findall(r"```(?:bash|console)?\n(.*?)```", README, re.S))
    lines = [line.split("#")[0].split("&&")[-1].strip() for line in blocks.splitlines()]
    inline = re.findall(r"`(python [^`]+)`", README)
    found = {line for line in lines + inline if line.startswith("python ")}
    return sorted(line for line in found if "--help" not in line)


@pytest.mark.parametrize("line", commands())
def test_each_command_of_the_readme_is_understood(line):
    """Its script is there; the flags for train.py parse, and make settings that can run."""
    _, script, *flags = shlex.split(line)
    if script == "-m":  # a module of its own, whose source names each of its flags
        source = (ROOT / (flags[0].replace(".", "/") + ".py")).read_text()
        assert all(f'add("{f}"' in source for f in flags[1:] if f.startswith("--"))
        return
    assert (ROOT / script).exists()
    if script == "toy/seeds.py":
        flags = re.sub(r"--seeds \d+", "", shlex.join(flags)).split()
    if script in ("train.py", "toy/seeds.py") and "mine.csv" not in flags:
        cfg = train.parse(flags)[1]
        train.validate(cfg, files=cfg.teacher == "toy2d")  # weights are not here


def test_the_files_that_the_readme_shows_are_there():
    linked = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert linked and all((ROOT / name).exists() for name in linked)


def test_the_claims_of_the_readme_are_what_the_kept_numbers_say():
    """Verdicts and tables, computed again from toy/results; a number changed there is seen."""
    held = json.loads((ROOT / "toy/results/claims.json").read_text())
    found, digits = held["found"], json.loads((ROOT / "toy/results/digits.json").read_text())
    assert claims.lines(found) == held["claims"]
    decided = claims.claims(found)
    words = claims.verdicts([claim.parts for claim in decided])
    whole = [(c.sentence, word, c.parts) for c, word in zip(decided, words)]
    assert claims_tables.verdict_table(whole) in README
    assert claims_tables.summary(found) in README
    assert claims_digits.table(digits["found"], claims_tables.number) in README
    found["ring"]["DMD2"][0]["energy"] += 0.5
    assert claims.lines(found) != held["claims"] and claims_tables.summary(found) not in README
