"""Claims about the metrics of samples: known flows, exact features, a cache, one-line errors."""

import json
import subprocess
from pathlib import Path

import numpy
import pytest
from PIL import Image

from models import common, media, metrics

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


@pytest.mark.parametrize("speed,fps", [(6.5, 16), (12, 4)])
def test_a_moved_texture_has_its_flow_and_moves_by_the_rule_of_vbench(tmp_path, speed, fps):
    """To 0.2 pixels. Each row is a negative control of the other."""
    x = measure(tmp_path / "x.mp4", moved(speed, frames=5), fps)
    assert len(x["flow"]) == 4 and (x["flow"] - speed).abs().max() < 0.2
    assert x["moves"] == (speed * fps / 8 > 6 * 480 / 256)  # pixels in 1/8 s


@pytest.fixture(scope="module")
def dino(request, tmp_path_factory):
    """The folder of a small random DINO, and path -> CLS feature (16,) by transformers alone."""
    transformers = pytest.importorskip("transformers", reason="needs models/requirements.txt")
    folder, kind = tmp_path_factory.mktemp("dino"), getattr(request, "param", "Dinov2")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = getattr(transformers, f"{kind}Config")(image_size=28, patch_size=14, **sizes)
    net = getattr(transformers, f"{kind}Model")(config).eval().requires_grad_(False)
    processor = transformers.BitImageProcessor(crop_size=28, size={"shortest_edge": 28})
    [part.save_pretrained(folder) for part in (net, processor)]
    inputs = lambda path: processor(images=Image.open(path), return_tensors="pt")
    return folder, lambda path: net(**inputs(path)).pooler_output[0].double().numpy()


@pytest.mark.parametrize(
    "dino", ["Dinov2", pytest.param("DINOv3ViT", marks=pytest.mark.slow)], indirect=True
)
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


def test_intervals_are_those_of_paired_prompts():
    """Of normal numbers, to 10 %. Negative control: without pairs it would be far wider."""
    base, extra = 100 * noise(400), noise(400, seed=1)
    first, values = ({str(i): {"flow": x} for i, x in enumerate(y)} for y in (base, base + extra))
    row = metrics.compare_to_first(values | {"new": {"flow": 1e9}}, first)["flow"]
    width, expected = numpy.diff(row["interval"]), 2 * 1.96 * extra.std() / 20
    assert width == pytest.approx(expected, rel=0.1) and width < base.std() / 20
    assert row["difference"] == pytest.approx(extra.mean(), abs=1e-3)


def ffmpeg(*arguments):
    """Run the ffmpeg of imageio-ffmpeg."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    subprocess.run([program, "-loglevel", "error", "-y", *map(str, arguments)], check=True)


def test_videos_of_other_tools_have_the_frames_that_a_player_shows(tmp_path):
    """A cut without encoding, AV1, mkv, a colon in the name. Negative controls: halves of files."""
    source, encoders = tmp_path / "a.mp4", {"av1:1.mp4": "libaom-av1 -cpu-used 8", "b.mkv": "copy"}
    frames = "testsrc2=size=96x64:rate=16:duration=2"
    ffmpeg("-f", "lavfi", "-i", frames, *"-g 24 -bf 2 -pix_fmt yuv420p".split(), source)
    ffmpeg("-ss", 0.7, "-i", source, "-c", "copy", tmp_path / "cut.mp4")
    for name, options in encoders.items():
        ffmpeg("-i", source, "-c:v", *options.split(), f"file:{tmp_path / name}")
    shown, fps = media.read_video(source)
    assert len(shown) == 32 and shown[0].shape == (64, 96, 3) and fps == 16
    cut, _ = media.read_video(tmp_path / "cut.mp4")
    assert len(cut) < 32 and abs(cut[0].astype(float) - shown[32 - len(cut)]).mean() < 1
    for name in encoders:
        video, _ = media.read_video(tmp_path / name)
        assert len(video) == 32 and abs(video[9].astype(float) - shown[9]).mean() < 20
        half = tmp_path / f"half-{name}"
        half.write_bytes((content := (tmp_path / name).read_bytes())[: len(content) // 2])
        with pytest.raises(common.UserError, match="half.*replace or delete it"):
            metrics.measure_file(half)


WRONG = """\
w --dino missing: missing/config.json
w --dino clip: as transformers saves it, clip is a clip
w --pattern x: found w/000.png
w --out w: expected a new folder
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
