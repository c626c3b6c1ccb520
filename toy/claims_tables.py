"""What toy/claims.py found, as markdown."""

from toy.verdicts import Part, interval, text

MAIN = ("ring", "grid", "conditional")


def verdict_table(claims: list[tuple[str, str, list[Part]]]) -> str:
    """A row a claim: (sentence, verdict, deciding parts)."""
    rows = ["| | the claim | here | differences over seeds: mean [95 % interval] > what matters |"]
    rows.append("|---|---|---|---|")
    for n, (sentence, word, parts) in enumerate(claims, 1):
        rows.append(f"| {n} | {sentence} | **{word}** | {'<br>'.join(map(text, parts))} |")
    return "\n".join(rows)


def summary(found: dict) -> str:
    """A row a method, the columns that most depends on; energies x 1000."""
    head = (
        "method", *(f"energy, {table}" for table in MAIN), "of x_(t_1), ring", "modes, ring",
        "precision, ring", "diversity, conditional", "evaluations, M", "memory, MB", "seconds",
        "lr",
    )  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cells in found["ring"].items():
        rows.append("| " + " | ".join(summary_row(found, name, cells)) + " |")
    return "\n".join(rows)


def summary_row(found: dict, name: str, cells: list[dict]) -> list[str]:
    """The cells of one method; a dash where a distribution has none, or a teacher no training."""
    of = lambda table, key, *how: (
        number([cell[key] for cell in found[table][name]], *how) if name in found[table] else "-"
    )
    first = [cell["energy_phases"][0] for cell in cells if len(cell["energy_phases"]) > 1]
    asked, _, memory, seconds, lr = cost(cells)
    return [
        name,
        *(of(table, "energy", 1, 1000) for table in MAIN),
        number(first, 1, 1000) if first else "-",
        of("ring", "modes"),
        of("ring", "precision", 3),
        of("conditional", "diversity", 3),
        *(asked, memory, seconds, lr),
    ]


def number(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean and half of its 95 % interval."""
    middle, low, high = interval([scale * x for x in values])
    return f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table_of(found: dict, table: str) -> str:
    """All columns of a distribution, as markdown; energies x 1000."""
    head = (
        "method", "energy x 1000", "of x_(t_k) x 1000", "modes", "precision", "diversity",
        "evaluations, student + fake + teacher, M", "parameters, active (all)", "memory, MB",
        "seconds", "lr",
    )  # fmt: skip
    rows = [f"**{table}**\n\n| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cells in found[table].items():
        of = lambda key, *digits: number([cell[key] for cell in cells], *digits)
        phases = zip(*(cell["energy_phases"] for cell in cells))
        row = [
            name,
            of("energy", 2, 1000),
            ", ".join(number(list(p), 2, 1000) for p in phases) or "-",
            of("modes"),
            of("precision", 3),
            of("diversity", 3),
            *cost(cells),
        ]
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def cost(cells: list[dict]) -> list[str]:
    """What a student cost; a teacher has no training."""
    if "parameters" not in cells[0]:
        return ["-"] * 5
    first, (active, every) = cells[0], cells[0]["parameters"]
    asked = " + ".join(
        f"{first['evaluations'][k] / 1e6:.2f}" for k in ("student", "fake", "teacher")
    )
    seconds = number([cell["seconds"] for cell in cells], 1)
    return [asked, f"{active} ({every})", f"{first['memory']:.2f}", seconds, f"{first['lr']:g}"]


def depths_of(found: dict) -> str:
    """Energies of each truncation depth and of all pooled: what one fake sees, what is sampled."""
    rows = [
        "| table, method, phase | depth 1, 2, ... (the last is sampled) | pooled |",
        "|---|---|---|",
    ]
    for table in MAIN:
        for name in ("DMD2", "DMD2, a fake per depth", "Phased 4 / 2", "Phased, a fake per depth"):
            for k, phase in enumerate(zip(*(cell["depths"] for cell in found[table][name])), 1):
                *each, pooled = (number(list(d), 2, 1000) for d in zip(*phase))
                rows.append(f"| {table}, {name}, {k} | {', '.join(each)} | {pooled} |")
    return "\n".join(rows)
