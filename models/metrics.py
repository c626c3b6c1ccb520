"""Measure folders of samples: motion, diversity over seeds, distance to the first folder.

    python -m models.metrics out/teacher out/dmd2 out/phased --dino weights/dinov3

Prints means over prompts and, in brackets, the difference to the first folder with its bootstrap
95 % interval. 003-01.mp4 is sample 1 of prompt 3. Folders keep all flows in .metrics.safetensors.

flow            mean length of the optical flow, in pixels per frame at a shorter side of 480. By
                OpenCV's DIS at 240, and 0 where it explains little, as in grain. The paper's
                UniMatch is a network, whose numbers are others.
dynamic degree  part of the videos that move. As in VBench, of frames 1/8 s apart a quarter of the
                pairs exceed 6 pixels (at a shorter side of 256) in the mean of their largest 5 % of
                flow; but VBench takes the network RAFT, on frames of full size.
cosine, LPIPS   of two samples of a prompt, by DINO's CLS features and by AlexNet. More diverse
                samples have a lower cosine and a higher LPIPS.
pixel spread    RMS difference of two samples of a prompt, as pictures of 64 x 64 in [0, 1]. Not in
                the paper: it sees layout and colour only. Of a video, five frames are compared.
pixel distance  the same, to the file of equal name in the first folder
Frechet         distance of DINO's features to the first folder's; it falls with more samples
"""

import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from models import cli, common, encoders, media, runs
from models.common import UserError

PATTERN = r"(?i)(\d+)(-\d+)?\.(mp4|m4v|mkv|webm|avi|mov|gif|webp|png|jpg|jpeg)"
CACHE = ".metrics.safetensors"
KIND = "metrics of samples, version 1"
TITLES = {"flow": "flow px/frame", "moves": "dynamic degree", "cosine": "cosine", "lpips": "LPIPS"}
TITLES |= {"spread": "pixel spread", "distance": "pixel distance", "frechet": "Frechet"}


def measure_file(path: Path) -> dict[str, Tensor]:
    """flow (F - 1,), moves: 0, 1, or NaN of a picture; pictures (k, 3, 64, 64). UserError."""
    with common.reading(path, "replace or delete it"):
        frames, fps = media.read_video(path)
        flow = [480 * lengths.mean() for lengths in media.flow_lengths(frames)]
        apart = media.flow_lengths(frames[:: max(1, round(fps / 8))])
        largest = [lengths[-(len(lengths) // 20) :].mean() for lengths in apart]
        pictures = media.shrink(media.pick_frames(frames))
    count = sum(x > 6 / 256 * max(1, 8 / fps) for x in largest)
    needed = max(1, round((len(largest) + 1) / 4))
    moves = float(count >= needed) if flow else numpy.nan
    return {"flow": torch.tensor(flow), "moves": torch.tensor(moves), "pictures": pictures}


def measure_folder(folder: Path, pattern: re.Pattern, dino: tuple | None) -> dict[str, dict]:
    """Prompt -> file name -> path and tensors; these are kept by digest. Raises UserError."""
    matches = {path: pattern.fullmatch(path.name) for path in sorted(folder.glob("*"))}
    prompts = {path: m[pattern.groups and 1] or "" for path, m in matches.items() if m}
    if not prompts:
        found = next(iter(matches), f"no file in {folder}")
        raise UserError(f"expected samples such as 003-01.mp4, found {found}; see --pattern")
    digests = {path: common.file_digest(path) for path in prompts}
    cache = read_cache(folder)
    measured = {}  # digest -> tensors
    groups = defaultdict(dict)
    measure = lambda path: cache.get(digests[path]) or measure_file(path)
    dino_name, features_of = dino or (None, None)
    try:
        with ThreadPool(4) as pool:  # each has the frames of a video in memory
            bar = tqdm(pool.imap(measure, prompts), str(folder), len(prompts), disable=None)
            for (path, prompt), x in zip(prompts.items(), bar):
                measured[digests[path]] = x
                if dino and dino_name not in x:
                    x[dino_name] = features_of(read_frames(path))
                groups[prompt][path.name] = x | {"path": path, "features": x.get(dino_name)}
    finally:  # after Ctrl-C and errors, too
        write_cache(folder, measured)
    return groups


def read_cache(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Digest -> tensors that were measured before; {} if there are none, or the file is broken."""
    cache = defaultdict(dict)
    with contextlib.suppress(UserError):
        file, _ = common.open_tensors(folder / CACHE, KIND, "")
        for digest, name in (key.split("/") for key in file.keys()):
            cache[digest][name] = file.get_tensor(f"{digest}/{name}")
    return cache


def write_cache(folder: Path, measured: dict[str, dict[str, Tensor]]) -> None:
    """Keep what was measured, unless the folder cannot be written."""
    items = measured.items()
    tensors = {f"{digest}/{name}": x for digest, named in items for name, x in named.items()}
    with contextlib.suppress(UserError):
        common.write_tensors(folder / CACHE, tensors, {"kind": KIND})


def read_frames(path: Path) -> numpy.ndarray:
    """The frames (5 or 1, h, w, 3) that are compared. Raises UserError."""
    return media.pick_frames(media.read_video(path)[0])


def prompt_metrics(group: dict, first: dict, lpips: Callable | None = None) -> dict[str, float]:
    """Metrics of the samples of a prompt, by file name. first: those of the first folder."""
    stack = lambda k, xs: torch.stack([x[k].expand(5, *x[k].shape[1:]) for x in xs]).double()
    samples = [*group.values()]
    pairs = sorted(group.keys() & first.keys())
    values = {k: torch.stack([x[k].mean() for x in samples]).nanmean() for k in ("flow", "moves")}
    x = stack("pictures", samples).flatten(1) / 255
    values["spread"] = torch.pdist(x).mean() / x.shape[1] ** 0.5
    if pairs:
        a, b = (stack("pictures", map(g.get, pairs)).flatten(1) / 255 for g in (group, first))
        values["distance"] = (a - b).square().mean(1).sqrt().mean()
    if samples[0]["features"] is not None:
        z = stack("features", samples)
        z = (z / z.norm(dim=-1, keepdim=True)).flatten(1)  # |z|^2 = 5
        values["cosine"] = 1 - torch.pdist(z).square().mean() / 10
    if lpips and len(samples) > 1:
        values["lpips"] = lpips([read_frames(x["path"]) for x in samples])
    return {key: x.item() for key, x in values.items() if not x.isnan()}


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D)."""
    return z.mean(0), z.T.cov(correction=int(len(z) > 1))


def frechet(a: tuple, b: tuple) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of two pairs of moments."""
    roots = []  # R with C = R R^T
    for _, cov in (a, b):
        values, vectors = torch.linalg.eigh(cov)
        roots.append(vectors * values.clamp(min=0).sqrt())
    distance = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace()
    distance -= 2 * torch.linalg.matrix_norm(roots[0].T @ roots[1], "nuc")  # of the last root
    return distance.clamp(min=0).item()


def compare_to_first(values: dict, first: dict) -> dict[str, dict]:
    """Metric -> mean over prompts, difference to the first folder and its interval."""
    summary = {}
    rng = numpy.random.default_rng(0)
    for key in TITLES:
        a, b = ({p: x[key] for p, x in row.items() if key in x} for row in (values, first))
        if a:
            summary[key] = {"mean": numpy.mean([*a.values()])}
        x = numpy.array([a[p] - b[p] for p in sorted(a.keys() & b.keys())])
        if len(x) and values is not first:
            means = x[rng.integers(len(x), size=(2000, len(x)))].mean(1)
            interval = numpy.percentile(means, (2.5, 97.5)).tolist()
            summary[key] |= {"difference": x.mean(), "interval": interval}
    return summary


def make_rows(folders: dict[str, dict], lpips: Callable | None) -> list[dict]:
    """Numbers of each folder; folder -> what measure_folder returns. Raises UserError."""
    rows = []
    first = next(iter(folders.values()))
    for folder, groups in folders.items():
        both = sorted(groups.keys() & first.keys())
        if not both:
            raise UserError(f"{folder} has no prompt of {[*folders][0]}; see --pattern")
        values = {p: prompt_metrics(x, first.get(p, {}), lpips) for p, x in groups.items()}
        row = {"folder": folder, "samples": sum(map(len, groups.values())), "values": values}
        row["metrics"] = compare_to_first(values, rows[0]["values"] if rows else values)
        features = [[x["features"] for p in both for x in y[p].values()] for y in (groups, first)]
        if features[0][0] is not None:
            a, b = (moments(torch.cat(x)) for x in features)
            row["metrics"]["frechet"] = {"mean": frechet(a, b)}
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    """Print a line per folder, a column per metric that any of them has."""
    keys = [key for key in TITLES if any(key in row["metrics"] for row in rows)]
    lines = [["folder", "samples", "prompts", *map(TITLES.get, keys)]]
    for row in rows:
        lines.append([row["folder"], str(row["samples"]), str(len(row["values"]))])
        for x in map(row["metrics"].get, keys):
            text = f"{x['mean']:.4g}" if x else "-"
            if x and "interval" in x:
                text += " ({:+.2g} [{:+.2g}, {:+.2g}])".format(x["difference"], *x["interval"])
            lines[-1].append(text)
    for line in lines:
        print(*(x.ljust(max(map(len, column))) for x, column in zip(line, zip(*lines))), sep="  ")


def extremes(folder: str, groups: dict, values: dict) -> dict[str, list]:
    """Title -> five frames of the prompts with least and most flow; of pictures, pixel spread."""
    key = "flow" if any("flow" in x for x in values.values()) else "spread"
    scores = {prompt: x.get(key, 0) for prompt, x in values.items()}
    pictures = {}
    for prompt in sorted({min(scores, key=scores.get), max(scores, key=scores.get)}):
        title = f"{folder}, prompt {prompt}: {TITLES[key]} {scores[prompt]:.3g}"
        pictures[title] = [x for y in groups[prompt].values() for x in read_frames(y["path"])]
    return pictures


def run_command(args) -> None:
    """Measure folders, print the table, write metrics.json and metrics.png. Raises UserError."""
    with common.reading("--pattern", r"give a regular expression such as (\d+)_.*\.mp4"):
        pattern = re.compile(args.pattern)
    others = runs.folder_contents(args.out) - {"metrics.json", "metrics.png"}
    if others:
        raise UserError(f"--out: expected a new folder, {args.out} contains {min(others)}")
    device = cli.pick_device(args.device, "auto")
    dino = args.dino and encoders.load_dino(args.dino, device)
    lpips = encoders.load_lpips(device)
    with runs.own_folder(args.out):
        folders = {str(folder): measure_folder(folder, pattern, dino) for folder in args.folders}
        rows = make_rows(folders, lpips)
        print_table(rows)
        pictures = {}
        for row, (name, groups) in zip(rows, folders.items()):
            pictures |= extremes(name, groups, row["values"])
        common.write_json(args.out / "metrics.json", common.finite({"folders": rows}))
        common.write_file(args.out / "metrics.png", media.draw_samples(folders, pictures))
        print(f"picture: {args.out / 'metrics.png'}")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="samples; first those of the teacher")
    add("--dino", type=Path, metavar="DIR", help="a DINOv2 or DINOv3 as transformers saves it")
    add("--pattern", default=PATTERN, help="of file names; its first group, if any, is the prompt")
    add("--out", type=Path, default=Path("out/metrics"), help="folder (default out/metrics)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="of DINO, LPIPS")
    return cli.exit_status("metrics.py", lambda: run_command(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
