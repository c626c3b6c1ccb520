"""Claims about the five texts: their code, equations, commands, links and numbers are real."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from textwrap import indent

import pytest

import train
from models import cli, common, parallel

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "models/README.md", "toy/README.md", "toy/mnist/README.md", "CONTRIBUTING.md")
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
EQUATIONS = re.findall(r"^\| ([\d, ]+) \|.*\| (`.*`) \|$", README, re.M)
PLANS = re.findall(r"^\| `(--teacher .*?)` \| (.*?), (.*?) \| \d+ GB \| (.*?) \|", ALL, re.M)
VERDICTS = re.findall(r"^\| (\d+c?) \| .*? \| ([a-z][a-z ]*) \| ([^|]*) \|$", ALL, re.M)


def test_the_method_in_the_readme_is_that_of_train():
    """Both loops, about 20 lines. Negative control: with another sign they are not in train.py."""
    code = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", README, re.S))
    assert list(code) == ["update_fake", "update_student"]
    for name, loop in code.items():
        source = (ROOT / "train.py").read_text().split(f"def {name}(")[1].split("\n\n\n")[0]
        loop = loop.replace("subinterval_matching(", "matching(")  # --target has another one
        assert loop.startswith("for ") and indent(loop, "    ") in source
        assert indent(loop.replace("loss =", "loss = -"), "    ") not in source


def test_the_functions_of_all_equations_name_them():
    """In their docstrings. Negative control: sde.step names no equation 13."""
    named = lambda text: set(re.findall(r"\d+", " ".join(re.findall(r"Eqs?\. [\d, and]+", text))))
    assert {int(n) for numbers, _ in EQUATIONS for n in numbers.split(",")} == set(range(1, 14))
    assert "13" not in named(importlib.import_module("sde").step.__doc__)
    for numbers, cell in EQUATIONS:
        for file, name in re.findall(r"`(\w+)\.py:(\w+)`", cell):
            doc = getattr(importlib.import_module(file), name).__doc__
            assert set(numbers.split(", ")) <= named(doc), name


def commands() -> list[str]:
    """Every command with python or torchrun, in code blocks and inside lines."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", ALL, re.S | re.M)
    text = "\n".join(block for language, block in blocks if language in ("", "bash"))
    lines = text.replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", ALL)
    found = (re.search(r"\b(python|torchrun) .*(\.py|-m models\.)[^#]*", line) for line in lines)
    return sorted({match[0].strip() for match in found if match})


def is_understood(line: str, patch: pytest.MonkeyPatch) -> bool:
    """Return whether the command parses its flags. Raises if train.py cannot make a run of them."""
    launch, script, flags = re.match(r"(.*?)([\w/]+\.py|models\.\w+)(.*)", line).groups()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    parse_args, flags, parsed = cli.Parser.parse_args, shlex.split(flags), []

    def parse_only(*arguments):
        parsed.append(parse_args(*arguments))
        raise common.UserError("parsed")

    with patch.context() as context:
        context.setattr(sys, "argv", [script, *flags])
        context.setattr(cli.Parser, "parse_args", parse_only)
        cli.exit_status("", module.main)
    if parsed and module is train:
        args, cfg = train.parse(flags)
        ranks = re.findall(r"(?:--nnodes|--nproc-per-node) (\d+)", launch)
        topology = parallel.make_topology("x".join(ranks), args.context_parallel)
        train.validate(cfg, topology)
        if "cities" in line:
            train.preset_of(cfg).input_files(cfg)
    return bool(parsed)


@pytest.mark.parametrize("line", commands())
def test_each_command_is_understood(line, monkeypatch):
    """Negative control: the same command with a flag that is not there."""
    assert is_understood(line, monkeypatch)
    assert not is_understood(f"{line} --no-such-flag", monkeypatch)


def test_what_the_texts_link_to_and_name_is_there():
    """Files, headings, tests. No number is left to be filled in."""
    for name in NAMES:
        prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.S)
        for file, heading in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", prose):
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), (name, file)
            text = path.read_text().lower().replace(" ", "-") if heading else "#-\n"
            assert f"#-{heading}\n" in re.sub(r"[^\w\n#-]", "", text), (name, heading)
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}(" in sources for test in re.findall(r"`(test_\w+)`", ALL))
    assert not re.search(r"TODO|@[A-Z0-9a-z]+@", ALL)


def test_the_verdicts_are_those_of_the_kept_results():
    """Of all claims, with the parts that decide. Negative control: in another order."""
    claims = json.loads((ROOT / "toy/results/claims.json").read_text())["claims"]
    kept = [(claim["claim"], claim["verdict"], claim["decides"]) for claim in claims]
    assert VERDICTS == kept != VERDICTS[1:] + VERDICTS[:1]


@pytest.mark.slow
@pytest.mark.parametrize("flags,first,second,days", PLANS)
def test_the_table_of_gpus_is_what_dry_runs_print(flags, first, second, days, capsys):
    assert train.main([*flags.split(), "--device", "cpu", "--dry-run"]) == 0
    _, header, *rows, total = capsys.readouterr().out.partition("GB per")[2].splitlines()[:5]
    assert [row.split()[header.split().index("peak")] for row in rows] == [first, second]
    assert float(days) == pytest.approx(float(total.split()[4]), rel=0.05)
