"""How fast the transformers are: beside diffusers, and beside their products alone (the floor).

    python -m models.speed                                   both at a small size, on one CPU thread
    python -m models.speed --teacher wan22 --device cuda     14B, forward, random weights

The floor is every linear layer and every attention of one call of ours, with nothing between them.
Overhead is time beyond the floor. Rounds take turns, and ratios are medians over rounds: a machine's
drift touches all three alike. "Of matmul rate" compares with one large square product. Without
diffusers its columns stay empty.
"""

import contextlib
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from models.files import UserError
from models.flags import Parser, exit_status, pick_device
from models.qwen_image import QwenImage, pack
from models.wan import Wan
from models.weights import published, random_network, row_of

SMALL = {
    "wan": (Wan, dict(dim=512, ffn_dim=2048, num_heads=4, num_layers=4, text_dim=512)),
    "qwen-image": (
        QwenImage,
        dict(
            num_attention_heads=4, attention_head_dim=128, num_layers=4, joint_attention_dim=512
        ),
    ),
}  # fmt: skip
GRIDS = {Wan: ["1x45x80", "21x30x52"], QwenImage: ["1x60x60", "1x180x182"]}  # frames, rows, columns


class Record(TorchFunctionMode):
    """Notes the shapes of every linear layer and attention that is called."""

    def __init__(self):
        super().__init__()
        self.calls = []  # function, shapes of its inputs, which of them want a gradient

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, F.scaled_dot_product_attention):
            inputs = [x for x in args if isinstance(x, Tensor)]
            wants = [x.requires_grad for x in inputs]
            self.calls.append((function, [x.shape for x in inputs], wants, inputs[0].dtype))
        return function(*args, **(kwargs or {}))


def flops(calls) -> float:
    """Of the products of a forward pass: 2 n i o a linear layer, 4 B H L M d an attention."""
    total = 0
    for function, shapes, *_ in calls:
        if function is F.linear:
            total += 2 * shapes[0].numel() * shapes[1][0]
        else:
            total += 4 * shapes[0].numel() * shapes[1][2]
    return total


def floor(calls, device: str, copies: int) -> Callable:
    """Runs the calls, forward, and backward where they have gradients. copies: sets of inputs.

    Enough copies that no input is in a cache because the call before it left it there.
    """
    pool = {}
    for i, (function, shapes, wants, dtype) in enumerate(calls):
        key = function, tuple(shapes), tuple(wants), dtype, i % copies
        if key not in pool:
            inputs = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
            inputs = [x.requires_grad_(w) for x, w in zip(inputs, wants)]
            pool[key] = inputs, torch.randn_like(function(*inputs))
    order = [
        (function, *pool[function, tuple(shapes), tuple(wants), dtype, i % copies], any(wants))
        for i, (function, shapes, wants, dtype) in enumerate(calls)
    ]

    def run():
        for function, inputs, grad, backward in order:
            out = function(*inputs)
            if backward:
                out.backward(grad)
                for x in inputs:
                    x.grad = None

    return run


def inputs_of(net: nn.Module, grid: tuple, texts: int, device: str):
    """x_t, t and c of one sample with so many patches and text tokens."""
    frames, rows, columns = grid
    normal = lambda *shape: torch.randn(*shape, device=device)
    t = torch.tensor([0.8], device=device)
    if isinstance(net, QwenImage):
        c = {"text": normal(1, texts, net.txt_in.in_features)}
        return normal(1, 16, 2 * rows, 2 * columns), t, c
    size = frames, 2 * rows, 2 * columns
    c = {"text": normal(1, texts, net.text_embedding[0].in_features)}
    outputs, channels = net.head.head.out_features // 4, net.patch_embedding.in_channels
    if channels > outputs:
        c["image"] = normal(1, channels - outputs, *size)
    return normal(1, outputs, *size), t, c


def theirs(net: nn.Module, settings: dict) -> nn.Module | None:
    """diffusers' network, sharing the weights of ours; None where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    with torch.device("meta"):
        if isinstance(net, QwenImage):
            model = diffusers.QwenImageTransformer2DModel(**settings)
        else:
            model = diffusers.WanTransformer3DModel(
                num_attention_heads=settings["num_heads"], attention_head_dim=net.head_dim,
                in_channels=net.patch_embedding.in_channels, num_layers=settings["num_layers"],
                out_channels=net.head.head.out_features // 4, ffn_dim=settings["ffn_dim"],
                text_dim=settings.get("text_dim", 4096),
            )  # fmt: skip
    kept = ("time_embedder", "scale_shift_table", "norm2")  # float32 in its bf16 networks
    tensors = {net.diffusers_name(name): p for name, p in net.named_parameters()}
    for name, p in tensors.items():
        if p.dtype != net.dtype and not any(part in name for part in kept):
            tensors[name] = nn.Parameter(p.to(net.dtype), p.requires_grad)
    model.load_state_dict(tensors, assign=True)
    if isinstance(net, Wan):  # its table of rope is a buffer, which has no values on meta
        model.rope = type(model.rope)(net.head_dim, (1, 2, 2), 1024).to(net.head.head.weight.device)
    else:
        axes = list(settings.get("axes_dims_rope", (16, 56, 56)))
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return model.eval()


def call_of(net: nn.Module, model: nn.Module, x, t, c) -> Callable:
    """x -> diffusers' network on what ours is given, its input cast as its pipelines do."""
    text = c["text"].to(net.dtype)
    if isinstance(net, QwenImage):
        grid = [[(1, x.shape[2] // 2, x.shape[3] // 2)]]
        t = t.to(net.dtype)
        return lambda x: model(pack(x).to(net.dtype), text, None, t, grid, return_dict=False)[0]
    image = [c["image"].to(net.dtype)] if "image" in c else []
    return lambda x: model(
        torch.cat([x.to(net.dtype), *image], 1), 1000 * t, text, return_dict=False
    )[0]


def timed(call: Callable, device: str) -> float:
    """Seconds of a call, with all that it started."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize, "cpu": lambda: None}
    wait[device]()
    start = time.perf_counter()
    call()
    wait[device]()
    return time.perf_counter() - start


def rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large square matrix product, the best of ten."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def measure(net, settings, grid, texts: int, backward: bool, rounds: int, device: str) -> dict:
    """Seconds of ours, diffusers' and the floor, round by round, and peak memory in bytes."""
    x, t, c = inputs_of(net, grid, texts, device)
    net.requires_grad_(backward)
    x.requires_grad_(backward)
    model = theirs(net, settings)
    calls = {"ours": lambda x: net(x, t, c)}
    if model is not None:
        calls["diffusers"] = call_of(net, model, x, t, c)
    with Record() as record, torch.no_grad() if not backward else contextlib.nullcontext():
        net(x, t, c)

    def once(call):
        with contextlib.nullcontext() if backward else torch.no_grad():
            out = call(x)
        if backward:
            out.backward(torch.ones_like(out))
            net.zero_grad()
            x.grad = None

    runs = {name: lambda call=call: once(call) for name, call in calls.items()}
    memory = {}
    for name, run in runs.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        memory[name] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    runs["floor"] = floor(record.calls, device, 1 if device == "cuda" else 64)
    for run in list(runs.values()) * 3:  # the first calls find cold memory
        run()
    seconds = {name: [] for name in runs}
    order = list(runs)
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name in order:
            seconds[name].append(timed(runs[name], device))
        order.append(order.pop(0))  # each comes after each
    return {"seconds": seconds, "memory": memory, "flops": flops(record.calls) * (1 + 2 * backward)}


def line(title: str, found: dict, peak: float) -> str:
    """A row of the table."""
    seconds, memory = found["seconds"], found["memory"]
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    cells = [title] + [f"{ms[n]:.0f}" if n in ms else "-" for n in ("ours", "diffusers", "floor")]
    if "diffusers" in ms:
        both = [
            [a / f for a, f in zip(seconds[n], seconds["floor"])] for n in ("ours", "diffusers")
        ]
        ours, other = (statistics.median(ratios) for ratios in both)  # in floors of the same round
        cells += [f"{ours / other:.3f}", f"{(ours - 1) / (other - 1):.2f}"]
    else:
        cells += ["-", "-"]
    cells.append(f"{100 * found['flops'] / statistics.median(seconds['ours']) / peak:.0f} %")
    cells.append(" / ".join(f"{m / 1e9:.1f}" for m in memory.values()) if memory["ours"] else "-")
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "", "ours, ms", "diffusers, ms", "floor, ms", "ours / diffusers", "overhead / diffusers' overhead",
    "of matmul rate", "peak GB",
)  # fmt: skip
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def keep_memory() -> None:
    """Ask glibc to keep freed memory: else each call pays more for its pages than for its work."""
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-1, 2**31 - 1), (-3, 2**25), (-8, 1)):  # trim, mmap, arenas
            ctypes.CDLL(None).mallopt(option, value)


def main(argv=None) -> int:
    """Print the table; exit status 0, or 2 with one line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", choices=published(), help="its full size, forward (default: two small ones)")
    add(
        "--grid",
        nargs="+",
        help="FRAMESxROWSxCOLUMNS of tokens (default 640 tokens; with --teacher 3,600 and 32,760)",
    )
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="with --teacher")
    add("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="(default %(default)s)")
    add("--rounds", type=int, default=30, help="calls of each (default %(default)s: 5 minutes)")
    add("--threads", type=int, default=1, help="of the CPU (default %(default)s)")
    return exit_status("speed.py", lambda: table(parser.parse_args(argv)), "a smaller --grid")


def table(args) -> None:
    """The command's work. Raises UserError."""
    if args.rounds < 1 or args.threads < 1:
        raise UserError("--rounds and --threads are at least 1")
    device = pick_device(args.device, "auto")
    work = rows_of(args.teacher, args.grid)
    torch.set_num_threads(args.threads)
    keep_memory()
    dtype = getattr(torch, args.dtype if args.teacher else "float32")
    peak = rate(dtype, device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{args.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}, {dtype}, matmul {peak / 1e12:.2f} Tflop/s")
    print(HEAD)
    for title, network, settings, grids in work:
        net = random_network(network, settings, dtype, device)
        for grid in grids:
            found = measure(net, settings, grid, 512, not args.teacher, args.rounds, device)
            print(line(f"{title}, {math.prod(grid):,} tokens", found, peak), flush=True)


def rows_of(teacher: str | None, grids: list[str] | None):
    """(title, network, settings, grids) of what is to be timed."""
    if teacher is None:
        given = [grid_of(text) for text in grids or ["1x20x32"]]
        return [(f"{name}, forward + backward", *row, given) for name, row in SMALL.items()]
    row = row_of(teacher)
    given = [grid_of(text) for text in grids or GRIDS[row.network]]
    return [(f"{teacher}, forward", row.network, row.settings, given)]


def grid_of(text: str) -> tuple[int, ...]:
    """21x30x52 -> (21, 30, 52)."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--grid {text} is not FRAMESxROWSxCOLUMNS, as 21x30x52")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
