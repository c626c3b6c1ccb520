"""Speed of a transformer, ours and diffusers', with the same random weights.

    python -m models.bench --teacher wan22 --device cuda

forward is without gradient. training is a forward and its backward to the input, as through the
frozen base of a LoRA. MFU compares with the measured rate of one large matrix product.
"""

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.common import Parser, exit_status, pick_device
from models.encoders import parse_height_width
from models.plan import count_flops, matmul_flops, meta_inputs, teacher_network, time_call
from models.qwen_image import QwenImage, pack
from models.weights import TEACHERS, dtype_named, needs_extras, random_network, teacher_spec


def diffusers_network(net: nn.Module) -> nn.Module:
    """diffusers' network that shares the weights of ours."""
    with needs_extras("diffusers"):
        import diffusers
    settings = net.settings
    with torch.device("meta"):
        if isinstance(net, QwenImage):
            model = diffusers.QwenImageTransformer2DModel(**settings)
        else:
            model = diffusers.WanTransformer3DModel(
                num_attention_heads=settings["num_heads"], attention_head_dim=net.head_dim,
                num_layers=settings["num_layers"], ffn_dim=settings["ffn_dim"],
                text_dim=net.text_embedding[0].in_features,
                in_channels=net.patch_embedding.in_channels,
                out_channels=net.head.head.out_features // 4,
            )  # fmt: skip
    float32 = ("time_embedder", "scale_shift_table", "norm2")  # in diffusers' bf16 networks
    tensors = {net.diffusers_name(name): p for name, p in net.named_parameters()}
    for name, p in tensors.items():
        if not any(part in name for part in float32):
            tensors[name] = nn.Parameter(p.to(net.dtype), p.requires_grad)
    model.load_state_dict(tensors, assign=True)
    if isinstance(net, QwenImage):  # rope tables are buffers, which load_state_dict leaves on meta
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[*net.axes], scale_rope=True)
    else:
        model.rope = type(model.rope)(net.head_dim, (1, 2, 2), 1024).to(net.head.head.weight.device)
    return model.eval()


def diffusers_call(net: nn.Module, shape: tuple, t: Tensor, c: dict[str, Tensor]) -> Callable:
    """x -> diffusers' output at the inputs of ours, cast as its pipelines do."""
    model, text = diffusers_network(net), c["text"].to(net.dtype)
    if isinstance(net, QwenImage):
        grid, t = [[(1, shape[1] // 2, shape[2] // 2)]], t.to(net.dtype)
        return lambda x: model(pack(x).to(net.dtype), text, None, t, grid, return_dict=False)
    image = [c["image"].to(net.dtype)] if "image" in c else []
    inputs = 1000 * t, text
    return lambda x: model(torch.cat([x.to(net.dtype), *image], 1), *inputs, return_dict=False)


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
    calls = {"ours": lambda x: [net(x, t, c)], "diffusers": diffusers_call(net, shape, t, c)}

    def run(call: Callable, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            [v] = call(x)
        if backward:
            v.backward(torch.ones_like(v))

    seconds = {(name, backward): [] for backward in (False, True) for name in calls}
    for _ in tqdm(range(args.rounds + 2), leave=False, disable=None):  # the first two warm up
        for (name, backward), times in seconds.items():
            times.append(time_call(lambda b=backward, call=calls[name]: run(call, b), device))
    peak = matmul_flops(dtype, device)
    print(f"{args.teacher}, {args.dtype}, {peak / 1e12:.4g} TFLOP/s in a large matrix product")
    print(f"{'':20}seconds   TFLOP/s    MFU")
    for (name, backward), times in seconds.items():
        median, task = statistics.median(times[2:]), "training" if backward else "forward"
        rate = flops[backward] / median
        print(f"{name:10} {task:9}{median:7.3g} {rate / 1e12:9.4g} {rate / peak:6.0%}")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="wan22", choices=TEACHERS, help="(default wan22)")
    add("--size", default="480x832", help="pixels, HEIGHTxWIDTH (default 480x832)")
    add("--frames", type=int, default=1, help="of a video, 4n + 1 (default 1)")
    add("--dtype", default="bf16", choices=("bf16", "float32"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--rounds", type=int, default=10, help="calls of each (default 10)")
    return exit_status("bench.py", lambda: run_bench(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
