"""The card beside exported files: how the student was trained, and how to run it elsewhere."""

import json

from models import weights
from models.qwen_image import QwenImage

DTYPE = "torch.bfloat16"
HERE = """## Where it was made

Its base is of no other tool's kind. In the repository that it comes from:

```bash
python sample.py --teacher {teacher} --lora FOLDER_OF_THIS_CARD
```
"""
LAYOUT = """## Layout

These files have the layout and the names of their base: what reads the base reads them in its
place. diffusers reads its own layout; a base in that layout gives files in it.
"""


def text(student, experts, said: list[dict], places: list, in_diffusers: bool) -> str:
    """The card, markdown. said: the metadata of each expert's file.

    places: of full weights; in_diffusers: whether those are in its layout.
    """
    row = weights.row_of(student.cfg.teacher)
    parts = [head(student, row, said), training(student, said, bool(places))]
    if row.folder and not places:
        return lines(*parts, HERE.format(teacher=student.cfg.teacher))
    if places and not in_diffusers:
        parts.append(LAYOUT)
    else:
        parts.append(diffusers(student, row, experts, said, places))
    if not places:
        parts += [comfyui(student, row, experts), *others(student, row, experts)]
    return "\n".join(parts)


def head(student, row, said) -> str:
    """What it is, in the words of a model hub."""
    cfg = student.cfg
    base = said[0]["base"]
    times = ", ".join(f"{1000 * t:.6g}" for t in json.loads(said[0]["times"])[:-1])
    how = f"in {cfg.phases} phases" if cfg.phases > 1 else "in one phase, which is DMD2"
    return lines(
        "---",
        *(["license: apache-2.0", f"base_model: {base}"] if base == row.repository else []),
        "tags: [phased-dmd, few-step, distillation]",
        "---",
        f"# {base}, {cfg.steps} steps",
        "",
        f"A student of {cfg.steps} steps, distilled by Phased DMD ({said[0]['paper']}) {how}.",
        f"Sample it with Euler steps at t x 1000 = **{times}**, and then 0 (shift {cfg.shift:g}),",
        "without guidance (CFG 1).",
        "",
    )


def lines(*texts: str) -> str:
    """Texts, a line each."""
    return "\n".join(texts)


def training(student, said, full: bool) -> str:
    """How it was trained, and what each file is."""
    cfg = student.cfg
    rank = f", rank {cfg.rank}, alpha {cfg.alpha:g}" if cfg.generator == "lora" else ""
    frames = f"{cfg.frames} frame{'s' * (cfg.frames > 1)} where they name none"
    about = {
        "base": " with ".join(said[0][key] for key in ("base", "base_lora") if key in said[0]),
        "student": f"{cfg.generator}{rank}; {cfg.iters} updates a phase at {cfg.lr:g}",
        "fake": f"{cfg.fake}, {'one a depth' if cfg.fake_per_depth else 'one'}; "
        f"{cfg.fake_updates} updates at {cfg.fake_lr:g} for each of the student",
        "batch": str(cfg.batch),
        "sizes": f"{', '.join(cfg.size)}; {frames}",
        "guidance of the teacher": ", ".join(f"{g:g}" for g in cfg.guidance)
        + " (high noise, low noise)" * (len(cfg.guidance) == 2),
        "target, weight, truncation": f"{cfg.target}, {cfg.weight}, {cfg.truncate}",
        "seed": str(cfg.seed),
        "times in the network": "rounded to bfloat16, as diffusers' pipeline does in bfloat16"
        if said[0]["timestep_rounding"] == "bf16" else "float32",
    }  # fmt: skip
    rows = [f"| {name} | {value} |" for name, value in about.items()]
    return lines(*phase_rows(said, full), "", "| trained with | |", "|---|---|", *rows, "")


def phase_rows(said, full: bool) -> list[str]:
    """A table: which phase is which transformer's, and takes which steps."""
    rows = ["| phase | transformer | steps | trained at noise (interval) |", "|---|---|---|---|"]
    for one in said:
        alone = "weights of its own" if full else "an adapter of its own"
        who = f"{one['noise']} noise" if "noise" in one else alone
        steps = ", ".join(str(1 + i) for i in json.loads(one["steps"]))
        rows.append(f"| {one['phase']} | {who} | {steps} | {one['interval']} |")
    return rows


# -- diffusers -----------------------------------------------------------------------------------


def diffusers(student, row, experts, said, places) -> str:
    """The snippet that gives these times and these experts; a test runs it."""
    cfg, qwen = student.cfg, row.network is QwenImage
    kind = "QwenImagePipeline" if qwen else "WanPipeline"
    kind = "WanImageToVideoPipeline" if row.from_image else kind
    base = row.repository if said[0]["base"] == row.repository else "FOLDER OF THE BASE"
    loads = full_loads(kind, row, experts, places) if places else lora_loads(kind, experts)
    code = [
        "import torch",
        f"from diffusers import {'' if qwen else 'AutoencoderKLWan, '}"
        f"FlowMatchEulerDiscreteScheduler, {kind}",
        *(["from diffusers import " + network(qwen)] if places else []),
        "",
        f'base, here = "{base}", "."  # here: the folder of this card',
        *loads,
        *schedule(cfg, qwen),
        'pipe.to("cuda")  # or pipe.enable_model_cpu_offload(): one network at a time',
        "",
        *call(cfg, row, kind, switching(experts)),
    ]
    why = (
        "The scheduler's own `shift` alone would be applied twice, and end at another time."
        if not qwen else "The scheduler of the base shifts by size and ends at 0.02."
    )  # fmt: skip
    held = "Held to our own sampler, with diffusers 0.42.1 and small networks."
    held += " If there is a folder bf16, it holds the same files at half the size." * (not places)
    return lines("## diffusers", "", "```python", *code, "```", why, held, "")


def network(qwen: bool) -> str:
    """diffusers' class of the transformer."""
    return "QwenImageTransformer2DModel" if qwen else "WanTransformer3DModel"


def switching(experts) -> bool:
    """Whether several experts take turns on one transformer."""
    return not experts[0].noise and len(experts) > 1


def lora_loads(kind: str, experts) -> list[str]:
    """The pipeline of the base, and its adapters."""
    code = pipeline(kind)
    for one in experts:
        file = f'pipe.load_lora_weights(here, weight_name="{one.stem}.safetensors"'
        name = f', adapter_name="{one.stem}"'
        into = ", load_into_transformer_2=True" if one.noise == "low" else ""
        code.append(f"{file}{name}{into})")
    if switching(experts):
        owners = [one.stem for one in experts for _ in range(one.phase.depths)]
        code += [
            f"experts = {json.dumps(owners)}  # of each step",
            "pipe.set_adapters(experts[0])",
            "",
            "def switch(pipe, i, t, kwargs):  # after step i: the next one's; at the end the first",
            "    pipe.set_adapters(experts[(i + 1) % len(experts)])",
            "    return kwargs",
            "",
        ]
    return code


def full_loads(kind: str, row, experts, places) -> list[str]:
    """The pipeline of the base with transformers of these files."""
    name = network(row.network is QwenImage)
    get = f"{name}.from_pretrained(here, subfolder="
    if switching(experts):
        folders = [place.as_posix() for place in places]
        owners = [k for k, one in enumerate(experts) for _ in range(one.phase.depths)]
        return [
            f"folders = {json.dumps(folders)}",
            f"nets = [{get}f, torch_dtype={DTYPE}) for f in folders]",
            f"experts = {owners}  # of each step",
            *pipeline(kind, "transformer=nets[0], "),
            "",
            "def switch(pipe, i, t, kwargs):  # after step i: the next one's; at the end the first",
            "    after = nets[experts[(i + 1) % len(experts)]]",
            "    if after is not pipe.transformer:",
            '        pipe.transformer.to("cpu")',
            '        pipe.transformer = after.to("cuda")',
            "    return kwargs",
            "",
        ]
    given = ", ".join(
        f'{slot}={get}"{place.as_posix()}", torch_dtype={DTYPE})'
        for slot, place in zip(("transformer", "transformer_2"), places)
    )
    return pipeline(kind, f"{given}, ")


def pipeline(kind: str, given: str = "") -> list[str]:
    """The base's pipeline; Wan's VAE in float32, as is usual."""
    if kind.startswith("Qwen"):
        return [f"pipe = {kind}.from_pretrained(base, {given}torch_dtype={DTYPE})"]
    vae = 'AutoencoderKLWan.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)'
    return [
        f"vae = {vae}",
        f"pipe = {kind}.from_pretrained(base, vae=vae, {given}torch_dtype={DTYPE})",
    ]


def schedule(cfg, qwen: bool) -> list[str]:
    """The scheduler with exactly the student's times."""
    if qwen:  # the pipeline hands it 1, 1 - 1/N, ...: shifted once
        return [f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={cfg.shift})"]
    return [
        "scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)",
        f"scheduler.sigma_min = 1 / {cfg.steps}",
        f"scheduler.set_shift({cfg.shift})",
        "pipe.scheduler = scheduler",
    ]


def call(cfg, row, kind: str, switches: bool) -> list[str]:
    """Sampling, and the file."""
    *frames, height, width = cfg.size[0].partition(":")[0].split("x")
    about = [f"num_inference_steps={cfg.steps}, height={height}, width={width}"]
    about += ["callback_on_step_end=switch"] if switches else []
    story = "It begins to rain." if row.from_image else "A fox runs through snow."
    prompt = f'prompt = "{story}"'
    if kind.startswith("Qwen"):
        about.append("true_cfg_scale=1.0")
        end = 'pipe(prompt=prompt, **settings).images[0].save("image.png")'
        return [f"settings = dict({', '.join(about)})", prompt, end]
    about += ["guidance_scale=1.0", f"num_frames={frames[0] if frames else cfg.frames}"]
    image = "image=image, " if row.from_image else ""
    load = f'image = ImageOps.fit(load_image("first.png"), ({width}, {height}))'
    return [
        f"from diffusers.utils import export_to_video{', load_image' if image else ''}",
        *(["from PIL import ImageOps"] if image else []),
        f"settings = dict({', '.join(about)})",
        *([load] if image else []),
        prompt,
        f"frames = pipe({image}prompt=prompt, **settings).frames[0]",
        f'export_to_video(frames, "video.mp4", fps={row.fps})',
    ]


# -- the others ----------------------------------------------------------------------------------


def comfyui(student, row, experts) -> str:
    """A chain of nodes for each expert, with their values."""
    cfg = student.cfg
    sampling = "ModelSamplingAuraFlow" if row.network is QwenImage else "ModelSamplingSD3"
    yes = lambda said: "enable" if said else "disable"
    values = {
        "model": lambda one: f"{one.noise} noise" if one.noise else "of the base",
        "LoraLoaderModelOnly": lambda one: f"{one.stem}.safetensors, 1.0",
        sampling: lambda one: f"shift {cfg.shift:g}",
        "KSamplerAdvanced": lambda one: f"steps {cfg.steps}, cfg 1.0, euler, simple",
        "start_at_step, end_at_step": lambda one: f"{one.phase.first}, {one.phase.last}",
        "add_noise": lambda one: yes(one is experts[0]),
        "return_with_leftover_noise": lambda one: yes(one is not experts[-1]),
    }
    row_of = lambda cells: f"| {' | '.join(cells)} |"
    rows = [row_of([name, *map(value, experts)]) for name, value in values.items()]
    top = [row_of(["node", *[f"phase {one.phase.k}" for one in experts]])]
    top += ["|---" * (1 + len(experts)) + "|"]
    return lines(
        "## ComfyUI",
        "",
        "Not run by us. The workflow of the base, with these nodes in place of",
        "its sampler; latents go from left to right. LoRA files go to models/loras: rename them.",
        "",
        *top,
        *rows,
        "",
    )


def others(student, row, experts) -> list[str]:
    """LightX2V and Wan2.2-Lightning, where their samplers take Euler steps at our times."""
    cfg = student.cfg
    unshifted = [1000 * (1 - i / cfg.steps) for i in range(cfg.steps)]
    if not experts[0].noise or not all(u.is_integer() for u in unshifted):
        return []
    config = {
        "infer_steps": cfg.steps, "denoising_step_list": [int(u) for u in unshifted],
        "sample_shift": cfg.shift, "enable_cfg": False,
        "boundary_step_index": experts[0].phase.last,
        "lora_configs": [
            {"name": one.stem, "path": f"{one.stem}.safetensors", "strength": 1.0}
            for one in experts
        ],
    }  # fmt: skip
    told = [
        "## LightX2V", "", "Not run by us. Into the configuration of a distilled Wan2.2; its list",
        "is of times before the shift:", "",
        "```json", json.dumps(config, indent=1), "```", "",
    ]  # fmt: skip
    if (cfg.steps, cfg.shift, student.boundary) == (4, 5.0, row.boundary):
        task = "i2v-A14B" if row.from_image else "t2v-A14B"
        image = ", with its flags for the image" if row.from_image else ""
        told += [
            "## Wan2.2-Lightning", "", f"Not run by us. Its four steps are these{image}:", "",
            "```bash",
            f'python generate.py --task {task} --size "832*480" --ckpt_dir BASE --lora_dir . '
            '--prompt "..."',
            "```", "",
        ]  # fmt: skip
    return [lines(*told)]
