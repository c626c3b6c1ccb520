"""The settings of a run, and the presets: what each teacher needs in place of the paper's values.

A preset is what a module such as toy/toy2d.py provides (runs.Preset), and settings.
"""

from dataclasses import dataclass, replace
from functools import partial

from models import cli, runs, teachers
from models.common import UserError
from models.parallel import SINGLE, Topology
from phases import Phase, make_phases, split_batch
from toy import digits, toy2d

data, method, training, memory, output = (partial(cli.option, group=group) for group in cli.GROUPS)
ON_OFF, KINDS, DTYPES = ("on", "off"), ("lora", "full"), ("bf16", "float32")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. The defaults are the paper's, where it gives them."""

    teacher: str        = data("toy2d", "name of a preset: toy2d, mnist, wan22, qwen-image, ...")
    toy: str            = data("ring", "distribution of toy2d", tuple(toy2d.TOYS))
    points: str         = data("", "your own data for toy2d: csv or npy, n x d, n <= 2000")
    classes: str        = data("off", "toys: condition on the class", ON_OFF)
    boundary: float     = data(0.0, "toy2d: the teacher has two branches, which meet at this t; 0: "
                               "one branch", low=0, high=1)
    guidance: tuple     = data((1.0,), "CFG scale of the teacher, or two: high noise, low noise",
                               kind=float, low=0)
    weights: tuple      = data((), "published weights: a folder, or a path per branch (high noise "
                               "first), or `random` (default weights/NAME)", kind=str)
    teacher_lora: tuple = data((), "LoRA to merge into the teacher: FILE[:STRENGTH] ..., "
                               "see sample.py --lora", kind=str)
    prompts: str        = data("", "txt, one prompt per line, csv, tsv, jsonl, or embeddings")
    images: str         = data("", "image to video: first frames made by models.encoders")
    size: tuple         = data((), "pixels, [FRAMESx]HEIGHTxWIDTH[:PROBABILITY] ...", kind=str)
    frames: int         = data(1, "frames of a video, 4n + 1", low=1)

    phases: int         = method(2, "K, a divisor of --steps; 1 is DMD2", low=1)
    steps: int          = method(4, "N, steps of the student", low=1, high=1000)
    shift: float        = method(5.0, "of the times: t = shift u / (1 + (shift - 1) u)", low=0.01,
                                 high=100)
    interval: str       = method("nested", "re-noise in (s, 1), or in (s, start of the phase)",
                                 ("nested", "disjoint"))
    fix_t: float        = method(0.0, "re-noise at this t alone (Fig. 11); 0: off", low=0, high=1)
    truncate: str       = method("on", "gradient through one step (SGTS), or through all", ON_OFF)
    depths: str         = method("drawn", "truncation depth: one drawn per batch, or every one in "
                                 "each batch", ("drawn", "mixed"))
    fake_rollout: str   = method("complete", "rollouts that the fake learns from: complete; "
                                 "truncated, as the student's; truncated, with a fake per depth",
                                 ("complete", "truncated", "per-depth"))
    target: str         = method("unbiased", "target of the fake: Eq. 11, or Fig. 2(c)",
                                 ("unbiased", "biased"))
    weight: str         = method("paper", "weight of the student's gradient; paper: Eq. 10",
                                 ("paper", "xs", "normalised", "none"))

    iters: int          = training(400, "student updates per phase", low=1)
    fake_updates: int   = training(5, "fake updates per student update", low=1)
    reuse_rollouts: bool = training(False, "fake updates of an iteration share their samples")
    warmup: int         = training(0, "fake updates before a phase's first student update", low=0)
    batch: int          = training(64, "samples per update", low=1)
    micro_batch: int    = training(0, "samples per forward; 0: as many as share a depth", low=0)
    generator: str      = training("lora", "what the student's experts train", KINDS)
    fake: str           = training("full", "what the fakes train", KINDS)
    rank: int           = training(64, "rank of the adapters", low=1)
    alpha: float        = training(8.0, "adapters add alpha / rank up(down(x))", above=0)
    lr: float           = training(5e-5, "rate of the student; 2e-6 where full", above=0, high=1)
    fake_lr: float      = training(4e-7, "rate of the fakes; 5e-5 where lora", above=0, high=1)
    lr_decay: float     = training(0.0, "last part of a phase, in which rates fall to 0", low=0,
                                   high=1)
    seed: int           = training(0, "seed of all random numbers", low=0)

    dtype: str          = memory("bf16", "inside large networks; all else is float32", DTYPES)
    checkpointing: str  = memory("on", "recompute activations in backward", ON_OFF)
    base: str           = memory("float", "int8: the teacher's layers in half the memory",
                                 ("float", "int8"))
    compile: bool       = memory(False, "torch.compile the blocks of large networks")

    save_every: int     = output(200, "iterations between checkpoints for --resume", low=1)
    sample_every: int   = output(0, "iterations between previews; 0: none", low=0)
    eval_samples: int   = output(10_000, "samples behind each metric", low=2)
# fmt: on

    @property
    def fake_per_depth(self) -> bool:
        """Whether every truncation depth has a fake of its own."""
        return self.fake_rollout == "per-depth"


TOY = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0, weight="xs", depths="mixed", warmup=200, batch=256, generator="full", lr=1e-3,
    fake_lr=2e-3, lr_decay=0.5, checkpointing="off",
)  # fmt: skip
DIGIT_SETTINGS = dict(  # small enough for float32, and for no need to save memory
    guidance=(2.0,), size=("32x32",), shift=3.0, weight="none", depths="mixed", fake_updates=3,
    reuse_rollouts=True, warmup=50, generator="full", lr=3e-4, fake_lr=1e-3, lr_decay=0.5,
    dtype="float32", checkpointing="off",
)  # fmt: skip
LARGE = dict(fake="lora", micro_batch=1, sample_every=50, save_every=50, eval_samples=4)
VIDEO = LARGE | dict(frames=81, size=("480x832:0.4", "832x480:0.4", "720x1280:0.1", "1280x720:0.1"))
QWEN = dict(shift=3.0, guidance=(4.0,), size=(
    "1328x1328", "1664x928", "928x1664", "1472x1104", "1104x1472", "1584x1056", "1056x1584",
))  # fmt: skip
TINY = LARGE | dict(
    iters=4, batch=4, micro_batch=2, sample_every=2, save_every=2, rank=4, fake_updates=2
)
CLIP = TINY | dict(frames=9, size=("48x64", "64x48"))
# fmt: off
PRESETS = {  # teacher: (what it provides, settings)
    "toy2d":           (toy2d.PRESET,    TOY),
    "mnist":           (digits.PRESET,   DIGIT_SETTINGS),
    "wan21-1.3b":      (teachers.PRESET, VIDEO | dict(guidance=(6.0,))),
    "wan21":           (teachers.PRESET, LARGE | dict(guidance=(5.0,), size=("720x1280",))),
    "wan22":           (teachers.PRESET, VIDEO | dict(guidance=(4.0, 3.0))),
    "wan22-i2v":       (teachers.PRESET, VIDEO | dict(guidance=(3.5, 3.5))),
    "wan22-5b":        (teachers.PRESET, VIDEO | dict(guidance=(5.0,), size=("704x1280",))),
    "qwen-image":      (teachers.PRESET, LARGE | QWEN),
    "wan21-tiny":      (teachers.PRESET, CLIP | dict(guidance=(5.0,))),
    "wan22-tiny":      (teachers.PRESET, CLIP | dict(guidance=(4.0, 3.0))),
    "wan22-i2v-tiny":  (teachers.PRESET, CLIP | dict(guidance=(3.5, 3.5))),
    "qwen-image-tiny": (teachers.PRESET, TINY | QWEN | dict(size=("64x96", "96x64"))),
}
# fmt: on
LEARNING_RATES = {"lora": (5e-5, 5e-5), "full": (2e-6, 4e-7)}  # of student and fake


def find_preset(teacher: str) -> tuple[runs.Preset, dict]:
    """A preset and its settings, by name. Raises UserError."""
    if teacher not in PRESETS:
        raise UserError(f"--teacher: expected one of {', '.join(PRESETS)}, got {teacher}")
    return PRESETS[teacher]


def make_config(teacher: str = "toy2d", **settings) -> Config:
    """The settings of a preset, changed where `settings` says so. Raises UserError."""
    settings = find_preset(teacher)[1] | {"teacher": teacher} | settings
    cfg = Config(**settings)
    rates = {"lr": LEARNING_RATES[cfg.generator][0], "fake_lr": LEARNING_RATES[cfg.fake][1]}
    return replace(cfg, **{name: lr for name, lr in rates.items() if name not in settings})


def preset_of(cfg: Config) -> runs.Preset:
    """What the teacher of the settings provides."""
    return find_preset(cfg.teacher)[0]


def phases_of(cfg: Config) -> list[Phase]:
    """The phases of the settings. Raises UserError if they make none."""
    boundary_t = preset_of(cfg).boundary_of(cfg)
    try:
        return make_phases(cfg.steps, cfg.phases, cfg.shift, cfg.interval, boundary_t, cfg.fix_t)
    except ValueError as error:
        raise UserError(str(error)) from None


def validate(cfg: Config, topology: Topology = SINGLE) -> None:
    """Raise UserError for settings that cannot make a run on these ranks. Reads no input file."""
    cli.check_values(cfg)
    preset_of(cfg).check_config(cfg, topology)
    if cfg.truncate == "off" and cfg.fake_per_depth:
        raise UserError("--fake-rollout per-depth needs --truncate on: there are no depths without")
    depths = phases_of(cfg)[0].num_steps
    sizes = split_batch(cfg.batch, cfg.micro_batch, depths, cfg.depths == "mixed", 0.0)
    count = sum(n > 0 for n, _ in sizes)
    if cfg.depths == "mixed" and cfg.truncate == "on" and count % depths:
        raise UserError(
            f"--depths mixed: expected a multiple of {depths} micro-batches, one per depth, got "
            f"{count}; change --batch or --micro-batch"
        )
