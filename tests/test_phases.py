"""Claims about phases.py and moe.py: times, intervals, depths, and which network takes a step."""

import pytest
import torch

import moe
import phases as ph

EVEN = torch.linspace(0, 1, 10_001)[:-1]  # stands for u ~ U(0, 1), without the noise


@pytest.fixture
def no_margin(monkeypatch):
    """Intervals that reach their ends, as the paper prints them."""
    monkeypatch.setattr(ph, "MARGIN", 0.0)


def test_the_times_are_the_papers():
    """Control: the twice-shifted times of a wrongly configured diffusers scheduler are not."""
    assert ph.step_times(4, 5) == pytest.approx([1, 0.9375, 0.8333, 0.625, 0], abs=5e-5)
    assert ph.step_times(4, 3) == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=5e-5)
    assert ph.step_times(4, 5) != pytest.approx([1, 0.9097, 0.7173, 0.0244, 0], abs=5e-3)


def test_four_steps_in_two_phases_are_the_papers(no_margin):
    """Phase 1 ends at 0.8333 and re-noises in (0.8333, 1); phase 2 ends at 0, in (0, 1)."""
    one, two = ph.make_phases(4, 2, 5)
    assert (one.first, one.end, two.first, two.end) == (0, 2, 2, 4)
    assert one.t == pytest.approx([1, 0.9375, 5 / 6]) and two.t == pytest.approx([5 / 6, 0.625, 0])
    for phase, low in ((one, 5 / 6), (two, 0)):
        t = ph.renoise_times(phase.intervals[0], torch.tensor([0.0, 1.0]), 5)
        assert t.tolist() == pytest.approx([low, 1])
    assert "833.3" in ph.format_phases([one, two], 5)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("S", [1, 5])
def test_phases_tile_the_steps_and_the_interval(steps, S, no_margin):
    """For every K that divides N: steps and disjoint intervals tile; nested ones reach noise."""
    for K in (k for k in range(1, steps + 1) if steps % k == 0):
        for interval in ("nested", "disjoint"):
            phases = ph.make_phases(steps, K, S, interval)
            assert [i for p in phases for i in range(p.first, p.end)] == list(range(steps))
            starts = [1.0] + [p.s for p in phases[:-1]]
            assert [p.t[0] for p in phases] == pytest.approx(starts) and phases[-1].s == 0
            times = [t for p in phases for t in p.t[:-1]] + [0]
            assert times == pytest.approx(ph.step_times(steps, S))
            u = [p.intervals[0].u for p in phases]
            tops = [1.0] * K if interval == "nested" else [1.0] + [low for low, _ in u[:-1]]
            assert [high for _, high in u] == pytest.approx(tops)
            assert all(len(p.intervals) == 1 for p in phases)


def test_phases_that_do_not_divide_the_steps_are_refused():
    with pytest.raises(ValueError, match=r"a divisor of --steps 4 \[1, 2, 4\], got 3"):
        ph.make_phases(4, 3)


@pytest.mark.parametrize("boundary_t,clipped", [(0.875, 0.1667), (0.9, 0.2857)])
def test_wan22_clips_phase_1_to_its_boundary_and_splits_phase_2(boundary_t, clipped, no_margin):
    """16.7 % and 28.6 % of the draws land on the boundary, as in the paper."""
    one, two = ph.make_phases(4, 2, 5, boundary_t=boundary_t)
    t = ph.renoise_times(one.intervals[0], EVEN, 5)
    assert t.min() == pytest.approx(boundary_t)
    assert (t <= boundary_t + 1e-6).float().mean() == pytest.approx(clipped, abs=1e-3)
    assert [part.branch for part in one.intervals] == [1]
    assert [part.branch for part in two.intervals] == [1, 2]


def test_sampling_an_interval_first_leaves_the_distribution_of_t_unchanged(no_margin):
    """One branch per update, chosen by its share (0.417, 0.583 for Wan2.2), then t inside it."""
    _, two = ph.make_phases(4, 2, 5, boundary_t=0.875)
    parts = [ph.pick_interval(two, r) for r in EVEN.tolist()]
    share = sum(part.branch == 1 for part in parts) / len(parts)
    assert share == pytest.approx(0.4167, abs=1e-3)
    shuffled = EVEN[torch.randperm(len(EVEN), generator=torch.Generator().manual_seed(0))]
    t = torch.cat([ph.renoise_times(part, r[None], 5) for part, r in zip(parts, shuffled)])
    whole = ph.renoise_times(ph.make_phases(4, 2, 5)[1].intervals[0], EVEN, 5)
    assert (t.sort().values - whole).abs().max() < 0.02
    middle = {part.branch: ph.renoise_times(part, torch.tensor([0.5]), 5) for part in parts}
    assert middle[1] >= 0.875 > middle[2]


def test_margins_keep_draws_off_both_ends_and_a_fixed_t_is_fixed():
    for phase in ph.make_phases(4, 2, 5):
        t = ph.renoise_times(phase.intervals[0], EVEN, 5)
        assert phase.s + 0.001 < t.min() and t.max() < 0.999
    (only,) = ph.make_phases(4, 1, fix_t=0.357)
    t = ph.renoise_times(only.intervals[0], EVEN, 1)
    assert t.unique().tolist() == pytest.approx([0.357])
    with pytest.raises(ValueError, match="where phase 1 ends"):
        ph.make_phases(4, 2, fix_t=0.357)


def test_truncation_depths_are_drawn_evenly_or_mixed_evenly():
    """Drawn: one for the batch. Mixed: every batch holds all depths, in shares that differ by 1."""
    drawn = [ph.split_batch(64, 0, 4, False, r) for r in EVEN.tolist()]
    depths = torch.tensor([depth for ((n, depth),) in drawn if n == 64])
    assert depths.bincount().tolist() == [0] + [2500] * 4
    assert ph.split_batch(256, 0, 2, True, 0.9) == [(128, 1), (128, 2)]
    assert ph.split_batch(256, 0, 3, True, 0.0) == [(86, 1), (85, 2), (85, 3)]
    assert ph.split_batch(8, 2, 4, True, 0.5) == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert ph.split_batch(8, 4, 2, False, 0.9) == [(4, 2), (4, 2)]
    assert ph.split_batch(10, 4, 0, True, 0.5) == [(4, None), (4, None), (2, None)]


def test_a_network_is_called_for_its_own_steps_only():
    """Students are routed by step index; of the teacher's branches the boundary belongs to 1."""
    calls = []
    student = {k: moe.Role(f"student{k}", lambda *_, k=k: calls.append(k)) for k in (1, 2)}
    for net in moe.student_nets(moe.Roles({}, student, {}), ph.make_phases(4, 2)):
        net(None, None)
    assert calls == [1, 1, 2, 2]
    assert [ph.branch_at(t, 0.875) for t in (1.0, 0.875, 0.8749, 0.0)] == [1, 1, 2, 2]
    assert ph.branch_at(0.1, None) == 1


def test_a_phase_trains_one_expert_and_one_fake_per_branch_in_reach():
    """Phase k has k fakes: for Wan2.2 one in phase 1, two in phase 2. Phase 1 needs one base."""
    phases = ph.make_phases(4, 2, 5, boundary_t=0.875)
    one, two = (moe.active_roles(phases, k, False, 0.875) for k in (1, 2))
    assert (one.bases, one.frozen, one.trained) == ([1], [], ["student1", "fake1"])
    assert (two.bases, two.frozen) == ([1, 2], ["student1"])
    assert two.trained == ["student2", "fake1", "fake2"]
    assert one.branch_of == {"student1": 1, "student2": 2, "fake1": 1, "fake2": 2}
    per_depth = moe.active_roles(phases, 1, True, 0.875)
    assert per_depth.trained == ["student1", "fake1-depth1", "fake1-depth2"]


def test_chunks_give_the_same_output_and_carry_their_conditions():
    def net(x_t, t, c):
        sizes.append(len(x_t))
        return x_t + t[:, None] + c["class"][:, None]

    sizes, x, t, c = [], torch.zeros(5, 2), torch.arange(5.0), {"class": torch.arange(5)}
    assert torch.equal(moe.chunked(net, 2)(x, t, c), net(x, t, c)) and sizes == [2, 2, 1, 5]
