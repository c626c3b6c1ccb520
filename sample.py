"""Sample a student, a preview of it, or a teacher. Export a student for other tools.

python sample.py --student out/toy2d                     a picture, an array and metrics
python sample.py --student out/toy2d --trajectory        with x at every step
python sample.py --student out/wan22 --prompt "A fox runs through snow." --size 480x832 --frames 81
python sample.py --student out/wan22/previews/phase2-000400.safetensors
python sample.py --teacher wan22 --prompt "A fox runs through snow."          the teacher, 40 steps
python sample.py --teacher wan22 --lora high.safetensors low.safetensors --prompt "A fox."
python sample.py --student out/wan22 --export DIR        for diffusers, ComfyUI and others
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import moe
from config import Config
from models import cli, common, export, parallel, runs, teachers
from models.common import UserError, normal
from models.weights import TEACHERS, RoleWeights, student_weights
from phases import branch_at, step_times, trajectory
from presets import make_config, phases_of, preset_of, validate


class Job(NamedTuple):
    """What is sampled: which role takes which step. No network is loaded yet."""

    cfg: Config
    roles: list[str]  # the name of the role of each step
    times: tuple[float, ...]
    branch_of: dict[str, int]  # role -> the teacher's branch whose network it is on
    weights_of: Callable[[str], RoleWeights]
    run_dir: Path
    student: export.Student | None = None


def student_job(args) -> Job:
    """The steps of a finished student, or of a preview of its last phase."""
    given = given_flags(args, "steps", "shift", "times", "guidance", "lora")
    if given:
        raise UserError(f"--{min(given)} is for --teacher: a student has its own steps and no CFG")
    student, run_dir = open_student(args)
    cfg = override_config(replace(student.cfg, guidance=(1.0,)), args)
    roles = [f"student{phase.k}" for phase in student.phases for _ in range(phase.num_steps)]
    weights_of = partial(student_weights, cfg, student.file)
    return Job(cfg, roles, tuple(student.times), student.branch_of, weights_of, run_dir, student)


def open_student(args) -> tuple[export.Student, Path]:
    """Open a student, and check that its teacher is the one that it was trained on."""
    file = args.student / "student.safetensors" if args.student.is_dir() else args.student
    run_dir = file.parent.parent if file.parent.name == "previews" else file.parent
    if not file.is_file() or not (run_dir / "config.json").is_file():
        expected = "the folder of a finished run or a file of its previews/"
        advice = "sample exported LoRA files with --teacher NAME --lora FILE"
        raise UserError(f"--student: expected {expected}, got {args.student}; {advice}")
    advice = f"train it again with: python train.py --out {run_dir} --overwrite"
    config = common.read_json(run_dir / "config.json", advice)
    cfg = runs.config_from_json(config, run_dir)
    tensors, metadata = common.open_tensors(file, "student", advice)
    with common.reading(file, advice):
        last_phase = int(metadata["phase"])
        if not runs.is_same_run(metadata["settings"], config["settings"]):
            raise UserError(f"{file} belongs to a run with other settings; {advice}")
    if args.weights:
        cfg = replace(cfg, weights=cli.absolute_paths(tuple(args.weights)))
    validate(cfg)
    preset = preset_of(cfg)
    phases = phases_of(cfg)
    check_base(config["files"], preset.base_files(cfg), bool(args.weights))
    if last_phase < len(phases):
        found = f"{last_phase} of {len(phases)} phases"
        raise UserError(f"{file} contains {found}; wait for a later preview")
    boundary_t = preset.boundary_of(cfg)
    branch_of = {f"student{phase.k}": moe.start_branch(phase, boundary_t) for phase in phases}
    return export.Student(cfg, phases, boundary_t, branch_of, tensors), run_dir


def check_base(digests: dict[str, str], base: list[Path], moved: bool) -> None:
    """Raise UserError if the teacher has changed since the run. With --weights, print a note."""
    then = list(digests.values())[: len(base)]  # the input files of a run begin with its base
    if then == list(common.digest_files(base).values()):
        return
    if not moved:
        raise UserError(
            f"{base[0]} or another file of the teacher has changed since the run; "
            "restore it or name the old files with --weights"
        )
    print("note: the student was trained on other files than --weights: another layout, or values")


def teacher_job(args) -> Job:
    """The steps of a teacher's published sampler, or those of LoRA files."""
    cfg = teacher_config(args)
    preset_of(cfg).base_files(cfg)
    boundary_t = preset_of(cfg).boundary_of(cfg)
    times = step_times(cfg.steps, cfg.shift)
    if args.lora:
        own_steps = given_flags(args, "steps", "shift", "times")
        times = given_times(args) or times
        assignment = export.assign_loras(cfg, args.lora, bool(own_steps), times, boundary_t)
        weights_of = partial(export.lora_weights, cfg, assignment)
        run_dir = args.out or Path("out") / f"{args.teacher}-lora"
        steps = assignment.roles, assignment.times, assignment.branch_of
        return Job(cfg, *steps, weights_of, run_dir)
    if args.teacher in TEACHERS:
        times = teachers.teacher_times(cfg, args.shift)
    roles = [f"teacher{branch_at(t, boundary_t)}" for t in times[:-1]]
    run_dir = args.out or Path("out") / f"{args.teacher}-samples"
    return Job(cfg, roles, times, {"teacher1": 1, "teacher2": 2}, lambda _: RoleWeights(), run_dir)


def teacher_config(args) -> Config:
    """The settings of a teacher's published sampler, or of LoRA files, and the flags."""
    spec = TEACHERS.get(args.teacher)
    if args.lora and not spec:
        raise UserError(f"--lora is for large teachers, not for {args.teacher}")
    if args.times and (not args.lora or given_flags(args, "steps", "shift")):
        raise UserError("--times is for --lora, in place of --steps and --shift")
    settings = {"steps": spec.sampling_defaults[0] if spec else 40}
    if args.lora:
        settings = {"steps": 4, "guidance": (1.0,), "train_student": "lora"}
    settings |= given_flags(args, "steps", "shift")
    if args.guidance:
        settings["guidance"] = tuple(args.guidance)
    weights = cli.absolute_paths(tuple(args.weights))
    cfg = make_config(args.teacher, **settings, weights=weights, phases=1, depths="drawn")
    cfg = override_config(cfg, args)
    validate(cfg)
    return cfg


def given_times(args) -> tuple[float, ...] | None:
    """The times of --times, from t x 1000, and 0."""
    if not args.times:
        return None
    times = (*(t / 1000 for t in args.times), 0.0)
    if times[0] > 1 or not all(t > end for t, end in zip(times, times[1:])):
        found = " ".join(f"{t:g}" for t in args.times)
        raise UserError(f"--times: expected numbers that fall from 1000, got {found}")
    return times


def given_flags(args, *names: str) -> dict:
    """The flags among these that the command names, with their values."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def override_config(cfg: Config, args) -> Config:
    """The settings with the flags of this command."""
    preset = preset_of(cfg)
    args.n = args.n or preset.num_samples
    return preset.apply_flags(replace(cfg, **given_flags(args, "dtype", "base")), args)


def run_sampler(job: Job, c, shape: tuple, total: int, args, device) -> list[Tensor]:
    """x at every time if --trajectory, else at the last, on the CPU. Prints the NFE."""
    cfg = job.cfg
    nfe = step_nfe(job)
    began = time.time()
    velocity = preset_of(cfg).make_sampler(cfg, job.branch_of, job.weights_of, device, job.run_dir)
    z = torch.stack([normal(shape, args.seed, "sample", j, "z") for j in range(args.n)])
    z = z.repeat(total // args.n, *[1] * len(shape)).to(device)  # the same noises for each prompt
    size = cfg.micro_batch or total
    bar = tqdm(total=sum(nfe) * total, unit=" NFE", disable=None)

    def call(name: str, evaluations: int, x_t: Tensor, t: Tensor, c: dict | None) -> Tensor:
        v = velocity(name, x_t, t, c)
        bar.update(evaluations * len(x_t))
        return v

    nets = [moe.chunked(partial(call, name, count), size) for name, count in zip(job.roles, nfe)]
    with bar, torch.no_grad():
        xs = []
        for x in trajectory(nets, job.times, z, moe.cond_to(c, device)):
            if not args.trajectory:
                xs.clear()  # only the last is asked for, and videos are large
            xs.append(x.cpu())
    count = f"samples: {total}, {sum(nfe)} network evaluations (NFE) each"
    print(f"{count}, {time.time() - began:.2f} s")
    spec = TEACHERS.get(args.teacher)
    if spec and not args.lora and not spec.folder and spec.network.official_sampler != "Euler":
        print(f"note: Euler steps, where the official sampler uses {spec.network.official_sampler}")
    return xs


def step_nfe(job: Job) -> list[int]:
    """Network evaluations (NFE) of each step: two where CFG needs the null prompt."""
    if job.cfg.teacher not in TEACHERS:
        return [1] * len(job.roles)
    scales = [job.cfg.guidance_of(job.branch_of[name]) for name in job.roles]
    return [1 if scale == 1 else 2 for scale in scales]


def sample_metadata(job: Job, args) -> dict:
    """What made the samples, for the header of their latents."""
    given = given_flags(args, "seed", "n", "prompt", "prompts", "image", "student", "lora")
    metadata = {name: x if isinstance(x, (int, str)) else str(x) for name, x in given.items()}
    cfg = job.cfg
    return metadata | dict(times=job.times, guidance=cfg.guidance, size=cfg.size, frames=cfg.frames)


def run_command(args) -> None:
    """Sample, or export."""
    parallel.require_single_process("sample.py")
    job = student_job(args) if args.student else teacher_job(args)
    preset = preset_of(job.cfg)
    out = args.out or job.run_dir
    if args.export:
        if job.student is None or job.cfg.teacher not in TEACHERS:
            raise UserError("--export is for students of large teachers: --student DIR")
        for path in export.export_student(job.student, args.export):
            print(f"{path.stat().st_size / 1e6:12.3f} MB  {path}")
        return
    if args.student and not args.out:
        is_preview = args.student.parent.name == "previews"
        out = job.run_dir / ("samples" + (f"-{args.student.stem}" if is_preview else ""))
    contents = runs.folder_contents(out)
    if contents and not contents & {"latents.safetensors", "samples.npy"}:
        expected = "expected a new folder or one of earlier samples"
        raise UserError(f"--out: {expected}, {out} contains {min(contents)}; choose another --out")
    args.metadata = sample_metadata(job, args)
    args.title = f"{args.student or args.teacher}, {len(job.roles)} steps"
    device = torch.device(cli.pick_device(args.device, preset.device))
    with runs.own_folder(out):
        cfg, c, shape, names = preset.sample_inputs(job.cfg, args, out, job.run_dir, device)
        total = len(names) or args.n
        xs = run_sampler(job._replace(cfg=cfg), c, shape, total, args, device)
        metrics, files = preset.save_samples(cfg, c, xs, args, names, device)
        runs.remove_files(out, runs.SAMPLE_FILES)  # new ones may be fewer
        for name, content in files:
            common.write_file(out / name, content)
        runs.print_metrics(metrics, out)


def positive(text: str) -> int:
    """A positive integer. Raises ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--student", type=Path, help="folder of a finished run, or a file of its previews/")
    source("--teacher", help="sample a teacher instead: wan22, mnist, toy2d, ...")
    add = parser.add_argument
    add("--n", type=positive, help="samples, of each prompt (toys 10000, mnist 1000, others 4)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--out", type=Path, help="folder (default STUDENT/samples, out/TEACHER-samples, -lora)")
    add("--trajectory", action="store_true", help="keep x at every step, noise first")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="toys: cpu")
    add("--export", type=Path, metavar="DIR", help="write files for other tools; sample nothing")
    group = parser.add_argument_group("large teachers")
    add = group.add_argument
    prompt = group.add_mutually_exclusive_group().add_argument
    prompt("--prompt", help="what to show; needs the text encoder (default: prompts of the run)")
    prompt("--prompts", type=Path, help="txt, one per line, csv, tsv, jsonl, or embeddings")
    add("--image", type=Path, help="image to video: the first frame")
    add("--size", help="pixels, HEIGHTxWIDTH (default: the first of the run)")
    add("--frames", type=int, help="frames of a video, 4n + 1; 1: a picture (default: the run's)")
    add("--weights", nargs="+", default=[], help="where they are, if not where the run had them")
    add("--dtype", choices=("bf16", "float32"), help="inside networks (default: the run's)")
    add("--base", choices=("float", "int8"), help="int8: half the memory (default: the run's)")
    add = parser.add_argument_group("with --teacher").add_argument
    add("--steps", type=positive, help="number of steps (default: as published; with --lora 4)")
    add("--shift", type=float, help="of the times (default: as published; with --lora 5, Qwen 3)")
    help = "with --lora, in place of both: t x 1000 of each step, such as 1000 752 522"
    add("--times", type=float, nargs="+", metavar="T", help=help)
    add("--guidance", type=float, nargs="+", help="CFG scale, or two: high noise, low noise")
    add(
        "--lora",
        nargs="+",
        metavar="FILE[:STRENGTH]",
        help="LoRA files or their folder. Two files: one per transformer, told apart by high and "
        "low in their names, else high noise first. Otherwise by name; one without is for both",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 for Ctrl-C."""
    advice = "try a smaller --n, --size or --frames, or --device cpu"
    work = lambda: run_command(make_parser().parse_args(argv))
    return cli.exit_status("sample.py", work, advice)


if __name__ == "__main__":
    sys.exit(main())
