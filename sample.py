"""The few-step sampler, for a student, its phases while training, and a teacher alike.

python sample.py --student out/toy2d                     a picture, an array and numbers
python sample.py --student out/toy2d --trajectory        with x at every step
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

import moe
from models.flags import Parser, pick_device
from models.folder import check_files, config_of, contents
from models.files import UserError, read_json, read_tensors, write
from phases import Phase, step_times
from sde import step


def stream(*where) -> torch.Generator:
    """A random stream that is a function of `where` alone: (seed, phase, iteration, update, ...).

    No global state, so none is saved: a resumed run needs its counters only. On the CPU, so that
    a seed means the same numbers on every device.
    """
    digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shape, *where) -> Tensor:
    """Standard normal numbers of the stream `where`, float32 on the CPU."""
    return torch.randn(shape, generator=stream(*where))


def uniform(shape, *where) -> Tensor:
    """Numbers of U(0, 1) of the stream `where`, float32 on the CPU."""
    return torch.rand(shape, generator=stream(*where))


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
) -> Tensor:
    """x_{t_k} from z as the student will make it: backward simulation with truncation (SGTS).

    Earlier experts, and the phase's steps before the last of each sample's `depth` (B,), run
    without gradient. The last one is recorded and jumps to the end of the phase. Without
    truncation every step of the phase is recorded and memory grows with their number.
    """
    with torch.no_grad():
        for x in trajectory(nets[: phase.first], times[: phase.first + 1], z, c):
            pass
    if not truncate:
        for x in trajectory(nets[phase.first : phase.last], phase.t, x, c):
            pass
        return x
    with torch.no_grad():
        for i in range(phase.depths - 1):
            rows = (depth > i + 1).nonzero()[:, 0].to(x.device)  # depth is on the CPU: no wait
            if len(rows):
                t, head = phase.t[i], x[rows]
                v = nets[phase.first](head, times_of(t, head), moe.select(c, rows))
                x = x.index_copy(0, rows, step(head, t, phase.t[i + 1], v))
    t = torch.tensor(phase.t)[depth - 1].to(x.device)  # (B,) where each recorded step begins
    return step(x, t, phase.s, nets[phase.first](x, t, c))


# -- the command ---------------------------------------------------------------------------------


def load_student(folder: Path, device: torch.device):
    """Settings, phases and the step networks of a finished run. Raises UserError."""
    import train  # knows the presets; it imports this file for the sampler

    advice = f"train it again with: python train.py --out {folder} --overwrite"
    if "student.safetensors" not in contents(folder):
        raise UserError(
            f"{folder} holds no student.safetensors; give --student the folder of a finished run"
        )
    config = read_json(folder / "config.json", advice)
    cfg = config_of(train.Config, config, folder)
    train.validate(cfg)
    check_files(config["files"])
    tensors, _ = read_tensors(folder / "student.safetensors", "student", config["settings"], advice)
    phases, preset, experts = train.phases_of(cfg), train.PRESETS[cfg.teacher], {}
    for phase in phases:
        role = moe.student_role(phase.k)
        experts[role] = preset.network(cfg).to(device)
        mine = {
            name.removeprefix(role + "/"): x
            for name, x in tensors.items()
            if name.startswith(role + "/")
        }
        experts[role].load_state_dict(mine)
    return cfg, phases, moe.by_step(lambda role, x_t, t, c=None: experts[role](x_t, t, c), phases)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for a user's error."""
    import train

    parser = Parser(__doc__)
    parser.add_argument(
        "--student", type=Path, required=True, help="folder of a finished run, such as out/toy2d"
    )
    parser.add_argument("--n", type=int, default=10_000, help="number of samples (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--out", type=Path, help="folder to write to (default STUDENT/samples)")
    parser.add_argument(
        "--trajectory", action="store_true", help="keep x at every step, noise first"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="toys: cpu"
    )
    try:
        args = parser.parse_args(argv)
        if not 2 <= args.n <= 10**6 or args.seed < 0:
            raise UserError("--n must be from 2 to a million, and --seed at least 0")
        out = args.out or args.student / "samples"
        if "config.json" in contents(out):
            raise UserError(f"{out} holds a run; choose another --out")
        device = torch.device(pick_device(args.device, "cpu"))
        cfg, phases, nets = load_student(args.student, device)
        preset, began = train.PRESETS[cfg.teacher], time.time()
        c, _, shape = preset.data(cfg)(args.n, args.seed, "sample")
        z = normal((args.n, *shape), args.seed, "sample", "z").to(device)
        with torch.no_grad():
            xs = [
                x.cpu()
                for x in trajectory(nets, step_times(cfg.steps, cfg.shift), z, moe.move(c, device))
            ]
        print(
            f"{args.n} samples, {cfg.steps} network evaluations each, {time.time() - began:.2f} s"
        )
        found, files = preset.present(cfg, c, xs, args.trajectory)
        for name, content in files.items():
            write(out / name, content)
        train.show(found, out)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
