"""The paper's claims at small scale, with error bars: what holds here, what does not, what is open.

    python toy/claims.py             every method on every toy, 10 seeds: 70 minutes of two cores
    python toy/claims.py --quick     all of it in miniature, 4 minutes: to see that it works
    python toy/claims.py --digits    a table of pictures, 3 seeds: about 40 minutes
    python toy/claims.py --control   does the machinery find what is there, and nothing else?

Prints a line a claim, `claim N reproduced|contradicted|undecided numbers`, and writes claims.json,
table.md and figures. The same command goes on where it was stopped, cell by cell (a method with a
seed); the numbers are a function of the seeds. A cell is one thread; so many run at once as
--processes says.
"""

import io
import multiprocessing
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import numpy as np
import torch
from tqdm import tqdm

from models.files import UserError, read_json, write, write_json
from models.flags import Parser, exit_status
from models.folder import environment, make
from toy import claims_digits, claims_figures, methods
from toy.methods import FAR, ROWS, TABLES, TEACHERS, Budget
from toy.claims_tables import MAIN, depths_of, number, summary, table_of, verdict_table
from toy.verdicts import Part, text, verdicts

QUICK = Budget(updates=160, warmup=80, samples=2000, fit=500, matching=200)
RATES = (3e-4, 1e-3, 3e-3)  # of the generator: each row's is the best of these on other seeds
TUNING_SEEDS = (100, 101)
ENERGY = 0.001  # the smallest difference that matters: as much as two seeds differ
DIVERSITY = 0.05  # of the teacher's


# -- the claims ----------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A sentence of the paper, the parts that decide on it, and what is told beside."""

    sentence: str
    parts: list[Part]
    beside: list[Part]


DEEPER = {  # where a number of a cell is found, if not under its name
    "x_(t_1)": ("energy_phases", 0),
    "x_(t_1) finished by the teacher": ("finished", 0),
    "part that keeps its mode": ("early", 1, "kept"),
    "part that keeps it, of those within 3 sd": ("early", 1, "kept_inside"),
    "way of those that do, in sd": ("early", 1, "moved"),
    "part that keeps its mode, first expert": ("early", 0, "kept"),
}


def value(cell: dict, what: str) -> float:
    """A number of a cell."""
    for key in DEEPER.get(what, (what,)):
        cell = cell[key]
    return cell


def claims(found: dict) -> list[Claim]:
    """The claims, over found[table][row] = numbers a seed. Written down before the first run."""

    def more(table, name, other, what="energy", matters=ENERGY):
        """`name` has more of it than `other`."""
        pairs = zip(found[table][name], found[table][other], strict=True)
        text = f"{table}: {name} - {other}" + (f", {what}" if what != "energy" else "")
        return Part(text, [value(a, what) - value(b, what) for a, b in pairs], matters)

    def each(name, other, what="energy", matters=ENERGY):
        return [more(table, name, other, what, matters) for table in MAIN]

    def above(bound, what, matters):
        """Phased 4 / 2 has more of it than the bound."""
        rows = {table: found[table]["Phased 4 / 2"] for table in MAIN}
        text = what + (f" - {bound:g}" if bound else "")
        return [
            Part(f"{table}: {text}", [value(cell, what) - bound for cell in cells], matters)
            for table, cells in rows.items()
        ]

    def matching(name, other, what, matters):
        return [more(f"matching {t}", name, other, what, matters) for t in ("ring", "grid")]

    def unbiased(table):
        cells = found[f"matching {table}"]["Eq. 11"]
        return Part(f"{table}: 0.001 - bias of Eq. 11", [0.001 - c["bias"] for c in cells], 0.0)

    growth = {name: [cell["memory"][3] / cell["memory"][0] for cell in cells]
              for name, cells in found["memory"].items()}  # fmt: skip
    both = list(zip(growth["vanilla"], growth["phased"]))
    return [
        Claim(
            "the subinterval target is unbiased and the naive one is not (Fig. 2)",
            matching("naive", "Eq. 11", "bias", 0.05)
            + matching("naive", "Eq. 11", "error", 0.05)
            + [unbiased("ring"), unbiased("grid")],
            matching("Eq. 11", "clean data", "error", 0.05),
        ),
        Claim(
            "truncation brings the diversity of DMD2 down, Phased DMD keeps more (Table 3)",
            each("vanilla DMD", "DMD2", "diversity", DIVERSITY)
            + each("Phased 4 / 2", "DMD2", "diversity", DIVERSITY),
            each("vanilla DMD", "DMD, 1 step", "diversity", DIVERSITY)
            + each("Phased 4 / 2", "DMD2", "modes", 0.5),
        ),
        Claim(
            "Phased DMD is nearer to the teacher than DMD2, with 4 phases nearer than with 2 "
            "(Tables 2, 6)",
            each("DMD2", "Phased 4 / 2") + each("Phased 4 / 2", "Phased 4 / 4"),
            each("DMD2", "DMD2, a fake per depth") + [more("guided", "DMD2", "Phased 4 / 2")],
        ),
        Claim(
            "the biased target harms distillation, not only scores (A2)",
            each("biased target", "Phased 4 / 2"),
            each("biased target", "Phased 4 / 2", "x_(t_1)")
            + each("biased target", "Phased 4 / 2", "x_(t_1) finished by the teacher"),
        ),
        Claim(
            "nested intervals beat disjoint ones (Fig. 10)",
            each("disjoint intervals", "Phased 4 / 2"),
            [more("ring", f"{start}, disjoint", start) for start in list(FAR)[::2]],
        ),
        Claim(
            "high noise is what makes DMD converge (Fig. 11; t chosen by sigma / alpha beside the "
            "distance of modes)",
            each("vanilla, t = 0.1", "vanilla, t = 0.357"),
            each("vanilla, t = 0.357", "vanilla, t = 0.882")
            + [more("wide", "vanilla, t = 0.357", "vanilla, t = 0.882", matters=4 * ENERGY)],
        ),
        Claim(
            "training the last expert longer changes detail and leaves structure (Fig. 8)",
            above(0.95, "part that keeps its mode", 0.0)
            + above(0.0, "way of those that do, in sd", 0.2),
            above(0.95, "part that keeps it, of those within 3 sd", 0.0)
            + above(0.95, "part that keeps its mode, first expert", 0.0),
        ),
        Claim(
            "a phase costs the memory of one recorded step whatever N, vanilla grows (Fig. 1)",
            [
                Part("8 steps over 1: vanilla - phased", [a - b for a, b in both], 1.0),
                Part("1.05 - phased", [1.05 - b for _, b in both], 0.0),
            ],
            [],
        ),
        Claim(
            "the gain is not from parameters alone (one network in place of two)",
            each("DMD2", "one shared network"),
            each("one shared network", "Phased 4 / 2"),
        ),
    ]


def lines(found: dict) -> list[str]:
    """A line a claim, then what is told beside."""
    made = claims(found)
    words = verdicts([claim.parts for claim in made])
    shown = []
    for n, (claim, word) in enumerate(zip(made, words), 1):
        parts = "; ".join(map(text, claim.parts))
        shown.append(f"claim {n} {word} {claim.sentence}: {parts}")
        shown += [f"  beside {n}: {text(part)}" for part in claim.beside]
    return shown


# -- cells ---------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A cell: what is computed in one go, and kept in a file of its own."""

    work: str  # one of WORK
    table: str
    name: str
    seed: int
    lr: float
    budget: Budget

    def file(self, out: Path) -> Path:
        words = self.work, self.table, self.name, str(self.seed)
        if "tuning" in self.work:
            words = (*words, f"{self.lr:g}")
        return (
            out
            / "cells"
            / ("_".join(re.sub(r"[^a-z0-9.]+", "-", w.lower()) for w in words) + ".json")
        )

    def settings(self) -> dict:
        return {"lr": self.lr, "budget": self.budget._asdict()}


WORK = {
    "row": methods.row,
    "tuning": methods.tuning,
    "growth": methods.growth,
    "matching": methods.matching,
    "picture": claims_digits.picture,
    "picture tuning": claims_digits.broken,
}
MATCHING = {"clean data": "a", "Eq. 11": "b", "naive": "c"}  # the objectives of Fig. 2


def compute(job: Job, out: Path) -> None:
    """Do a job and keep what it found; x of the samples beside, of the first seed."""
    name = MATCHING.get(job.name, job.name)
    found = WORK[job.work](job.table, name, job.seed, job.lr, job.budget)
    paths, file = found.pop("paths", None), job.file(out)
    if paths is not None and job.seed == 0:
        array = io.BytesIO()
        np.save(array, paths.numpy())
        write(file.with_suffix(".npy"), array.getvalue())
    write_json(file, {"settings": job.settings(), "found": found})


def read(job: Job, out: Path) -> dict | None:
    """What a job found, if it is done. Raises UserError for a file of other settings."""
    file = job.file(out)
    if not file.exists():
        return None
    held = read_json(file, "delete it; the same command computes it again")
    if held.get("settings") != job.settings():
        raise UserError(f"{file} is of other settings; delete {out}, or give another --out")
    return held["found"]


def begin() -> None:
    """In each process: one thread; Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def compute_all(jobs: list[Job], out: Path, processes: int, text: str) -> list[dict]:
    """What the jobs found, in their order; those that are done are read."""
    todo = [(job, out) for job in jobs if read(job, out) is None]
    make(out / "cells")
    with multiprocessing.get_context("spawn").Pool(processes, begin) as pool:
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=text, disable=None)
        for _ in pool.imap_unordered(starred, todo):
            bar.update()
        bar.close()
        pool.close()  # and let its processes end by themselves
        pool.join()
    return [read(job, out) for job in jobs]


def starred(arguments: tuple) -> None:
    """compute, as a pool calls it."""
    compute(*arguments)


def best(jobs: list[Job], results: list[dict], key: str) -> dict[tuple[str, str], float]:
    """The rate of each (table, row): that with the smallest sum of `key` over seeds."""
    sums: dict[tuple, float] = defaultdict(float)
    for job, found in zip(jobs, results, strict=True):
        sums[job.table, job.name, job.lr] += found[key]
    tried = sorted(sums, key=sums.__getitem__, reverse=True)
    return {(table, name): lr for table, name, lr in tried}  # the last one stays


def tuned(out: Path, processes: int, budget: Budget) -> dict[tuple[str, str], float]:
    """RATES, tried alike for all rows, on seeds that no table has."""
    jobs = [
        Job("tuning", table, name, seed, lr, budget)
        for table in ("ring", "grid")
        for name in ROWS
        for lr in RATES
        for seed in TUNING_SEEDS
    ]
    return best(jobs, compute_all(jobs, out, processes, "rates"), "energy")


def rate_of(rates: dict, table: str, name: str) -> float:
    """The grid has rates of its own; all else takes the ring's, and FAR those of its method."""
    if name in FAR:
        name = "disjoint intervals" if "disjoint" in name else "Phased 4 / 2"
    return rates.get(("grid" if table == "grid" else "ring", name), 1e-3)


def all_jobs(seeds: int, rates: dict, budget: Budget) -> list[Job]:
    """Every cell of the tables, seeds outermost: what was computed before a stop is whole."""
    jobs = []
    for seed in range(seeds):
        for table, (_, rows) in TABLES.items():
            for name in (*TEACHERS, *rows):
                lr = rate_of(rates, table, name)
                jobs.append(Job("row", table, name, seed, lr, budget))
        jobs += [
            Job("growth", "memory", name, seed, 1e-3, budget) for name in ("vanilla", "phased")
        ]
        for table in ("ring", "grid"):
            jobs += [Job("matching", table, name, seed, 1e-2, budget) for name in MATCHING]
    return jobs


def gathered(jobs: list[Job], results: list[dict]) -> dict:
    """found[table][row] = numbers a seed, with the diversity relative to the teacher's."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for job, result in zip(jobs, results):
        table = f"matching {job.table}" if job.work == "matching" else job.table
        found[table][job.name].append(result)
    for table in TABLES:
        of_teacher = [cell["spread"] for cell in found[table]["teacher, 40 steps"]]
        for cells in found[table].values():
            for cell, base in zip(cells, of_teacher):
                cell["diversity"] = cell["spread"] / base
    return {table: dict(rows) for table, rows in found.items()}


# -- the command ---------------------------------------------------------------------------------


def report(found: dict, about: dict, out: Path) -> None:
    """Print and write all that was found, and draw it."""
    said, decided = lines(found), claims(found)
    words = verdicts([claim.parts for claim in decided])
    print("\n".join(said))
    whole = [(claim.sentence, word, claim.parts) for claim, word in zip(decided, words)]
    tables = [verdict_table(whole), summary(found), depths_of(found)]
    tables += [table_of(found, table) for table in TABLES]
    write(out / "table.md", "\n\n".join(tables).encode())
    kept = {
        table: {name: [plain(cell) for cell in cells] for name, cells in rows.items()}
        for table, rows in found.items()
    }
    write_json(out / "claims.json", about | {"claims": said, "found": kept})
    ways = lambda name: paths_of(out, "ring", name)
    claims_figures.draw([(word, parts) for _, word, parts in whole], found, ways, out)
    print(f"folder: {out}")


def plain(cell: dict) -> dict:
    """A cell without its curve, which is for a figure."""
    return {key: value for key, value in cell.items() if key != "curve"}


def made(args, began: float, **more) -> dict:
    """How numbers were made."""
    about = {"date": time.strftime("%Y-%m-%d"), "minutes": round((time.time() - began) / 60, 1)}
    return about | {"machine": machine(), "processes": args.processes} | more | environment("cpu")


def machine() -> str:
    """The processor's name, where it can be known."""
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return "unknown"


def parse() -> tuple:
    """The flags, checked. Raises UserError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a fifth of the training, 3 seeds, no tuning of rates")
    add("--digits", action="store_true", help="the table of pictures in place of the toys")
    add("--control", action="store_true", help="methods without a difference, and with one")
    add("--seeds", type=int, help="how many: 0, 1, ... (default 10; 3 with --quick or --digits)")
    add("--processes", type=int, default=2, help="cells at once, a thread each (default 2)")
    add("--out", type=Path, help="folder (default out/claims, out/claims-quick, ...)")
    args = parser.parse_args()
    kinds = [kind for kind in ("quick", "digits", "control") if getattr(args, kind)]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]} are two runs; give one of them")
    args.seeds = args.seeds or (3 if args.quick or args.digits else 10)
    if not 2 <= args.seeds <= 1000:
        raise UserError("--seeds must be from 2 to 1000: an interval needs two")
    if not 1 <= args.processes <= 256:
        raise UserError("--processes must be from 1 to 256")
    args.out = args.out or Path("-".join(["out/claims", *kinds]))
    return args


def main() -> None:
    """Compute what is missing, then say what it means."""
    args, began = parse(), time.time()
    if args.control:
        return control(args.out, args.processes)
    if args.digits:
        return pictures(args, began)
    budget = QUICK if args.quick else Budget()
    rates = {} if args.quick else tuned(args.out, args.processes, budget)
    jobs = all_jobs(args.seeds, rates, budget)
    found = gathered(jobs, compute_all(jobs, args.out, args.processes, "cells"))
    report(found, made(args, began, seeds=args.seeds, budget=budget._asdict()), args.out)


def paths_of(out: Path, table: str, name: str) -> torch.Tensor:
    """x (times, 3000, 2) of the first seed of a row."""
    job = Job("row", table, name, 0, 0.0, Budget())
    return torch.from_numpy(np.load(job.file(out).with_suffix(".npy"), allow_pickle=False))


CONTROL = Budget(updates=40, warmup=40, samples=5000, fit=500)


def control(out: Path, processes: int, repetitions: int = 20, seeds: int = 10) -> None:
    """One-step DMD beside itself with other seeds, again and again; then beside a worse one."""
    n = repetitions * seeds
    job = lambda seed, lr: Job("tuning", "ring", "DMD, 1 step", seed, lr, CONTROL)
    jobs = [job(seed, 1e-3) for seed in (*range(n), *range(1000, 1000 + n))]
    jobs += [job(2000 + seed, 1e-5) for seed in range(seeds)]
    found = [f["energy"] for f in compute_all(jobs, out, processes, "control")]
    d = [a - b for a, b in zip(found[:n], found[n : 2 * n])]
    same = [Part("same", d[i : i + seeds], ENERGY) for i in range(0, n, seeds)]
    planted = Part("planted", [a - b for a, b in zip(found[2 * n :], found)], ENERGY)
    words = [verdicts([[part]])[0] for part in same]
    print(f"control: identical methods undecided in {words.count('undecided')} of {repetitions}")
    print(f"control: a planted difference {verdicts([[planted]])[0]}: {text(planted)}")


def pictures(args, began: float) -> None:
    """The table of digits: rates first, students, then the teacher, which takes longest."""
    rows, quarter = claims_digits.ROWS, claims_digits.TUNING
    jobs = [
        Job("picture tuning", "digits", name, 100, lr, quarter)
        for name in rows
        for lr in claims_digits.RATES
    ]
    rates = best(jobs, compute_all(jobs, args.out, args.processes, "rates"), "frechet")
    jobs = [
        Job("picture", "digits", name, seed, rates.get(("digits", name), 0.0), claims_digits.BUDGET)
        for seed in range(args.seeds)
        for name in (*rows, "teacher, 4 steps")
    ]
    jobs += [
        Job("picture", "digits", "teacher, 40 steps", seed, 0.0, claims_digits.BUDGET)
        for seed in range(args.seeds)
    ]
    found = defaultdict(list)
    for job, result in zip(jobs, compute_all(jobs, args.out, args.processes, "digits")):
        found[job.name].append(result)
    table = claims_digits.table(found, number)
    print(table)
    write(args.out / "digits.md", table.encode())
    about = made(args, began, seeds=args.seeds, budget=claims_digits.BUDGET._asdict())
    write_json(args.out / "digits.json", about | {"found": found})
    print(f"folder: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_status("claims.py", main, again="the same command goes on, cell by cell"))
