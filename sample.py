"""The few-step sampler, for a student, its phases while training, and a teacher alike.

python sample.py --student out/toy2d                     a picture, an array and numbers
python sample.py --student out/toy2d --trajectory        with x at every step
"""

import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

import moe
from models import parallel
from models.draws import normal
from models.flags import Parser, is_out_of_memory, pick_device
from models.folder import check_files, config_of, contents
from models.files import UserError, read_json, read_tensors, write
from phases import Phase
from sde import step


def times_of(t: float, x: Tensor) -> Tensor:
    """The time t for every sample of x, (B,) float32."""
    return torch.full((len(x),), t, device=x.device)


def trajectory(nets: list[Callable], times, z: Tensor, c=None) -> Iterator[Tensor]:
    """The pipeline of Eq. 9: x (B, ...) at every one of the times, z first; step i asks nets[i].

    The student is [expert 1, expert 1, expert 2, expert 2] at its own times, a teacher is the same
    network at every step: nothing else differs.
    """
    x = z
    yield x
    for net, t, t_next in zip(nets, times[:-1], times[1:], strict=True):
        x = step(x, t, t_next, net(x, times_of(t, x), c))
        yield x


def rollout(
    nets: list[Callable], times, phase: Phase, z: Tensor, c, depth: Tensor, truncate: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Backward simulation, Eqs. 9 and 10, from z to where `recorded` begins: x (B, ...), t (B,).

    As the student will do it: earlier experts, then the phase's own steps before the last of each
    sample's `depth` (B,) (SGTS). No gradient. Without truncation: to the start of the phase, no t.
    """
    with torch.no_grad():
        for x in trajectory(nets[: phase.first], times[: phase.first + 1], z, c):
            pass
        if not truncate:
            return x, None
        for i in range(phase.depths - 1):
            rows = (depth > i + 1).nonzero()[:, 0].to(x.device)  # depth is on the CPU: no wait
            if len(rows):
                t, head = phase.t[i], x[rows]
                v = nets[phase.first](head, times_of(t, head), moe.select(c, rows))
                x = x.index_copy(0, rows, step(head, t, phase.t[i + 1], v))
    return x, torch.tensor(phase.t)[depth - 1].to(x.device)


def recorded(nets: list[Callable], phase: Phase, x: Tensor, t: Tensor | None, c) -> Tensor:
    """x_{t_k} of Eqs. 9 and 10: from t (B,) one step to the end of the phase; without t all steps.

    What the generator learns through. Memory is that of one step, or grows with their number.
    """
    if t is not None:
        return step(x, t, phase.s, nets[phase.first](x, t, c))
    for x in trajectory(nets[phase.first : phase.last], phase.t, x, c):
        pass
    return x


# -- the command ---------------------------------------------------------------------------------


def load_student(path: Path, device: torch.device):
    """The run of a finished folder, or of one of its looks/*.safetensors. Raises UserError."""
    import train  # knows the presets; it imports this file for the sampler

    folder, file = (
        (path.parent.parent, path) if path.is_file() else (path, path / "student.safetensors")
    )
    advice = f"train it again with: python train.py --out {folder} --overwrite"
    if not file.is_file():
        raise UserError(
            f"{folder} holds no student.safetensors; give --student the folder of a finished run"
        )
    config = read_json(folder / "config.json", advice)
    cfg = config_of(train.Config, config, folder)
    train.validate(cfg)
    check_files(config["files"])
    tensors, about = read_tensors(file, "student", config["settings"], advice)
    run = train.new_run(cfg, {}, device, folder)
    if about["phase"] < len(run.phases):
        raise UserError(
            f"{file} is of phase {about['phase']} of {len(run.phases)}: not a whole student"
        )
    run.k = len(run.phases)
    for phase in run.phases:
        role = moe.student_role(phase.k)
        for name, p in run.roles.parameters_of(role).items():
            p.data.copy_(tensors[f"{role}/{name}"])
    return run


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for a user's error."""
    import train

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--student", type=Path, required=True,
        help="folder of a finished run, such as out/toy2d, or a file of its looks/")  # fmt: skip
    add("--n", type=int, help="number of samples (default: toys 10000, large teachers 4)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--out", type=Path, help="folder to write to (default STUDENT/samples)")
    add("--trajectory", action="store_true", help="keep x at every step, noise first")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="toys: cpu")
    try:
        args = parser.parse_args(argv)
        parallel.alone("sample.py")
        if not 1 <= (1 if args.n is None else args.n) <= 10**6 or args.seed < 0:
            raise UserError("--n must be from 1 to a million, and --seed at least 0")
        home = args.student.parent.parent if args.student.is_file() else args.student
        out = args.out or home / "samples"
        if "config.json" in contents(out):
            raise UserError(f"{out} holds a run; choose another --out")
        teacher = read_json(home / "config.json", NO_RUN).get("settings", {}).get("teacher")
        usual = train.PRESETS[teacher].device if teacher in train.PRESETS else "cpu"
        run = load_student(args.student, torch.device(pick_device(args.device, usual)))
        preset, began = train.PRESETS[run.cfg.teacher], time.time()
        n = preset.samples if args.n is None else args.n
        c, shape = run.batch(n, args.seed, "sample", 0)
        z = normal((n, *shape), args.seed, "sample", "z").to(run.device)
        nets = [moe.in_passes(net, run.cfg.micro_batch or n) for net in run.student]
        with torch.no_grad():
            xs = [x.cpu() for x in trajectory(nets, run.times, z, moe.move(c, run.device))]
        print(f"{n} samples, {len(nets)} network evaluations each, {time.time() - began:.2f} s")
        found, files = preset.present(run.cfg, c, xs, args.trajectory)
        for name, content in files.items():
            write(out / name, content)
        train.show(found, out)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print("sample.py: out of memory; a smaller --n, or --device cpu", file=sys.stderr)
        return 2


NO_RUN = "give --student the folder of a finished run"

if __name__ == "__main__":
    sys.exit(main())
