"""The presets: what each teacher needs in place of the paper's settings, and who provides it.

A preset is what a module such as toy/toy2d.py provides (runs.Preset), and settings.
"""

from dataclasses import replace

from config import Config
from models import cli, runs, teachers
from models.common import UserError
from models.parallel import SINGLE, Topology
from phases import Phase, make_phases, split_batch
from toy import digits, toy2d

TOY = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0, kl_weight="xs", depths="mixed", warmup=200, batch=256, train_student="full", lr=1e-3,
    fake_lr=2e-3, lr_decay=0.5, checkpointing=False,
)  # fmt: skip
DIGIT_SETTINGS = dict(  # small enough for float32, and for no need to save memory
    guidance=(2.0,), size=("32x32",), shift=3.0, kl_weight="none", depths="mixed", fake_updates=3,
    reuse_rollouts=True, warmup=50, train_student="full", lr=3e-4, fake_lr=1e-3, lr_decay=0.5,
    dtype="float32", checkpointing=False,
)  # fmt: skip
LARGE = dict(train_fake="lora", micro_batch=1, sample_every=50, save_every=50, eval_samples=4)
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
    rates = {
        "lr": LEARNING_RATES[cfg.train_student][0],
        "fake_lr": LEARNING_RATES[cfg.train_fake][1],
    }
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
    if not cfg.truncate and cfg.fake_per_depth:
        raise UserError("--fake-rollout per-depth needs --truncate: there are no depths without")
    depths = phases_of(cfg)[0].num_steps
    sizes = split_batch(cfg.batch, cfg.micro_batch, depths, cfg.depths == "mixed", 0.0)
    count = sum(n > 0 for n, _ in sizes)
    if cfg.depths == "mixed" and cfg.truncate and count % depths:
        raise UserError(
            f"--depths mixed: expected a multiple of {depths} micro-batches, one per depth, got "
            f"{count}; change --batch or --micro-batch"
        )
