"""Phased DMD in one file: a ring of eight modes, a student of four steps, two phases.

python toy/minimal.py      a minute; or run the cells (# %%) in an editor
python train.py            the same with the same random numbers; a test compares the two
"""

# %% The data are known exactly, and so is the teacher
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script
import torch
from tqdm import tqdm

from losses import dmd_gradient, dmd_loss, subinterval_matching
from models.common import normal, stream
from models.media import Figure
from phases import Phase, make_phases, rollout, step_times, trajectory
from sde import diffuse
from toy.mixtures import energy, mode_coverage, ring
from toy.toy2d import MLP

N, K, BATCH = 4, 2, 256  # steps, phases, samples per update
data = ring()  # data.velocity(x_t, t) is E[eps - x_0 | x_t], what a perfect teacher predicts
times = step_times(N, shift=1.0)  # 1, 0.75, 0.5, 0.25, 0
phases = make_phases(N, K)  # phase 1 ends at s = 0.5, phase 2 at s = 0


# %% A real teacher is a network, and student and fake start from it. Here: a network fitted to it
def fit_start(steps: int = 1500) -> MLP:
    torch.manual_seed(0)
    net = MLP()
    key = "start", "ring", "off"  # of random numbers, as train.py has it
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in tqdm(range(steps), "start network", disable=None):
        x_0 = data.sample(1024, stream(*key, i, "x_0"))
        t = torch.rand(1024, generator=stream(*key, i, "t"))
        x_t = diffuse(x_0, 0.0, t, normal(x_0.shape, *key, i, "eps"))  # Eq. 1
        (net(x_t, t) - data.velocity(x_t, t)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    return net


# %% One phase trains one expert and its fake. Earlier experts are frozen
def train_phase(phase: Phase, experts: list, start: MLP, iters=400, warmup=200) -> None:
    s = phase.s
    low, high = phase.intervals[0].u  # re-noise in (s, 1), less a margin
    expert, fake = copy.deepcopy(start), copy.deepcopy(start)
    experts.append(expert)
    nets = [net for net in experts for _ in range(N // K)]  # the network of each step
    adamw = lambda p: torch.optim.AdamW(p, betas=(0.0, 0.999), eps=1e-16, weight_decay=0.0)
    student_adamw, fake_adamw = adamw(expert.parameters()), adamw(fake.parameters())

    def sample(rng: torch.Generator, n: int, depth: int | None) -> tuple:
        x_s = rollout(nets, times, phase, torch.randn(n, 2, generator=rng), None, depth)  # Eq. 9
        t = low + (high - low) * torch.rand(n, generator=rng)
        eps = torch.randn(n, 2, generator=rng)
        return x_s, t, eps, diffuse(x_s.detach(), s, t, eps)  # x_t of Eq. 2

    for i in tqdm(range(-warmup, iters), f"phase {phase.k}", disable=None):
        for optimizer, lr in ((student_adamw, 1e-3), (fake_adamw, 2e-3)):  # falls in the last half
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (iters - i) / (iters / 2))
        for n in range(5 if i >= 0 else 1):  # the fake must follow the student (A1)
            with torch.no_grad():  # complete rollouts: the samples that users will draw
                x_s, t, eps, x_t = sample(stream(0, phase.k, i, n, 0), BATCH, None)
            subinterval_matching(fake(x_t, t), x_s, s, t, eps).mean().backward()  # Eq. 13
            fake_adamw.step(), fake_adamw.zero_grad()
        if i < 0:
            continue  # the fake warms up
        for depth in range(1, phase.num_steps + 1):  # depth - 1 steps, then the jump to s (SGTS)
            x_s, t, _, x_t = sample(stream(0, phase.k, i, 5, depth - 1), BATCH // (N // K), depth)
            with torch.no_grad():  # their difference is proportional to one of scores (Eq. 5, A2)
                v_real, v_fake = data.velocity(x_t, t), fake(x_t, t)
                gradient = dmd_gradient(x_s, x_t, s, t, v_real, v_fake, "xs")  # near Eq. 10
            (dmd_loss(x_s, gradient).mean() / phase.num_steps).backward()
        student_adamw.step(), student_adamw.zero_grad()


# %% Train both phases, then draw samples as a user would: four steps, two by each expert
def main() -> None:
    torch.set_num_threads(1)  # a second thread only waits at this size
    start = fit_start()
    experts = []
    for phase in phases:
        train_phase(phase, experts, start)
    nets = [experts[0], experts[0], experts[1], experts[1]]
    xs = [x.detach() for x in trajectory(nets, times, normal((10_000, 2), 0, "evaluate", "z"))]
    distance = energy(xs[-1], data.sample(10_000, stream("exact", 0, 0)))
    print(f"energy {distance:.4f}, modes {mode_coverage(xs[-1], data)[0]:.2f} of 8")
    axes = Figure((12, 2.6)).subplots(1, N + 1)
    for ax, x, t in zip(axes, xs, times):
        ax.scatter(x[:, 0], x[:, 1], s=0.5, c=torch.atan2(xs[-1][:, 1], xs[-1][:, 0]), cmap="hsv")
        ax.set_title(f"t = {t:g}")
    axes[0].figure.savefig("minimal.png")


if __name__ == "__main__":
    main()
