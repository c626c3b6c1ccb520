"""The README.md of an export: what the student is, and how to run it in other tools."""

import json
from pathlib import Path

from models.cli import flag_words
from models.weights import teacher_spec

# of the training; the card lists them as flags
SETTINGS = (
    "train_student rank alpha lr train_fake fake_lr fake_rollout fake_updates iters batch seed "
    "guidance interval target kl_weight truncate size"
).split()


def make_card(student, stems: list[str], base: str) -> str:
    """The text for an export.Student. stems: names of its files; base: the teacher as published."""
    cfg = student.cfg
    spec = teacher_spec(cfg.teacher)
    loras = "".join(f" with {Path(file).name}" for file in cfg.teacher_lora)
    base_model = f"base_model: {base}\n" if base == spec.repository else ""
    times = ", ".join(f"{1000 * t:.6g}" for t in student.times[:-1])
    settings = " ".join(word for x in SETTINGS for word in flag_words(x, getattr(cfg, x)))
    text = f"""---
license: apache-2.0
{base_model}tags: [phased-dmd, few-step, distillation]
---
# {base}{loras}, {cfg.steps} steps

A student of {cfg.steps} steps, distilled with Phased DMD (arXiv 2510.27684) in {cfg.phases} phases.
Sample it with Euler steps at t x 1000 = **{times}**, then 0 (shift {cfg.shift}), without guidance
(CFG 1). Settings of the training: `{settings}`.
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
    """A script. tests/test_published.py and tests/test_export.py run it with small networks."""
    cfg = student.cfg
    spec = teacher_spec(cfg.teacher)
    *frames, height, width = cfg.size[0].partition(":")[0].split("x")
    settings = f"num_inference_steps={cfg.steps}, height={height}, width={width}, "
    settings += f"{spec.network.cfg_argument}=1.0"
    if spec.network.makes_video:
        settings += f", num_frames={frames[0] if frames else cfg.frames}"
    if not student.boundary_t:
        settings += ", callback_on_step_end=switch"
    load = full_pipeline(student, spec) if student.is_full else lora_pipeline(student, spec)
    experts = [stem for phase, stem in zip(student.phases, stems) for _ in phase.t[:-1]]
    return f"""
## diffusers 0.42.1

```python
import diffusers
import torch

base, here = "{base}", "."  # here: the folder of this card
experts = {json.dumps(experts)}  # of each step
dtypes = dict(default=torch.bfloat16, vae=torch.float32)
{load}{switch_lines(student)}scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
scheduler.sigma_min = 1 / {cfg.steps}
scheduler.set_shift({cfg.shift})  # shift={cfg.shift} in the first line would be applied twice
pipe.scheduler = scheduler
pipe.to("cuda")  # or pipe.enable_model_cpu_offload(): one network at a time
settings = dict({settings})
{draw_lines(spec, height, width)}
```
"""


def full_pipeline(student, spec) -> str:
    """Lines that make a pipeline of full experts."""
    second = ", transformer_2=nets[experts[-1]]" if student.boundary_t else ""
    return f"""options = dict(config=base, subfolder="transformer", torch_dtype=torch.bfloat16)
nets = dict()
for name in sorted(set(experts)):
    file = here + "/" + name + ".safetensors"
    nets[name] = diffusers.{spec.network.diffusers_class}.from_single_file(file, **options)
options = dict(transformer=nets[experts[0]]{second})
pipe = diffusers.{spec.pipeline}.from_pretrained(base, torch_dtype=dtypes, **options)
"""


def lora_pipeline(student, spec) -> str:
    """Lines that make a pipeline of the base with LoRAs."""
    second = ", load_into_transformer_2=name == experts[-1]" if student.boundary_t else ""
    return f"""pipe = diffusers.{spec.pipeline}.from_pretrained(base, torch_dtype=dtypes)
for name in sorted(set(experts)):
    options = dict(adapter_name=name{second})
    pipe.load_lora_weights(here, weight_name=name + ".safetensors", **options)
"""


def switch_lines(student) -> str:
    """Lines that choose the expert of each step."""
    if student.boundary_t:  # the pipeline does it
        if boundary_between(student) == student.boundary_t:
            return ""
        boundary = f"boundary_ratio={boundary_between(student)}"
        return f"pipe.register_to_config({boundary})  # the low-noise expert begins below it\n"
    use = "pipe.set_adapters(name)"
    if student.is_full:
        use = """if nets[name] is not pipe.transformer:  # one expert at a time on the GPU
        pipe.transformer.to("cpu")
        pipe.transformer = nets[name].to("cuda")"""
    return f"""

def use(name):
    {use}


def switch(pipe, i, t, kwargs):  # after step i: the next expert; at the end the first again
    use(experts[(i + 1) % len(experts)])
    return kwargs


use(experts[0])
"""


def draw_lines(spec, height: str, width: str) -> str:
    """Lines that call the pipeline and save what it returns."""
    if not spec.network.makes_video:
        return 'pipe(prompt="A fox runs through snow.", **settings).images[0].save("image.png")'
    draw = f"""frames = pipe(prompt="A fox runs through snow.", **settings).frames[0]
diffusers.utils.export_to_video(frames, "video.mp4", fps={spec.fps})"""
    if not spec.is_i2v:
        return draw
    return f"""from PIL import ImageOps

image = diffusers.utils.load_image("first.png")
settings["image"] = ImageOps.fit(image, ({width}, {height}))
{draw}"""


def tools_section(student, stems: list[str]) -> str:
    """The settings of other tools; models/README.md says how far each was tried."""
    steps = student.cfg.steps
    text = comfyui_section(student, stems)
    if not student.is_full:
        text += """
## Other tools

- musubi-tuner applies nothing before `convert_lora.py --target default`.
"""
        text += wan22_tools(student, stems) if student.boundary_t else ""
    if 1000 % steps:
        text += f"""
1000 is not a multiple of {steps}: the times of ComfyUI's `simple` and of LightX2V's integers
are off by up to 0.0009, which changed the latents of small random networks by 5 to 6 %.
"""
    return text


def comfyui_section(student, stems: list[str]) -> str:
    """The settings of ComfyUI, with a row per file."""
    cfg = student.cfg
    node = teacher_spec(cfg.teacher).network.comfyui_node
    loader = "UNETLoader" if student.is_full else "LoraLoaderModelOnly (strength 1)"
    text = f"""
## ComfyUI

Take the workflow of the base with {node} (shift {cfg.shift}). Each file has a {loader} and a
KSamplerAdvanced: steps {cfg.steps}, cfg 1.0, euler, simple, and its row here. Latents go from row
to row.

| file | start_at_step | end_at_step | add_noise | return_with_leftover_noise |
|---|---|---|---|---|
"""
    for phase, stem in zip(student.phases, stems):
        noise, leftover = ("enable" if x else "disable" for x in (phase.k == 1, phase.s > 0))
        text += f"| {stem} | {phase.first} | {phase.end} | {noise} | {leftover} |\n"
    return text


def wan22_tools(student, stems: list[str]) -> str:
    """The settings of tools that take a LoRA for each of two transformers."""
    steps = student.cfg.steps
    lightx2v = dict(
        lora_configs=[dict(name=x, path=f"{x}.safetensors", strength=1.0) for x in stems],
        infer_steps=steps,
        denoising_step_list=[round(1000 * (1 - i / steps)) for i in range(steps)],  # unshifted
        sample_shift=student.cfg.shift,
        boundary_step_index=student.phases[1].first,
        enable_cfg=False,
    )
    return f"""- LightX2V in the config of a distilled Wan2.2: `{json.dumps(lightx2v)}`
- Wan2.2-Lightning (`--lora_dir` this folder) and DiffSynth-Studio (`load_lora` into `pipe.dit` and
  `pipe.dit2`) choose the expert by t: boundary, or switch_DiT_boundary, {boundary_between(student)}
- WanVideoWrapper: scheduler `flowmatch_distill` (4 steps, shift 5); its `euler` shifts twice
"""
