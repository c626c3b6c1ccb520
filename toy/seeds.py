"""The same run with several seeds, as one line of a table: medians and worst values.

    python toy/seeds.py                                5 seeds of the default run, about 3 minutes
    python toy/seeds.py --seeds 3 --toy grid --fake-per-depth
    python toy/seeds.py --seeds 3 --teacher mnist

Every other flag goes to train.py. Each run keeps its folder below --out; what is there is not
computed again.
"""

import contextlib
import io
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import train
from models.flags import Parser
from models.files import UserError, read_json


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ... (default 5)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/seeds"), help="folder (default out/seeds)"
    )
    args, flags = parser.parse_known_args()
    if not 1 <= args.seeds <= 1000:
        raise UserError("--seeds must be from 1 to 1000")
    name, rows = "_".join(flag.strip("-") for flag in flags) or "default", []
    for seed in range(args.seeds):
        out = args.out / name / str(seed)
        with contextlib.redirect_stdout(io.StringIO()):  # its numbers come in the table
            status = train.main([*flags, "--seed", str(seed), "--out", str(out), "--resume"])
        if status:
            return status
        rows.append(read_json(out / "metrics.json", "remove it"))
        print(
            f"seed {seed}: " + line({key: value for key, value in rows[-1].items() if key in SHOWN})
        )
    shown = [key for key in SHOWN if key in rows[0]]
    low = {key: (median, max if key.startswith(HIGH_IS_BAD) else min) for key in shown}
    for i, label in enumerate(("median", "worst")):
        print(
            f"{name}, {label} of {args.seeds}: "
            + line({key: low[key][i](row[key] for row in rows) for key in shown})
        )
    return 0


HIGH_IS_BAD = ("energy", "frechet", "seconds")


SHOWN = (
    "energy",
    "modes",
    "precision",
    "energy_teacher_same_steps",
    "precision_teacher_same_steps",
    "accuracy",
    "frechet",
    "frechet_floor",
    "frechet_classes",
    "frechet_teacher_same_steps",
    "diversity",
    "diversity_teacher_same_steps",
    "seconds",
    "seconds_metrics",
)


def line(values: dict) -> str:
    """Names and values on one line."""
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"seeds.py: {error}", file=sys.stderr)
        sys.exit(2)
