"""The few-step sampler, for a student, its phases while training, and a teacher alike.

python sample.py --student out/toy2d                     a picture, an array and numbers
python sample.py --student out/toy2d --trajectory        with x at every step
python sample.py --student out/wan22 --prompt "A fox runs through snow." --size 480x832 --frames 81
python sample.py --teacher wan22 --prompt "A fox runs through snow."          the teacher, 40 steps
python sample.py --teacher wan22 --lora high.safetensors low.safetensors --prompt "A fox."
python sample.py --student out/wan22 --export DIR        for diffusers, ComfyUI and others
"""

import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import moe
from models import export, parallel
from models.draws import normal
from models.flags import Parser, exit_status, pick_device
from models.folder import clear_samples, config_of, contents, hashes, make
from models.files import UserError, read_json, verified, write
from models.large import is_random
from models.sampling import Wear, read_latents, student_wear, teacher_times, worn
from models.wan import Wan
from models.weights import TEACHERS
from phases import Phase, step_times
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


class Source(NamedTuple):
    """What is sampled: who takes which step. Nothing is loaded yet."""

    cfg: object  # train.Config
    times: tuple[float, ...]
    roles: list[str]  # who takes each step
    experts: dict[str, int]  # role -> the teacher's expert whose network it is on
    wear: Callable  # wear(role) -> sampling.Wear, what makes that network the role's
    home: Path  # the run's folder
    student: export.Student | None = None


def opened_student(args) -> tuple[export.Student, Path]:
    """A finished student whose file is whole, and its run's folder. Raises UserError."""
    import train  # knows the presets; it imports this file for the sampler

    file = args.student if args.student.is_file() else args.student / "student.safetensors"
    home = file.parent if file.name == "student.safetensors" else file.parent.parent  # of looks/
    advice = f"train it again with: python train.py --out {home} --overwrite"
    if (home / "README.md").is_file() and not file.is_file():
        raise UserError(f"{home} is an export: sample it with --teacher NAME --lora {home}")
    if not file.is_file() or not (home / "config.json").is_file():
        raise UserError(f"{home} holds no run with a student.safetensors; {NO_RUN}")
    config = read_json(home / "config.json", advice)
    cfg = config_of(train.Config, config, home)
    if args.weights:
        was_random = cfg.teacher in TEACHERS and is_random(cfg)
        cfg = replace(cfg, weights=tuple(map(train.in_full, args.weights)))
        if cfg.teacher in TEACHERS and is_random(cfg) != was_random:
            print("note: of student and --weights one is of random weights, the other not")
    train.validate(cfg, files=False)
    preset, phases = train.PRESETS[cfg.teacher], train.phases_of(cfg)
    check_base(config["files"], preset.base(cfg), bool(args.weights))
    opened, about = verified(file, "student", config["settings"], advice)
    if about["phase"] < len(phases):
        said = f"{file} is of phase {about['phase']} of {len(phases)}"
        raise UserError(f"{said}: not a whole student")
    boundary_t = preset.boundary(cfg)
    homes = {role: moe.expert_of(role, phases, boundary_t) for role in moe.owners(phases)}
    return export.Student(cfg, phases, boundary_t, homes, opened), home


def check_base(files: dict[str, str], base: list[Path], moved: bool) -> None:
    """Raise UserError where a base has changed since the run; with --weights only say so."""
    then = list(files.values())[: len(base)]  # a run's files begin with its base, expert by expert
    unlike = [path for path, a, b in zip(base, then, hashes(base).values()) if a != b]
    if len(then) == len(base) and not unlike:
        return
    if not moved:
        raise UserError(
            f"{(unlike or base)[0]} has changed since the run began; bring the old one back"
        )
    print("note: --weights are not the files that the student was trained on: another layout, "
          "or other weights")  # fmt: skip


def student_of(args) -> Source:
    """The student of a finished folder, or of one of its looks/*.safetensors. Raises UserError."""
    refused = [name for name in ("steps", "shift", "guidance", "lora") if args.given(name)]
    if refused:
        raise UserError(f"--{refused[0]} is for --teacher; a student has its own steps, and no CFG")
    student, home = opened_student(args)
    cfg = changed(replace(student.cfg, guidance=(1.0,)), args)
    times, roles = step_times(cfg.steps, cfg.shift), moe.owners(student.phases)
    wear = partial(student_wear, cfg, student.file)
    return Source(cfg, times, roles, student.homes, wear, home, student)


def changed(cfg, args):
    """The settings as the flags of this command change them. Raises UserError."""
    import train

    cfg = replace(cfg, dtype=args.dtype) if args.dtype else cfg
    args.n = train.PRESETS[cfg.teacher].samples if args.n is None else args.n
    return train.PRESETS[cfg.teacher].settled(cfg, args)


def teacher_settings(args):
    """The settings of a preset for sampling its teacher, as published, or with a LoRA."""
    import train

    steps = TEACHERS[args.teacher].usual[0] if args.teacher in TEACHERS else 40
    given = {"steps": 4, "guidance": (1.0,), "generator": "lora"} if args.lora else {"steps": steps}
    given |= {name: getattr(args, name) for name in ("steps", "shift") if args.given(name)}
    given |= {"guidance": tuple(args.guidance)} if args.guidance else {}
    given |= {"weights": tuple(map(train.in_full, args.weights))}
    cfg = changed(train.config(args.teacher, **given, phases=1), args)
    train.validate(cfg, files=False)
    train.PRESETS[cfg.teacher].base(cfg)
    return cfg


def teacher_of(args) -> Source:
    """The teacher itself, or with LoRA files that were made of it. Raises UserError."""
    import train

    train.check_teacher(SimpleNamespace(teacher=args.teacher))
    if args.lora and args.teacher not in TEACHERS:
        raise UserError(f"--lora is for large teachers, not for {args.teacher}")
    cfg = teacher_settings(args)
    boundary_t = train.PRESETS[cfg.teacher].boundary(cfg)
    home = args.out or Path("out") / f"{args.teacher}-{'lora' if args.lora else 'samples'}"
    times = step_times(cfg.steps, cfg.shift)
    if args.lora:
        one = worn(cfg, args.lora, bool(args.steps or args.shift), times, boundary_t)
        return Source(cfg, one.times, one.roles, one.experts, one.wear, home)
    if args.teacher in TEACHERS:
        times = teacher_times(cfg, args.shift)
    roles = [moe.teacher_role(moe.expert_at(t, boundary_t)) for t in times[:-1]]
    experts = {moe.teacher_role(e): e for e in (1, 2)}
    return Source(cfg, times, roles, experts, lambda role: Wear(), home)


def asked(source: Source, args, out: Path, device) -> tuple:
    """Settings, conditions, names and x at every time of the samples, and a line about them."""
    import train

    ask = train.PRESETS[source.cfg.teacher].ask
    cfg, c, shape, names = ask(source.cfg, args, out, source.home, device)
    make(out)  # what cannot be written shows now
    source, total, began = source._replace(cfg=cfg), len(names) or args.n, time.time()
    xs = drawn(source, c, shape, total, args, device)
    how = f"{evaluations(source)} network evaluations each, {time.time() - began:.2f} s"
    print(f"{total} sample{'s' * (total > 1)}, {how}{official(args)}")
    return cfg, c, names, xs


def drawn(source: Source, c, shape, total: int, args, device) -> list[Tensor]:
    """x at every time, on the CPU. The networks are gone when this returns."""
    import train

    cfg, n = source.cfg, args.n
    velocity = train.PRESETS[cfg.teacher].sampler(
        cfg, source.experts, source.wear, device, source.home, args.offload
    )
    z = torch.stack([normal(shape, args.seed, "sample", j, "z") for j in range(n)])
    z = z.repeat(total // n, *[1] * len(shape)).to(device)  # every prompt sees the same noises
    with tqdm(total=len(source.roles) * total, unit=" evaluations", disable=None) as bar:
        nets = [counted(partial(velocity, role), bar) for role in source.roles]
        nets = [moe.in_passes(net, cfg.micro_batch or total) for net in nets]
        xs = []
        with torch.no_grad():
            for x in trajectory(nets, source.times, z, moe.move(c, device)):
                xs = [*(xs if args.trajectory else []), x.cpu()]
        return xs


def counted(net: Callable, bar: tqdm) -> Callable:
    """The network, which moves the bar."""

    def asked(x_t, t, c=None):
        v = net(x_t, t, c)
        bar.update(len(x_t))
        return v

    return asked


def evaluations(source: Source) -> int:
    """Of a network, for one sample: a guided step asks twice."""
    scales = source.cfg.guidance
    scale = lambda role: scales[min(source.experts[role], len(scales)) - 1]
    guided = lambda role: scale(role) != 1 and source.cfg.teacher in TEACHERS
    return sum(1 + guided(role) for role in source.roles)


def work(args) -> None:
    """Sample, or export. Raises UserError."""
    import train

    check_args(args)
    source = student_of(args) if args.student else teacher_of(args)
    preset = train.PRESETS[source.cfg.teacher]
    if args.export:
        return exported(source, args)
    out = args.out or default_out(source, args)
    check_out(out)
    args.about = told(source, args)
    args.title = f"{args.student or args.teacher}, {len(source.roles)} steps"
    device = torch.device(pick_device(args.device, preset.device))
    if args.decode:
        cfg, c, (names, xs) = source.cfg, None, read_latents(source.cfg, args)
    else:
        cfg, c, names, xs = asked(source, args, out, device)
    found, files = preset.present(cfg, c, xs, args, names, device)
    files = iter(files)
    first = next(files)  # earlier pictures stay until there is something new
    clear_samples(out)
    for name, content in chain([first], files):
        write(out / name, content)
    train.show(found, out)


def default_out(source: Source, args) -> Path:
    """Where samples go: in the run's folder, those of a look in one of their own."""
    if not args.student:
        return source.home
    look = args.student.is_file() and args.student.name != "student.safetensors"
    return source.home / ("samples" + (f"-{args.student.stem}" if look else ""))


def told(source: Source, args) -> dict:
    """What made the samples, for the header of their latents."""
    cfg = source.cfg
    about = (
        {"student": str(args.student)}
        if args.student
        else {"lora": list(map(str, args.lora or ()))}
    )
    about |= {"times": source.times, "guidance": cfg.guidance, "seed": args.seed, "n": args.n}
    about |= {"size": cfg.size, "frames": cfg.frames, "prompt": args.prompt}
    return about | {"prompts": args.prompts and str(args.prompts)}


def official(args) -> str:
    """What the published sampler of a teacher does otherwise."""
    row = TEACHERS.get(args.teacher)
    theirs = row and not args.lora and row.network is Wan and not row.folder
    return "; Euler steps, where the official sampler takes UniPC's" if theirs else ""


def exported(source: Source, args) -> None:
    """Files for other tools, and what they are."""
    if source.student is None:
        raise UserError("--export is for a student: --student DIR")
    if source.cfg.teacher not in TEACHERS:
        raise UserError(f"--export is for students of large teachers, not of {source.cfg.teacher}")
    for path in export.export(source.student, args.export, args.merge, args.bf16):
        print(f"{path.stat().st_size / 1e6:12.3f} MB  {path}")


def check_out(out: Path) -> None:
    """Raise UserError for a folder with other things in it than earlier samples."""
    held = contents(out)
    if "config.json" in held:
        raise UserError(f"{out} holds a run; choose another --out")
    others = sorted(n for n in held if not SAMPLES.fullmatch(n) and not n.startswith("."))
    if others:
        raise UserError(f"{out} holds other things ({others[0]}); choose another --out")
    if out.exists() and not os.access(out, os.W_OK):
        raise UserError(f"{out} cannot be written to; choose another --out")


def check_args(args) -> None:
    """Raise UserError for flags that do not go together."""
    if args.student and args.teacher:
        raise UserError("--student or --teacher, not both")
    if not (args.student or args.teacher):
        raise UserError(f"{NO_RUN}, or --teacher the name of one")
    if not 1 <= (1 if args.n is None else args.n) <= 10**6 or args.seed < 0:
        raise UserError("--n must be from 1 to a million, and --seed at least 0")
    if args.decode and (args.latents or args.export):
        raise UserError("--decode makes pictures of latents; drop the other")
    if (args.merge or args.bf16) and not args.export:
        raise UserError("--merge and --bf16 are of --export DIR")
    if not 1 <= (1 if args.steps is None else args.steps) <= 1000:
        raise UserError("--steps must be from 1 to 1000")
    if not 0 < (1 if args.shift is None else args.shift) < 100:
        raise UserError("--shift must be above 0 and below 100")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty")
    drawing = ("prompt", "prompts", "image", "n")
    for name in (*drawing, "size", "frames", "out", "decode", "dtype"):
        if args.export and args.given(name):
            raise UserError(f"--{name} is for samples; --export makes none")
        if args.decode and args.given(name) and name in drawing:
            raise UserError(f"--{name} is for new samples; --decode takes those of a file")


def parser() -> Parser:
    """The flags."""
    made = Parser(__doc__)
    add = made.add_argument
    # fmt: off
    add("--student", type=Path,
        help="folder of a finished run, such as out/toy2d, or a file of its looks/")
    add("--teacher", help="sample a teacher in place of a student: wan22, mnist, toy2d, ...")
    add("--n", type=int, help="samples, of each prompt (default: toys 10000, mnist 1000, others 4)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--out", type=Path, help="folder (default STUDENT/samples, out/TEACHER-samples, -lora)")
    add("--trajectory", action="store_true", help="keep x at every step, noise first")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="toys: cpu")
    group = made.add_argument_group("large teachers")
    add = group.add_argument
    add("--prompt", help="what to show; needs the text encoder (default: prompts of the run)")
    add("--prompts", type=Path, help="text, one a line, csv, or embeddings of models.text")
    add("--image", type=Path, help="image to video: the first frame")
    add("--size", help="pixels, HEIGHTxWIDTH (default: the first of the run)")
    add("--frames", type=int, help="of a video, 4n + 1; 1 is a picture (default: the run's)")
    add("--weights", nargs="+", default=[], help="where they are, if not where the run had them")
    add("--dtype", choices=("bf16", "float32"), help="inside networks (default: the run's, bf16)")
    add("--offload", default="auto", choices=("auto", "none", "blocks"),
        help="blocks: they stay in host memory and come one by one (auto: if the GPU is small)")
    add("--tiles", action="store_true", help="decode in tiles: less memory, slightly other edges")
    add("--latents", action="store_true", help="latents and a preview alone, decode nothing")
    add("--decode", type=Path, metavar="FILE", help="latents of an earlier command, to be decoded")
    group = made.add_argument_group("with --teacher")
    add = group.add_argument
    add("--steps", type=int, help="(default: as published, 40 or 50; with --lora 4)")
    add("--shift", type=float, help="of the times (default: as published; with --lora 5, Qwen 3)")
    add("--guidance", type=float, nargs="+", help="one number, or high-noise low-noise; 1: none")
    add("--lora", type=Path, nargs="+", metavar="FILE",
        help="LoRA, one a transformer (or a phase, if we wrote them), or their folder; no guidance")
    group = made.add_argument_group("for other tools")
    add = group.add_argument
    add("--export", type=Path, metavar="DIR", help="write the student's LoRA files and their card")
    add("--merge", action="store_true", help="full weights, in the base's layout and names")
    add("--bf16", action="store_true", help="bf16 twins in DIR/bf16; with full weights: bf16 alone")
    # fmt: on
    return made


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 where it was stopped."""

    def run() -> None:
        args = parser().parse_args(argv)
        args.given = lambda name: getattr(args, name) not in (None, [])
        parallel.alone("sample.py")
        work(args)

    again = "the same command starts again; --decode goes on from its latents, if they are there"
    return exit_status("sample.py", run, MEMORY, again)


NO_RUN = "give --student the folder of a finished run"
SAMPLES = re.compile(r"\d+(-\d+)?\.(mp4|png)|samples\.(npy|png)|(latents|asked)\.safetensors")
MEMORY = "a smaller --n or --size, --offload blocks, --tiles, or --device cpu"

if __name__ == "__main__":
    sys.exit(main())
