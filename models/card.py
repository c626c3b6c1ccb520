"""The README.md of an export: what the student is, and how to run it in other tools."""

import json
from pathlib import Path

from models.common import format_value
from models.qwen_image import QwenImage
from models.weights import teacher_spec


def make_card(student, stems: list[str], base: str) -> str:
    """The text for an export.Student. stems: names of its files; base: the teacher as published."""
    cfg, spec, phases = student.cfg, teacher_spec(student.cfg.teacher), student.phases
    loras = " and ".join(Path(file).name for file in cfg.teacher_lora)
    rows = []
    for phase, stem in zip(phases, stems):
        noise, leftover = ("enable" if x else "disable" for x in (phase.k == 1, phase.s > 0))
        rows.append(f"| {stem} | {phase.first} | {phase.end} | {noise} | {leftover} |")
    lines, times = "\n".join(rows), ", ".join(f"{1000 * t:.6g}" for t in student.times[:-1])
    base_model = f"base_model: {base}\n" if base == spec.repository else ""
    lora = f"LoRA of rank {cfg.rank}, alpha {format_value(cfg.alpha)}"
    text = f"""---
license: apache-2.0
{base_model}tags: [phased-dmd, few-step, distillation]
---
# {base}{f" with {loras}" if loras else ""}, {cfg.steps} steps

A student of {cfg.steps} steps, distilled with Phased DMD (arXiv 2510.27684) in {len(phases)}
phases. Sample it with Euler steps at t x 1000 = **{times}**, then 0 (shift {cfg.shift}), without
guidance (CFG 1).

| file | start_at_step | end_at_step | add_noise | return_with_leftover_noise |
|---|---|---|---|---|
{lines}

Trained: {"all parameters" if cfg.generator == "full" else lora}; {cfg.iters} updates per phase at
{cfg.lr}, batch {cfg.batch}, seed {cfg.seed}; the fake ({cfg.fake}, {cfg.fake_rollout} rollouts)
{cfg.fake_updates} updates at {cfg.fake_lr} for each of them; the teacher with guidance
{format_value(cfg.guidance)}; interval
{cfg.interval}, target {cfg.target}, weight {cfg.weight}, truncation {cfg.truncate}; sizes
{format_value(cfg.size)}.
"""
    if spec.folder:
        return f"""{text}
No other tool has the base. The repository that made this file samples a LoRA on it with
`python sample.py --teacher {cfg.teacher} --lora FOLDER_OF_THIS_CARD`.
"""
    return text + diffusers_section(student, stems, base) + tools_section(student, stems)


def boundary_between(student) -> float:
    """A boundary between the times of the two experts; the teacher's own if it is one."""
    high, low = student.phases[0].t[-2], student.phases[1].t[0]
    return student.boundary_t if low < student.boundary_t <= high else round((high + low) / 2, 5)


def diffusers_section(student, stems: list[str], base: str) -> str:
    """A snippet. tests/test_export.py runs it."""
    cfg, spec = student.cfg, teacher_spec(student.cfg.teacher)
    is_qwen, is_full, boundary_t = spec.network is QwenImage, student.is_full, student.boundary_t
    network = "QwenImageTransformer2DModel" if is_qwen else "WanTransformer3DModel"
    experts = [stem for phase, stem in zip(student.phases, stems) for _ in phase.t[:-1]]
    *frames, height, width = cfg.size[0].partition(":")[0].split("x")
    settings = f"num_inference_steps={cfg.steps}, height={height}, width={width}, "
    if is_qwen:
        settings += "true_cfg_scale=1.0"
    else:
        settings += f"guidance_scale=1.0, num_frames={frames[0] if frames else cfg.frames}"
    if boundary_t and is_full:
        load = f"""nets = dict()
for noise, folder in (("high", "transformer"), ("low", "transformer_2")):
    options = dict(config=base, subfolder=folder, torch_dtype=torch.bfloat16)
    file = here + "/" + noise + "_noise_model.safetensors"
    nets[folder] = {network}.from_single_file(file, **options)
pipe = {spec.pipeline}.from_pretrained(base, **nets, torch_dtype=dtypes)
"""
    elif boundary_t:
        load = f"""pipe = {spec.pipeline}.from_pretrained(base, torch_dtype=dtypes)
for noise, is_low in (("high", False), ("low", True)):
    options = dict(adapter_name=noise, load_into_transformer_2=is_low)
    pipe.load_lora_weights(here, weight_name=noise + "_noise_model.safetensors", **options)
"""
    elif is_full:
        load = f"""options = dict(config=base, subfolder="transformer", torch_dtype=torch.bfloat16)
experts, nets = {json.dumps(experts)}, dict()  # experts: of each step
for name in sorted(set(experts)):
    nets[name] = {network}.from_single_file(here + "/" + name + ".safetensors", **options)
pipe = {spec.pipeline}.from_pretrained(base, transformer=nets[experts[0]], torch_dtype=dtypes)


def use(name):  # one expert at a time on the GPU
    if nets[name] is not pipe.transformer:
        pipe.transformer.to("cpu")
        pipe.transformer = nets[name].to("cuda")
"""
    else:
        load = f"""experts = {json.dumps(experts)}  # of each step
pipe = {spec.pipeline}.from_pretrained(base, torch_dtype=dtypes)
for name in sorted(set(experts)):
    pipe.load_lora_weights(here, weight_name=name + ".safetensors", adapter_name=name)
use = pipe.set_adapters
"""
    if not boundary_t:
        settings += ", callback_on_step_end=switch"
        load += """

def switch(pipe, i, t, kwargs):  # after step i: the next expert; at the end the first again
    use(experts[(i + 1) % len(experts)])
    return kwargs


use(experts[0])
"""
    elif boundary_between(student) != boundary_t:
        boundary = f"boundary_ratio={boundary_between(student)}"
        load += f"pipe.register_to_config({boundary})  # the low-noise expert begins below it\n"
    if is_qwen:
        draw = 'pipe(prompt="A fox runs through snow.", **settings).images[0].save("image.png")'
    elif spec.is_i2v:
        draw = f"""from diffusers.utils import export_to_video, load_image
from PIL import ImageOps

image = ImageOps.fit(load_image("first.png"), ({width}, {height}))
frames = pipe(image=image, prompt="It begins to rain.", **settings).frames[0]
export_to_video(frames, "video.mp4", fps={spec.fps})"""
    else:
        draw = f"""from diffusers.utils import export_to_video

frames = pipe(prompt="A fox runs through snow.", **settings).frames[0]
export_to_video(frames, "video.mp4", fps={spec.fps})"""
    return f"""
## diffusers

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {network}, {spec.pipeline}

base, here = "{base}", "."  # here: the folder of this card
dtypes = dict(default=torch.bfloat16, vae=torch.float32)
{load}scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
scheduler.sigma_min = 1 / {cfg.steps}
scheduler.set_shift({cfg.shift})  # shift={cfg.shift} in the first line would be applied twice
pipe.scheduler = scheduler
pipe.to("cuda")  # or pipe.enable_model_cpu_offload(): one network at a time
settings = dict({settings})
{draw}
```
"""


def tools_section(student, stems: list[str]) -> str:
    """A table of the tools that were executed with small random networks, and their settings."""
    cfg, is_qwen = student.cfg, teacher_spec(student.cfg.teacher).network is QwenImage
    node = "ModelSamplingAuraFlow" if is_qwen else "ModelSamplingSD3"
    loader = "UNETLoader" if student.is_full else "LoraLoaderModelOnly (strength 1)"
    text = f"""
## Tools

The loading and sampling code of these tools was executed in November 2026, at commit 831f4a0 of the
repository that made this file, with small random networks, beside its own sampler.

| tool | error of the latents, relative | what it needs |
|---|---|---|
| diffusers 0.42.1 | at most 1e-5 | the snippet above |
| ComfyUI, two versions | at most 1e-5 | the workflow of the base with {node} (shift {cfg.shift}); \
for each file {loader} and a KSamplerAdvanced with the values of its row above: steps \
{cfg.steps}, cfg 1.0, euler, simple; latents go from row to row |
"""
    if not student.is_full:
        text += """| musubi-tuner | not measured | `convert_lora.py --target default` first; \
before, nothing is applied |
"""
    if student.boundary_t and not student.is_full:
        files = [dict(name=stem, path=f"{stem}.safetensors", strength=1.0) for stem in stems]
        unshifted = [round(1000 * (1 - i / cfg.steps)) for i in range(cfg.steps)]
        lightx2v = dict(lora_configs=files, infer_steps=cfg.steps, denoising_step_list=unshifted)
        lightx2v |= dict(sample_shift=cfg.shift, boundary_step_index=student.phases[1].first)
        text += f"""| LightX2V | at most 1e-5 | in the config of a distilled Wan2.2: \
`{json.dumps(lightx2v | dict(enable_cfg=False))}` |
| Wan2.2-Lightning | at most 1e-5 | `--lora_dir` this folder; in its `wan/configs` sample_steps \
{cfg.steps}, sample_shift {cfg.shift}, boundary {boundary_between(student)} |
| DiffSynth-Studio | at most 1e-5 | `load_lora` into `pipe.dit` and `pipe.dit2`; \
num_inference_steps {cfg.steps}, sigma_shift {cfg.shift}, cfg_scale 1, \
switch_DiT_boundary {boundary_between(student)} |
| mmgp | at most 1e-5 | the two files as they are |
| WanVideoWrapper | times 999.8, 937.5, 833.3, 625 | scheduler `flowmatch_distill` (4 steps, shift \
5); its `euler` shifts twice |
| FastVideo | not measured | does not read these files: it takes lora_A and lora_B only |
"""
    if 1000 % cfg.steps:
        text += f"""
1000 is not a multiple of {cfg.steps}: the times of ComfyUI's `simple` and of LightX2V's integers
are off by up to 0.0009, which changed the latents of the random networks by 5 to 6 %.
"""
    return text
