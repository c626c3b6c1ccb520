"""Claims about the digits: exact pixels, a good teacher and classifier, exact metrics, runs."""

import json

import numpy as np
import pytest
import torch
from students import load_run

import sample
import train
from models import encoders
from models.common import file_digest, normal, stream
from models.metrics import frechet
from toy import digits, make_digits

COMMAND = (
    "--teacher mnist --iters 2 --warmup 1 --batch 6 --fake-updates 1 --eval-samples 100"
).split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    return out


def random_pixels(n: int) -> torch.Tensor:
    """Images (n, 28, 28) of random bytes."""
    return torch.randint(256, (n, 28, 28), generator=stream("pixels")).byte()


def read_shipped(name: str) -> dict:
    return json.loads((digits.FOLDER / name).read_text())


# -- pixels, conditions, data --------------------------------------------------------------------


def test_latents_are_patches_of_4_by_4_pixels_and_keep_every_byte():
    """A pixel is in the latent over it."""
    pixels = random_pixels(20)
    x = digits.to_latents(pixels)
    assert x.shape == (20, *digits.SHAPE) and x.abs().max() <= 1 and len(pixels.unique()) > 250
    assert torch.equal(digits.to_pixels(x), pixels)
    pixel = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pixel[0, 9, 17] = 255
    [[channel, _, row, column]] = (digits.to_latents(pixel)[0] > 0).nonzero().tolist()
    assert (row, column) == ((9 + 2) // 4, (17 + 2) // 4) and channel == (9 + 2) % 4 * 4 + 3


def test_the_prompts_are_the_conditions_of_the_ten_classes():
    """Runs see the conditions of the statistics; the null prompt is not a class."""
    embeddings = encoders.open_embeddings(digits.FOLDER / "prompts.safetensors")
    assert embeddings.prompts == [str(digit) for digit in range(10)]
    rows = torch.cat([embeddings.row(i) for i in range(10)] + [embeddings.negative]).float()
    assert torch.equal(rows, digits.conditions(torch.arange(11))["text"][:, 0])
    data = digits.PRESET.make_data(train.make_config("mnist"), None)
    c, shape = data(64, stream("shared"), stream("rng"))
    assert shape == digits.SHAPE and set(c["text"].argmax(2).flatten().tolist()) == set(range(10))


# -- what comes with the repository --------------------------------------------------------------


def test_the_shipped_files_are_small_good_and_those_that_were_measured():
    files = [path for path in digits.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    reference, classifier = read_shipped("reference.json"), read_shipped("classifier.json")
    measured, cfg = reference["sha256"], train.make_config("mnist")
    assert measured == {name: file_digest(digits.FOLDER / name) for name in make_digits.WEIGHTS}
    assert (reference["guidance"], reference["shift"]) == (cfg.guidance[0], cfg.shift)
    assert (make_digits.GUIDANCE, make_digits.SAMPLES) == (cfg.guidance[0], cfg.eval_samples)
    assert classifier["held_out"] == 1500
    assert min(classifier["accuracy"], reference["accuracy"]) >= 0.98


def test_the_classifier_sees_the_prompted_class_and_none_in_noise():
    """Controls: the teacher with the null prompt, and random bytes."""
    teacher = digits.guided_teacher(train.make_config("mnist").guidance[0])
    unprompted = lambda x_t, t, c: teacher(x_t, t, digits.conditions(torch.full((30,), 10)))
    z = normal((30, *digits.SHAPE), "test")
    draw = lambda net: digits.to_pixels(digits.sample_teacher(net, 20, z, CPU))
    accuracies = [
        (digits.classify(digits.load_classifier(), pixels)[1] == digits.cycle_labels(30)).sum() / 30
        for pixels in (draw(teacher), draw(unprompted), random_pixels(30))
    ]
    assert accuracies[0] >= 0.9 and max(accuracies[1:]) < 0.4


# -- metrics -------------------------------------------------------------------------------------


def test_frechet_is_the_distance_of_gaussians():
    """0 to itself; |d|^2 of means apart; (a - b)^2 of standard deviations, rotated or not."""
    eye, zero = torch.eye(3).double(), torch.zeros(3).double()
    rotation = torch.linalg.qr(normal((3, 3), "rotation").double())[0]
    a, b = (rotation * torch.tensor(v).double() @ rotation.T for v in ([1, 4, 9], [4, 4, 25]))
    assert frechet((zero, a), (zero, a)) == pytest.approx(0, abs=1e-9)
    assert frechet((zero, eye), (zero + 2, eye)) == pytest.approx(12)
    assert frechet((zero, a), (zero, b)) == pytest.approx(1 + 0 + 4)


def test_metrics_tell_samples_from_noise_copies_and_wrong_labels():
    """Samples of the same distribution are near 0 and 1, all others far off."""
    labels, centres = digits.cycle_labels(4000), 10 * normal((10, 64), "centres").double()

    def samples(i):
        return centres[labels] + normal((4000, 64), "samples", i)

    reference = make_digits.statistics(samples(0), labels)
    same = digits.measure(samples(1), labels, labels, reference)
    assert same["accuracy"] == 1 and same["frechet"] < 5 and abs(same["diversity"] - 1) < 0.02
    noise = digits.measure(normal((4000, 64), "noise").double(), 0 * labels, labels, reference)
    assert noise["accuracy"] == 0.1 and noise["frechet"] > 100 * same["frechet"]
    copies = digits.measure(centres[labels], labels, labels, reference)
    assert copies["diversity"] == 0 and copies["frechet_classes"] > 3 * same["frechet_classes"]
    swapped = digits.measure(samples(1).roll(1, 0), labels, labels, reference)
    assert swapped["frechet"] == pytest.approx(same["frechet"])  # only the classes show it
    assert swapped["frechet_classes"] > 100 * same["frechet_classes"]
    refused = digits.measure(samples(1), 1 + labels, labels, reference)  # by the classifier
    assert same["coverage"] > 0.9 and refused["coverage"] == swapped["coverage"] == 0


def test_coverage_does_not_rise_with_broken_samples():
    """Control: the mean distance of two samples does. Half of the modes is half of the coverage."""
    modes = 5.0 * torch.arange(2)[:, None] * torch.ones(8)
    z, centres = (normal((200, 8), name).double() + modes.repeat(100, 1) for name in "ab")
    covered = digits.coverage(z, centres)
    assert covered > 0.85 and digits.coverage(centres, centres) == 1
    assert digits.coverage(z[::2], centres) == pytest.approx(covered / 2, abs=0.02)
    assert digits.coverage(z[:0], centres) == 0
    broken = z.clone()
    broken[::2] = 50 * normal((100, 8), "far").double()  # in place of one mode
    assert digits.coverage(broken, centres) <= covered / 2 + 0.02
    assert torch.pdist(broken).mean() > 2 * torch.pdist(z).mean()


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_reports_its_own_samples(finished, monkeypatch):
    """metrics.json belongs to the samples of the student that was saved, rows of the png, too."""
    metrics, run = json.loads((finished / "metrics.json").read_text()), load_run(finished)
    z = normal((100, *digits.SHAPE), run.cfg.seed, "report", "z")
    xs = digits.sample_from(run.nets, run.times, z, CPU)
    samples = digits.classify(digits.load_classifier(), digits.to_pixels(xs[-1]))
    measured = digits.measure(*samples, digits.cycle_labels(100), digits.load_reference())
    assert {name: metrics[name] for name in measured} == pytest.approx(measured, rel=1e-4)
    assert metrics["samples"] == 100 and "frechet_floor" not in metrics  # it needs 10,000
    rows = {}
    monkeypatch.setattr(digits, "draw_sheet", lambda drawn: rows.update(drawn) or b"")
    digits.report(run.cfg, run.phases, run.roles, 2, CPU, finished, finished=True)
    names = "teacher, 40 steps; teacher, 4 steps; student, 4 steps; t = 1; t = 0.75; t = 0"
    assert "; ".join(rows) == names
    for name, x in {"student, 4 steps": xs[-1][:30], "t = 1": z[:10], "t = 0": xs[-1][:10]}.items():
        assert torch.allclose(rows[name], x, atol=1e-4)


def test_after_phase_1_the_teacher_completes_the_samples(tmp_path, monkeypatch):
    """The untrained student is the teacher without guidance; its two steps alone are not digits."""
    cfg = train.make_config("mnist", eval_samples=40)
    phases = train.phases_of(cfg)
    roles = digits.PRESET.make_roles(cfg, phases, CPU, tmp_path)
    roles.student[1].start()
    monkeypatch.setattr(digits, "draw_sheet", lambda drawn: b"")
    metrics, _ = digits.report(cfg, phases, roles, 1, CPU, tmp_path, finished=False)
    assert metrics["accuracy"] > 0.9


def test_the_student_of_a_run_draws(finished, capsys):
    assert sample.main(["--student", str(finished), "--n", "13", "--trajectory"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert np.load(finished / "samples" / "samples.npy").shape == (5, 13, 28, 28)
