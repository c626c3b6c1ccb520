"""toy/claims.py --digits: the methods on pictures, the teacher of toy/mnist distilled."""

import train
from models.files import UserError
from toy import digits
from toy.methods import Budget, Row, training

TEACHERS = {"teacher, 40 steps": 40, "teacher, 4 steps": 4}
ROWS = {
    "DMD2": Row(dict(phases=1)),
    "Phased 4 / 2": Row(dict(phases=2)),
    "one shared network": Row(dict(phases=2), "shared"),
}
RATES = (1e-4, 3e-4, 1e-3)
BUDGET = Budget(updates=800, warmup=100, samples=10_000)
TUNING = Budget(updates=200, warmup=50, samples=2000)  # a quarter of the training


def picture(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """Numbers of a student, or of the teacher, with a seed; see digits.measure."""
    if name in TEACHERS:
        return teacher(TEACHERS[name], seed, budget.samples)
    row, cfg = ROWS[name], config(name, seed, lr, budget)
    preset = train.PRESETS[cfg.teacher]
    for run in training(cfg, row.variant, {}):
        pass
    numbers, _ = preset.report(run, train.look)
    shown = ("accuracy", "frechet", "frechet_classes", "diversity")
    return {key: numbers[key] for key in shown} | {"lr": lr}


def config(name: str, seed: int, lr: float, budget: Budget) -> train.Config:
    """The settings of a run: those of train.py --teacher mnist, but for rate and budget."""
    phases = ROWS[name].settings["phases"]
    cfg = train.config(
        "mnist", **ROWS[name].settings, iters=budget.updates // phases,
        warmup=budget.warmup // phases, lr=lr, seed=seed, eval_samples=budget.samples,
    )  # fmt: skip
    train.validate(cfg)
    return cfg


def broken(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """picture, to choose a rate by: a huge distance where training breaks down."""
    try:
        return picture(table, name, seed, lr, budget)
    except UserError:  # not finite
        return {"frechet": 1e9}


def teacher(steps: int, seed: int, n: int) -> dict:
    """Numbers of the guided teacher with so many steps, from noise of the seed."""
    net, judge = digits.shipped_teacher(2.0), digits.load_judge()
    z, seen = digits.judge_teacher(judge, net, steps, n, "claims", seed)
    return digits.measure(z, seen, digits.classes_of(n), digits.load_reference())


def table(found: dict, number) -> str:
    """Markdown; number(values, digits) writes mean and interval."""
    keys = ("accuracy", "frechet", "frechet_classes", "diversity")
    rows = ["| digits | " + " | ".join(keys) + " | lr |", "|---" * (len(keys) + 2) + "|"]
    for name in (*TEACHERS, *ROWS):
        shown = [number([cell[key] for cell in found[name]], 3) for key in keys]
        rows.append(f"| {name} | {' | '.join(shown)} | {found[name][0].get('lr', '-')} |")
    return "\n".join(rows)
