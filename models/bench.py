"""Speed of a transformer, ours and diffusers', with the same random weights.

    python -m models.bench --teacher wan22 --device cuda

training is a forward and its backward to the input, as through the frozen base of a LoRA. MFU
compares with the measured rate of one large matrix product.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.common import Parser, exit_status, pick_device
from models.encoders import parse_height_width
from models.plan import count_flops, matmul_flops, meta_inputs, teacher_network, time_call
from models.qwen_image import QwenImage, pack
from models.weights import TEACHERS, dtype_named, needs_extras, random_network, teacher_spec


def diffusers_network(net: nn.Module, shape: tuple, t: Tensor, c: dict[str, Tensor]) -> Callable:
    """x -> output of diffusers' network, with the weights and the inputs of ours."""
    with needs_extras("diffusers"):
        import diffusers
    device, cast = t.device, lambda x: x.to(net.dtype)  # inputs are cast as in its pipelines
    if isinstance(net, QwenImage):
        prepare = pack
        with torch.device("meta"):
            model = diffusers.QwenImageTransformer2DModel(**net.settings)
        model.pos_embed = type(model.pos_embed)(10000, [*net.axes], scale_rope=True)  # off meta
        options = cast(c["text"]), None, cast(t), [[(1, shape[1] // 2, shape[2] // 2)]]
    else:
        image = [c["image"]] if "image" in c else []
        prepare = lambda x: torch.cat([x, *image], 1)
        settings = {key: net.settings[key] for key in ("num_layers", "ffn_dim")}
        settings |= dict(num_attention_heads=net.settings["num_heads"], text_dim=c["text"].shape[2])
        settings |= dict(in_channels=net.patch_embedding.in_channels, out_channels=shape[0])
        with torch.device("meta"):
            model = diffusers.WanTransformer3DModel(**settings, attention_head_dim=net.head_dim)
        model.rope = type(model.rope)(net.head_dim, (1, 2, 2), 1024).to(device)
        options = 1000 * t, cast(c["text"])
    float32 = ("time_embedder", "scale_shift_table", "norm2")  # in its bf16 networks, too
    tensors = {net.diffusers_name(name): p for name, p in net.named_parameters()}
    for name, p in tensors.items():
        if not any(part in name for part in float32):
            tensors[name] = nn.Parameter(cast(p), requires_grad=False)
    model.eval().load_state_dict(tensors, assign=True)
    return lambda x: model(cast(prepare(x)), *options, return_dict=False)


def run_bench(args) -> None:
    """Time both networks in turn and print a table. Raises UserError."""
    device, dtype = pick_device(args.device, "auto"), dtype_named(args.dtype)
    spec, size = teacher_spec(args.teacher), parse_height_width(args.size)
    frames = () if spec.network is QwenImage else ((args.frames - 1) // 4 + 1,)
    shape = (spec.settings.get("out_dim", 16), *frames, *(n // spec.scale for n in size))
    net = teacher_network(args.teacher, dtype)
    x, t, c = meta_inputs(net, shape)
    flops = count_flops(lambda: net(x.requires_grad_(), t, c))
    net = random_network(args.teacher, dtype=dtype, device=device)
    x, t = torch.randn(x.shape, device=device, requires_grad=True), torch.rand(1, device=device)
    c = {name: torch.randn(value.shape, device=device) for name, value in c.items()}
    calls = {"ours": lambda x: [net(x, t, c)], "diffusers": diffusers_network(net, shape, t, c)}

    def run(name: str) -> None:
        [v] = calls[name](x)
        if v.requires_grad:
            v.backward(torch.ones_like(v))

    seconds = {(name, training): [] for training in (False, True) for name in calls}
    for _ in tqdm(range(12), leave=False, disable=None):  # the first two warm up
        for (name, training), times in seconds.items():
            with torch.set_grad_enabled(training):
                times.append(time_call(partial(run, name), device))
    peak = matmul_flops(dtype, device)
    print(f"{args.teacher:20}seconds   TFLOP/s    MFU of {peak / 1e12:.4g} TFLOP/s")
    for (name, training), times in seconds.items():
        median, task = statistics.median(times[2:]), ("forward", "training")[training]
        rate = flops[training] / median
        print(f"{name:10} {task:9}{median:7.3g} {rate / 1e12:9.4g} {rate / peak:6.0%}")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    add = (parser := Parser(__doc__)).add_argument
    add("--teacher", default="wan22", choices=TEACHERS, help="(default wan22)")
    add("--size", default="480x832", help="pixels, HEIGHTxWIDTH (default 480x832)")
    add("--frames", type=int, default=1, help="of a video, 4n + 1 (default 1)")
    add("--dtype", default="bf16", choices=("bf16", "float32"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return exit_status("bench.py", lambda: run_bench(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
