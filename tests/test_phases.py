"""Claims about phases.py and moe.py: times, intervals, experts, and who is asked."""

import pytest
import torch

import moe
import phases as ph

EVEN = torch.linspace(0, 1, 10_001)[:-1]  # stands for u ~ U(0, 1), without the noise


@pytest.mark.parametrize(
    "S,expected", [(5, [1, 0.9375, 0.8333, 0.625, 0]), (3, [1, 0.9, 0.75, 0.5, 0])]
)
def test_the_times_are_the_papers(S, expected):
    """And diffusers' twice-shifted ones are not."""
    assert ph.step_times(4, S) == pytest.approx(expected, abs=5e-5)
    assert ph.step_times(4, S) != pytest.approx([1, 0.9097, 0.7173, 0.0244, 0], abs=5e-3)


def test_four_steps_in_two_phases_are_the_papers():
    """Phase 1 ends at 0.8333 and re-noises in (0.8333, 1); phase 2 at 0, in (0, 1)."""
    one, two = ph.make_phases(4, 2, 5, margin=0)
    assert (one.first, one.last, two.first, two.last) == (0, 2, 2, 4)
    assert one.t == pytest.approx([1, 0.9375, 5 / 6]) and two.t == pytest.approx([5 / 6, 0.625, 0])
    for phase, low in ((one, 5 / 6), (two, 0)):
        t = ph.renoise_times(phase.parts[0], torch.tensor([0.0, 1.0]), 5)
        assert t.tolist() == pytest.approx([low, 1])
    assert "833.3" in ph.table([one, two], 5)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("S", [1, 5])
def test_phases_tile_the_steps_and_the_interval(steps, S):
    """For every K that divides N: steps and disjoint intervals tile; nested ones reach noise."""
    for K in (k for k in range(1, steps + 1) if steps % k == 0):
        for interval in ("nested", "disjoint"):
            made = ph.make_phases(steps, K, S, interval, margin=0)
            assert [i for p in made for i in range(p.first, p.last)] == list(range(steps))
            assert [p.t[0] for p in made] == pytest.approx(
                [1.0] + [p.s for p in made[:-1]]
            ) and made[-1].s == 0
            assert [t for p in made for t in p.t[:-1]] + [0] == pytest.approx(
                ph.step_times(steps, S)
            )
            ends = [p.parts[0].u for p in made]
            tops = [1.0] * K if interval == "nested" else [1.0] + [u[0] for u in ends[:-1]]
            assert [u[1] for u in ends] == pytest.approx(tops)
            assert all(len(p.parts) == 1 for p in made)


def test_phases_that_do_not_divide_the_steps_are_refused():
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 4\]"):
        ph.make_phases(4, 3)


@pytest.mark.parametrize("boundary_t,clipped", [(0.875, 0.1667), (0.9, 0.2857)])
def test_wan22_clips_phase_1_to_its_boundary_and_splits_phase_2(boundary_t, clipped):
    """16.7 % and 28.6 % of the draws land on the boundary, as in the paper; phase 2 asks both."""
    one, two = ph.make_phases(4, 2, 5, margin=0, boundary_t=boundary_t)
    t = ph.renoise_times(one.parts[0], EVEN, 5)
    assert t.min() == pytest.approx(boundary_t) and (
        t <= boundary_t + 1e-6
    ).float().mean() == pytest.approx(clipped, abs=1e-3)
    inside = ph.make_phases(4, 2, 5, margin=0, boundary_t=boundary_t, boundary="inside")[0]
    t = ph.renoise_times(inside.parts[0], EVEN, 5)
    assert t.min() >= boundary_t - 1e-6 and (t <= boundary_t + 1e-6).float().mean() < 0.001
    assert [part.expert for part in one.parts] == [1] and [part.expert for part in two.parts] == [
        1,
        2,
    ]


def test_a_drawn_part_leaves_the_law_of_t_unchanged():
    """One expert an update, chosen by its share (0.417 and 0.583 for Wan2.2), then t inside it."""
    _, two = ph.make_phases(4, 2, 5, margin=0, boundary_t=0.875)
    parts = [ph.pick_part(two, u) for u in EVEN.tolist()]
    assert sum(part.expert == 1 for part in parts) / len(parts) == pytest.approx(0.4167, abs=1e-3)
    shuffled = EVEN[torch.randperm(len(EVEN), generator=torch.Generator().manual_seed(0))]
    t = (
        torch.cat([ph.renoise_times(part, u[None], 5) for part, u in zip(parts, shuffled)])
        .sort()
        .values
    )
    whole = ph.renoise_times(ph.make_phases(4, 2, 5, margin=0)[1].parts[0], EVEN, 5)
    assert (t - whole).abs().max() < 0.02
    assert all(
        (t >= 0.875) == (part.expert == 1)
        for part, t in ((p, ph.renoise_times(p, torch.tensor([0.5]), 5)) for p in parts[::500])
    )


def test_margins_keep_draws_off_both_ends_and_a_fixed_t_is_fixed():
    for phase in ph.make_phases(4, 2, 5, margin=0.02):
        t = ph.renoise_times(phase.parts[0], EVEN, 5)
        assert phase.s + 0.001 < t.min() and t.max() < 0.999
    (only,) = ph.make_phases(4, 1, fix_t=0.357)
    assert ph.renoise_times(only.parts[0], EVEN, 1).unique().tolist() == pytest.approx([0.357])
    with pytest.raises(ValueError, match="where phase 1 ends"):
        ph.make_phases(4, 2, fix_t=0.357)


def test_truncation_depths_are_drawn_evenly_or_mixed_evenly():
    """Mixed: equal shares of the batch in passes of any size; one sample is not always depth 1."""
    phase = ph.make_phases(4, 1)[0]

    def depths(passes, u=0.0, mixed=True, batch=256):
        return torch.cat([ph.truncation_depths(phase, rows, u, mixed, batch) for rows in passes])

    drawn = torch.cat([depths([range(1)], u, mixed=False) for u in EVEN.tolist()])
    assert drawn.bincount().tolist() == [0] + [2500] * 4
    assert depths([range(8)], 0.99, mixed=False).unique().tolist() == [4]
    for size in (1, 3, 256):
        passes = [range(i, min(i + size, 256)) for i in range(0, 256, size)]
        assert depths(passes).bincount().tolist() == [0] + [64] * 4
    alone = torch.cat([depths([range(1)], u, batch=1) for u in EVEN.tolist()])
    assert alone.bincount().tolist() == [0] + [2500] * 4


def constant(value):
    """A network that answers with a number and counts the rows it is asked for."""

    def net(x_t, t, c=None):
        net.rows += len(x_t)
        return torch.full_like(x_t, value) + (c["class"][:, None] if c else 0)

    net.rows = 0
    return net


def test_experts_answer_for_their_own_steps_times_and_depths_only():
    """By step index for students, by t for teachers, by depth for fakes; conditions go along."""
    asked = []
    phases = ph.make_phases(4, 2)
    for net in moe.by_step(lambda role, *_: asked.append(role), phases):
        net(None, None)
    assert asked == ["student1", "student1", "student2", "student2"]

    high, low, t = constant(1.0), constant(2.0), torch.tensor([0.9, 0.875, 0.87, 0.1])
    c = {"class": torch.tensor([0, 10, 20, 30])}
    v = moe.by_time(high, low, 0.875)(torch.zeros(4, 1), t, c)
    assert v[:, 0].tolist() == [1, 11, 22, 32] and (high.rows, low.rows) == (2, 2)

    nets, depth = [constant(1.0), constant(2.0)], torch.tensor([2, 1, 2, 2])
    v = moe.by_depth(nets, depth)(torch.zeros(4, 1), t, c)
    assert v[:, 0].tolist() == [2, 11, 22, 32] and [net.rows for net in nets] == [1, 3]


def test_roles_of_a_phase_are_one_student_and_a_fake_for_each_teacher_expert_in_reach():
    """In general phase k has k fakes: for Wan2.2 one in phase 1, two in phase 2."""
    one, two = ph.make_phases(4, 2, 5, boundary_t=0.875)
    assert moe.fake_roles(one, False) == ["fake1"] and moe.fake_roles(two, False) == [
        "fake1",
        "fake2",
    ]
    assert moe.fake_roles(one, True) == ["fake1-depth1", "fake1-depth2"]
    assert moe.run_roles([one, two], False) == ["student1", "student2", "fake1", "fake2"]
