"""Claims about the imports: which module may know which, read from the source with ast."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for folder in (ROOT, ROOT / "models", ROOT / "toy")
    for path in sorted(folder.glob("*.py"))
}
CORE = {"sde", "losses", "phases", "moe", "config", "presets", "train", "sample"}
ALLOWED = {  # a preset, and what its plan suggests; the other models/ know these two only
    "models.teachers": {"sde", "config", "moe", "phases"},
    "models.advice": {"config", "phases"},
}
PRESETS = ("models.teachers", "toy.toy2d", "toy.digits")


def imported_names(node: ast.AST) -> list[str]:
    """Full names that the import statements inside a node import."""
    names = []
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names += [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            names += [f"{part.module}.{alias.name}" for alias in part.names]
    return names


def own_modules(names: list[str]) -> set[str]:
    """The modules of the project among imported names."""
    parents = [name.rpartition(".")[0] for name in names]
    return {name for name in (*names, *parents) if name in SOURCES}


@cache
def check_module(module: str, source: str) -> tuple[list[str], set[str]]:
    """What is wrong with a module's imports, and the modules of the project that it imports."""
    lines, tree = [], ast.parse(source)
    names = imported_names(tree)
    own = own_modules(names)
    if module.startswith("models."):
        for name in own & CORE - ALLOWED.get(module, {"sde", "config"}):
            lines.append(f"{module}: imports {name}")
    if module in PRESETS and own & {"train", "sample"}:
        lines.append(f"{module}: a preset imports train or sample")
    if any(name.startswith("torch.distributed") for name in names):
        if module != "models.parallel":
            lines.append(f"{module}: imports torch.distributed")
    if any(name.startswith("matplotlib.pyplot") for name in names):
        lines.append(f"{module}: imports pyplot, which chooses a backend")
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            for name in own_modules(imported_names(function)):
                lines.append(f"{module}: imports {name} inside a function")
    return lines, own


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that the design forbids, as `module: what is wrong`."""
    checked = {module: check_module(module, source) for module, source in sources.items()}
    lines = [line for found, _ in checked.values() for line in found]
    try:
        TopologicalSorter({module: own for module, (_, own) in checked.items()}).prepare()
    except CycleError as error:
        lines.append(f"{min(error.args[1])}: is imported in a circle")
    return lines


def test_the_imports_are_those_of_the_design():
    """No circles, no import of our own inside a function; see violations."""
    assert len(SOURCES) > 15 and violations(SOURCES) == []


@pytest.mark.parametrize(
    "module,source,line",
    [
        ("models.teachers", "from train import Config", "models.teachers: imports train"),
        ("toy.toy2d", "import train", "toy.toy2d: a preset imports train or sample"),
        ("train", "import torch.distributed as dist", "train: imports torch.distributed"),
        ("moe", "from torch import distributed", "moe: imports torch.distributed"),
        ("moe", "import matplotlib.pyplot", "moe: imports pyplot, which chooses a backend"),
        (
            "models.lora",
            "def load():\n    from models import weights",
            "models.lora: imports models.weights inside a function",
        ),
        ("sde", "from phases import Phase", "phases: is imported in a circle"),
    ],
)
def test_a_forbidden_import_is_found(module, source, line):
    """Negative controls: the same sources with one import more."""
    changed = SOURCES | {module: SOURCES[module] + "\n" + source + "\n"}
    assert line in violations(changed) and line not in violations(SOURCES)
