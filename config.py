"""The settings of a run: one flag each. Presets, which change them, are in presets.py."""

from dataclasses import dataclass
from functools import partial

from models import cli
from toy.mixtures import TOYS

data, method, training, memory, output = (partial(cli.option, group=group) for group in cli.GROUPS)
KINDS = ("lora", "full")
DTYPES = ("bf16", "float32")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. The defaults are the paper's if it has them."""

    teacher: str        = data("toy2d", "name of a preset: toy2d, mnist, wan22, qwen-image, ...")
    toy: str            = data("ring", "distribution of toy2d", tuple(TOYS))
    points: str         = data("", "your own data for toy2d: csv or npy, n x d, n <= 2000")
    classes: bool       = data(False, "toys: condition on the class")
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
    truncate: bool      = method(True, "gradient through one step (SGTS), not through all")
    depths: str         = method("drawn", "truncation depth: one drawn per batch, or every one in "
                                 "each batch", ("drawn", "mixed"))
    fake_rollout: str   = method("complete", "rollouts that the fake learns from: complete; "
                                 "truncated, as the student's; truncated, with a fake per depth",
                                 ("complete", "truncated", "per-depth"))
    target: str         = method("unbiased", "target of the fake: Eq. 11, or Fig. 2(c)",
                                 ("unbiased", "biased"))
    kl_weight: str      = method("paper", "weight of the student's gradient; paper: Eq. 10",
                                 ("paper", "xs", "normalised", "none"))

    iters: int          = training(400, "student updates per phase", low=1)
    fake_updates: int   = training(5, "fake updates per student update", low=1)
    reuse_rollouts: bool = training(False, "fake updates of an iteration share their samples")
    warmup: int         = training(0, "fake updates before a phase's first student update", low=0)
    batch: int          = training(64, "samples per update", low=1)
    micro_batch: int    = training(0, "samples per forward; 0: as many as share a depth", low=0)
    train_student: str  = training("lora", "what the student's experts train", KINDS)
    train_fake: str     = training("full", "what the fakes train", KINDS)
    rank: int           = training(64, "rank of the adapters", low=1)
    alpha: float        = training(8.0, "adapters add alpha / rank up(down(x))", above=0)
    lr: float           = training(5e-5, "rate of the student; 2e-6 where full", above=0, high=1)
    fake_lr: float      = training(4e-7, "rate of the fakes; 5e-5 where lora", above=0, high=1)
    lr_decay: float     = training(0.0, "last part of a phase, in which rates fall to 0", low=0,
                                   high=1)
    seed: int           = training(0, "seed of all random numbers", low=0)

    dtype: str          = memory("bf16", "inside large networks; all else is float32", DTYPES)
    checkpointing: bool = memory(True, "recompute activations in backward")
    base: str           = memory("float", "int8: the teacher's layers in half the memory",
                                 ("float", "int8"))
    compile: bool       = memory(False, "torch.compile the blocks of large networks")

    save_every: int     = output(200, "iterations between checkpoints for --resume", low=1)
    sample_every: int   = output(0, "iterations between previews; 0: none", low=0)
    eval_samples: int   = output(10_000, "samples behind each metric", low=2)
# fmt: on

    def guidance_of(self, branch: int) -> float:
        """The CFG scale of a branch of the teacher."""
        return self.guidance[min(branch, len(self.guidance)) - 1]

    @property
    def fake_per_depth(self) -> bool:
        """Whether every truncation depth has a fake of its own."""
        return self.fake_rollout == "per-depth"
