"""Claims about large teachers: one base and many roles, Wan2.2 by the paper's rules."""

import gc
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moe
import phases as ph
import sample
import train
from models import bases, large, lora, plan, qwen_image, weights
from models.draws import normal
from models.files import UserError
from models.parallel import blocks_of
from sde import shift

CPU = torch.device("cpu")
TINY = ["wan21-tiny", "wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"]
MIX = [("lora", "lora"), ("lora", "full"), ("full", "full")]


def begun(teacher="wan22-tiny", k=1, stir=True, **settings) -> train.Run:
    """A run in phase k, in float32, whose adapters are not zero any more."""
    cfg = train.config(teacher, **{"dtype": "float32", "fake_updates": 1} | settings)
    train.validate(cfg)
    run = train.new_run(cfg, {}, CPU, Path("nowhere"))
    for phase in range(1, k + 1):
        train.begin_phase(run, phase)
    run.i = 0
    for role in run.trained if stir else ():
        for name, p in run.roles.parameters_of(role).items():
            if name.endswith(".up"):
                p.data.copy_(normal(p.shape, role, name) / 10)
    return run


def snapshot(run) -> dict:
    """Every tensor of the run: roles and bases."""
    held = {f"{r}/{n}": p for r in run.trained for n, p in run.roles.parameters_of(r).items()}
    held |= {
        f"base{e}/{n}": p for e, net in nets_of(run).items() for n, p in bases.frozen(net).items()
    }
    return {name: p.detach().clone() for name, p in held.items()}


def nets_of(run) -> dict:
    """The bases that are in memory."""
    return run.roles.reset.__closure__[
        names(run.roles.reset).index("network")
    ].cell_contents.networks


def names(function) -> tuple:
    return function.__code__.co_freevars


@contextmanager
def gradients():
    """Collects the gradients of every update in place of taking its step."""
    found, kept = [], train.apply

    def collect(run, name, values, about):
        for role in run.trained:
            for key, p in run.roles.parameters_of(role).items():
                if p.grad is not None:
                    found.append((name, role, key, p.grad.clone()))
                p.grad = None
        return {"role": name} | {k: v.item() for k, v in values.items()}

    train.apply = collect
    try:
        yield found
    finally:
        train.apply = kept


def gradients_of(run) -> dict:
    """(update, role, parameter) -> gradient, of one iteration."""
    with gradients() as found:
        train.iteration(run)
    return {key: grad for *key, grad in found for key in [tuple(key)]}


# -- roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator,fake", MIX)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_at_the_first_step_student_fake_and_teacher_are_one_function(
    teacher, dtype, generator, fake
):
    """To the bit, adapters and full copies alike; after an update they are not."""
    run = begun(teacher, 2, False, generator=generator, fake=fake, dtype=dtype, guidance=(1.0,),
                fake_lr=1e-3, lr=1e-3)  # fmt: skip
    c, shape = run.batch(2, 0, 0)
    x, t = normal((2, *shape), "x"), torch.tensor([0.9, 0.3])
    ask = lambda role: run.roles.velocity(role, x, t, c)
    with torch.no_grad():
        low = "2" if teacher == "wan22-tiny" else "1"
        assert torch.equal(ask("fake1"), ask("teacher1"))
        assert torch.equal(ask("student2"), ask("teacher" + low))
        assert torch.equal(ask("fake" + low), ask("teacher" + low))
    losses_of(run)
    with torch.no_grad():
        assert not torch.equal(ask("student2"), ask("teacher" + low))


@pytest.mark.parametrize("generator,fake", MIX)
def test_nothing_is_in_memory_twice(generator, fake):
    """All parameters that live are two bases, once, and what the plan says of the roles."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.nn.Parameter}
    run = begun(k=2, generator=generator, fake=fake, dtype="bf16")
    train.iteration(run)
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and id(x) not in before]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    size = plan.sizes("wan22-tiny", 4, torch.bfloat16)
    own = {"lora": size.lora, "full": size.own}
    # student1, student2; fake1, fake2
    assert sum(held.values()) == 2 * size.base + 2 * own[generator] + 2 * own[fake]
    assert len(held) == len(alive)


@pytest.mark.parametrize("generator,fake", MIX)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("teacher", ["wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"])
def test_gradients_are_the_same_with_and_without_checkpointing_and_in_both_memory_ways(
    teacher, k, generator, fake
):
    """Of every role and parameter, to 1e-5: nothing depends on when a forward was recorded."""
    ways = [(c, r) for c in ("on", "off") for r in ("first", "last")]
    how = dict(generator=generator, fake=fake, fake_updates=4, batch=2, size=("48x64",))
    found = [gradients_of(begun(teacher, k, checkpointing=c, record=r, **how)) for c, r in ways]
    assert {role for _, role, _ in found[0]} == set(begun(teacher, k, **how).held[k - 1].trained)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, grad in found[0].items():
            torch.testing.assert_close(other[key], grad, rtol=1e-5, atol=1e-7, msg=str(key))


def test_a_role_that_is_an_attribute_gives_wrong_gradients(monkeypatch):
    """Negative control: with checkpointing, backward would compute again as the last role."""
    active = [None]

    def forward(self, x, adapter=None):
        y = torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y + self.adapters[active[0]](x) if active[0] in self.adapters else y

    def by_attribute(run):
        ask = run.meter.velocity

        def velocity(role, *inputs):
            active[0] = role
            return ask(role, *inputs)

        run.meter.velocity = velocity
        return gradients_of(run)

    of_student = lambda found: torch.cat(
        [grad.flatten() for (_, role, _), grad in found.items() if role == "student1"]
    )
    right = of_student(gradients_of(begun(record="first")))
    monkeypatch.setattr(lora.Linear, "forward", forward)
    off, on = (
        of_student(by_attribute(begun(record="first", checkpointing=way))) for way in ("off", "on")
    )
    torch.testing.assert_close(off, right)  # nothing is computed again
    assert (on - right).norm() > 0.05 * right.norm()


# -- Wan2.2 by the paper's rules -----------------------------------------------------------------


def test_phase_1_never_loads_the_low_noise_base_and_phase_2_does(monkeypatch):
    loaded, kept = [], large.load
    monkeypatch.setattr(large, "load", lambda *a: loaded.append(a[2]) or kept(*a))
    run = begun(iters=2, warmup=1)
    run.i = -1
    for _ in train.train(run):
        assert loaded == ([1] if run.k == 1 else [1, 2])
        train.look(run)  # which looks at the student so far
        assert loaded == ([1] if run.k == 1 else [1, 2])
    assert run.k == 2


@pytest.mark.parametrize(
    "teacher", ["wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny", "wan21-tiny"]
)
def test_a_phase_changes_its_student_and_its_fakes_and_nothing_else(teacher):
    """Phase 2 of Wan2.2: exactly three adapters. Of one base: two. Bases and student1 stay."""
    run = begun(teacher, 2, iters=6, fake_updates=2, lr=1e-3, fake_lr=1e-3)
    before = snapshot(run)
    for _ in range(6):
        train.iteration(run)
        run.i += 1
    after = snapshot(run)
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    fakes = {"fake1", "fake2"} if teacher.startswith("wan22") else {"fake1"}
    assert changed == {"student2"} | fakes
    assert {name.split("/")[0] for name in before} >= {"base1", "student1"}


def test_only_the_drawn_experts_parameters_get_gradients():
    """Each update of phase 2 reaches one fake, of its own expert; the other's are None."""
    run, drawn = begun(k=2, fake_updates=8), set()
    with gradients() as found:
        train.iteration(run)
    for update, role, *_ in found:
        assert role == update
        drawn.add(role)
    assert drawn == {"fake1", "fake2", "student2"}


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_guidance_is_its_closed_form_with_each_experts_scale(teacher):
    """v_null + g (v - v_null), for Qwen-Image at the norm of v in every token."""
    run = begun(teacher, 2)
    c, shape = run.batch(2, 0, 0)
    x, t = normal((2, *shape), "x"), torch.tensor([0.95, 0.9])
    null = large.null_of(run.cfg, run.out)["text"].expand(2, -1, -1)
    for e, net in nets_of(run).items():
        scale = run.cfg.guidance[min(e, len(run.cfg.guidance)) - 1]
        with torch.no_grad():
            v, v_null = net(x, t, c), net(x, t, {"text": null})
            found = run.roles.velocity(f"teacher{e}", x, t, c)
        expected = v_null + scale * (v - v_null)
        if teacher == "qwen-image-tiny":
            tokens, own = qwen_image.pack(expected), qwen_image.pack(v)
            tokens = tokens * own.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
            expected = qwen_image.unpack(tokens, shape[1] // 2)
        torch.testing.assert_close(found, expected)
        assert (found - (v_null + (scale + 1) * (v - v_null))).abs().max() > 0.01
    assert train.config("wan22").guidance == (4.0, 3.0)


def expectation(parts, chances, nets, S: float, n: int = 20_000) -> float:
    """E nets(x_t, t) over a part drawn by chance, then t inside it; x_t is t itself."""
    r = (torch.arange(n) + 0.5) / n
    total = 0.0
    for part, chance in zip(parts, chances):
        t = ph.renoise_times(part, r, S)
        total += chance * nets[part.expert - 1](t, t).mean().item()
    return total


def test_the_drawn_branch_and_routing_by_sample_agree_in_expectation():
    """And do not where the branch is drawn with other odds than its share of the interval."""
    high, low = lambda x, t, c=None: x**2 + 3, lambda x, t, c=None: -x
    _, phase = ph.make_phases(4, 2, 5.0, boundary_t=0.875)
    widths = torch.tensor([part.u[1] - part.u[0] for part in phase.parts])
    whole = ph.Part(1, (phase.parts[1].u[0], phase.parts[0].u[1]))
    routed = expectation([whole], [1.0], [moe.by_time(high, low, 0.875)], 5.0)
    drawn = expectation(phase.parts, (widths / widths.sum()).tolist(), [high, low], 5.0)
    assert (
        abs(drawn - routed)
        < 1e-3
        < abs(expectation(phase.parts, [0.5, 0.5], [high, low], 5.0) - routed)
    )
    counts = torch.tensor([ph.pick_part(phase, r / 1000).expert for r in range(1000)])
    assert abs((counts == 1).float().mean() - (widths / widths.sum())[0]) < 2e-3
    assert abs((widths / widths.sum())[0] - 0.417) < 0.01  # of contract and paper, without margins


def test_phase_1_of_wan22_is_clipped_to_its_boundary():
    """16.7 % of the draws at 0.875 for T2V, 28.6 % at 0.9 for I2V, as the paper's clip has it."""
    for boundary, share in ((0.875, 0.167), (0.9, 0.286)):
        one, _ = ph.make_phases(4, 2, 5.0, margin=0.0, boundary_t=boundary)
        t = ph.renoise_times(one.parts[0], (torch.arange(10_000) + 0.5) / 10_000, 5.0)
        assert abs((t == torch.tensor(boundary)).float().mean() - share) < 1e-3


def test_a_student_across_the_boundary_starts_from_the_expert_of_its_last_step():
    """At shift 7 the low-noise phase begins at t = 0.875: routing by t would split it."""
    phases = ph.make_phases(4, 2, 7.0, boundary_t=0.875)
    assert moe.expert_of("student1", phases, 0.875) == 1
    assert moe.expert_of("student2", phases, 0.875) == 2 and phases[1].t[0] >= 0.875
    [one] = ph.make_phases(4, 1, 5.0, boundary_t=0.875)
    assert moe.expert_of("student1", [one], 0.875) == 2
    assert moe.expert_of("fake1-depth2", phases, 0.875) == 1
    assert moe.expert_at(0.875, 0.875) == 1 and moe.expert_at(0.8749, 0.875) == 2


@pytest.mark.parametrize("generator,fake", MIX)
def test_phase_2_starts_its_fakes_from_the_teacher_again(generator, fake):
    """Adapters at nothing, copies at the base, to the bit, in the place of the old ones."""
    run = begun(iters=2, generator=generator, fake=fake, fake_lr=1e-2)
    losses_of(run, 2)
    places = {p.data_ptr() for p in run.roles.parameters_of("fake1").values()}
    train.begin_phase(run, 2)
    c, shape = run.batch(2, 0, 0)
    x, t = normal((2, *shape), "x"), torch.tensor([0.9, 0.95])
    with torch.no_grad():
        v = nets_of(run)[1](x, t, c)
        assert torch.equal(run.roles.velocity("fake1", x, t, c), v)
        assert not torch.equal(run.roles.velocity("student1", x, t, c), v)
    assert places == {p.data_ptr() for p in run.roles.parameters_of("fake1").values()}


# -- what may not change a number ----------------------------------------------------------------


def losses_of(run, n=3) -> torch.Tensor:
    """All losses of some iterations."""
    found = []
    for _ in range(n):
        found += [row["loss"] for row in train.iteration(run)]
        run.i += 1
    return torch.tensor(found)


FAST = dict(batch=8, fake_updates=2, lr=1e-3, fake_lr=1e-3)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("generator,fake", MIX[:2])
@pytest.mark.parametrize("offload", ["expert", "blocks"])
def test_offload_changes_no_number(offload, k, generator, fake):
    settings = FAST | dict(generator=generator, fake=fake, micro_batch=4)
    usual = losses_of(begun(k=k, **settings))
    run = begun(k=k, **settings, offload=offload)
    assert run.record_last
    torch.testing.assert_close(losses_of(run), usual, rtol=1e-5, atol=0)


def test_with_offload_one_base_is_on_the_device_at_a_time():
    """The parameters of the other are the host's own tensors, also after a whole iteration."""
    run = begun(k=2, offload="expert", **FAST)
    for ask in (
        lambda: train.iteration(run),
        lambda: train.look(run),
        lambda: train.iteration(run),
    ):
        ask()
        held = run.roles.reset.__closure__[names(run.roles.reset).index("network")].cell_contents
        here = [
            e for e, net in held.networks.items()
            if any(p.data_ptr() != held.host[e][n].data_ptr() for n, p in bases.frozen(net).items())
        ]  # fmt: skip
        assert here == [held.here] and set(held.networks) == {1, 2}


def test_pinned_memory_is_packed_and_counted():
    """No tensor overlaps another, all keep their numbers, and the plan knows the size."""
    row = weights.TEACHERS["wan21-tiny"]
    nets = [weights.random_network(row.network, row.settings, torch.bfloat16) for _ in range(2)]
    pinned, taken, starts = bases.Pinned(CPU, bases.PIECE), 0, []
    for p, same in zip(nets[0].parameters(), nets[1].parameters()):
        starts.append((pinned.take(p).data_ptr(), p.nbytes))
        taken += p.nbytes
    for p, same in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.equal(p, same) and p.data_ptr() % 16 == 0
    ends = sorted(starts)
    assert all(a + n <= b for (a, n), (b, _) in zip(ends, ends[1:]))
    assert bases.pieces([n for _, n in starts]) == bases.PIECE > taken
    assert bases.pieces([bases.PIECE, 1, bases.PIECE // 2, bases.PIECE]) == 3 * bases.PIECE
    wan = plan.sizes("wan22", 64, torch.bfloat16)
    assert wan.base < wan.pinned < 1.15 * wan.base


def test_a_streamed_block_has_nearly_always_arrived_when_it_is_called(monkeypatch):
    """Twice up without gradient, up and down with: a copy a call, only the first is waited for."""
    row = weights.TEACHERS["wan21-tiny"]
    net = weights.random_network(row.network, row.settings | {"num_layers": 6}, torch.float32)
    net.checkpointing, waits, copies = True, [], []
    streaming, enter, copy = bases.Blocks(net, CPU), bases.Blocks.enter, bases.Blocks.copy
    adapter = lora.start_adapter(net, "role", (0,), 4)

    def entered(self, i):
        waits.append(i != self.inside and i not in self.arrived)
        enter(self, i)

    monkeypatch.setattr(bases.Blocks, "enter", entered)
    monkeypatch.setattr(bases.Blocks, "copy", lambda self, *a: copies.append(a) or copy(self, *a))
    x, t, c = normal((1, 16, 1, 4, 4), "x"), torch.tensor([0.5]), {"text": normal((1, 4, 64), "c")}
    for _ in range(2):
        with torch.no_grad():
            net(x, t, c), net(x, t, c)
        net(x, t, c, "role").sum().backward()
    assert len(waits) == 2 * 4 * 6 and sum(waits) <= 3 and len(copies) <= len(waits) + 3
    assert adapter and streaming.inside == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_streamed_blocks_compute_what_resident_ones_do(depth):
    """Forward, twice in a row, and backward through every block; any number of blocks."""
    row = weights.TEACHERS["wan21-tiny"]
    made = [
        weights.random_network(row.network, row.settings | {"num_layers": depth}, torch.float32)
        for _ in range(2)
    ]
    streaming = bases.Blocks(made[1], CPU)
    x, t, c = normal((1, 16, 1, 4, 4), "x"), torch.tensor([0.5]), {"text": normal((1, 4, 64), "c")}
    found = []
    for net in made:
        net.checkpointing = True
        adapter = lora.start_adapter(net, "role", (0,), 4)
        for name, p in adapter.items():
            p.data.copy_(normal(p.shape, name) / 4)
        outputs = []
        for _ in range(2):
            with torch.no_grad():
                outputs += [net(x, t, c), net(x, t, c, "role")]
            v = net(x, t, c, "role")
            v.square().mean().backward()
        found.append([*outputs, v, *(p.grad for p in adapter.values())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    held = {p.data_ptr() for p in streaming.parameters[streaming.inside]}
    assert held == {x.data_ptr() for x in streaming.buffers[streaming.buffer]}


def test_streamed_blocks_that_come_in_the_wrong_order_are_noticed(monkeypatch):
    """Negative control of the tests above: the block below in the place of the one asked for."""
    monkeypatch.setattr(
        bases.Blocks, "copy",
        lambda self, i, buffer: [
            x.copy_(host) for x, host in zip(self.buffers[buffer], self.host[max(0, i - 1)])
        ] and buffer,
    )  # fmt: skip
    settings = FAST | dict(micro_batch=4)
    usual, wrong = (losses_of(begun(**settings, offload=o)) for o in ("none", "blocks"))
    assert (usual - wrong).abs().max() > 1e-3 * usual.abs().max()


@pytest.mark.parametrize("teacher", ["wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"])
def test_accumulation_changes_no_number(teacher):
    """One pass of 8 samples, or eight of one: the same draws, conditions, losses."""
    one, eight = (losses_of(begun(teacher, 2, **FAST, micro_batch=n)) for n in (8, 1))
    torch.testing.assert_close(one, eight, rtol=1e-5, atol=0)


def test_buckets_change_no_number():
    """An update in the bucket that was drawn is the update of a run with that size alone."""
    sizes = ("48x64", "64x48")
    mixed, *alone = (losses_of(begun(**FAST, size=s), n=1) for s in (sizes, sizes[:1], sizes[1:]))
    shapes = [[], []]
    run = begun(**FAST, size=sizes)
    for update in range(2):
        _, shape = run.batch(1, 0, 1, 0, update, 0)
        shapes[update] = shape
    first = 0 if shapes[0] == (16, 3, 6, 8) else 1
    torch.testing.assert_close(mixed[0], alone[first][0], rtol=1e-5, atol=0)
    assert (mixed[0] - alone[1 - first][0]).abs() > 1e-3


@pytest.mark.parametrize("name,expected", [
    ("wan22", {(16, 21, 60, 104): 0.4, (16, 21, 104, 60): 0.4,
               (16, 21, 90, 160): 0.1, (16, 21, 160, 90): 0.1}),
    ("wan21", {(16, 1, 90, 160): 1.0}),
    ("wan22-5b", {(48, 21, 44, 80): 1.0}),
])  # fmt: skip
def test_the_buckets_are_the_papers(name, expected):
    """Drawn with its probabilities, the same for all samples of an update."""
    cfg = train.config(name)
    shapes = large.buckets(cfg)
    assert shapes == pytest.approx(expected)
    drawn = [large.bucket(shapes, (i + 0.5) / 1000) for i in range(1000)]
    for shape, share in expected.items():
        assert drawn.count(shape) == pytest.approx(1000 * share, abs=1)
    assert len(large.buckets(train.config("qwen-image"))) == 7
    run = begun(batch=4, micro_batch=1)
    assert len({run.batch(1, 0, 1, 3, 0, first)[1] for first in range(4)}) == 1


def test_frames_may_be_part_of_a_size():
    """A picture now and then among the videos, as the paper trains T2I and T2V."""
    cfg = train.config("wan22", size=("480x832:3", "1x720x1280:1"))
    assert large.buckets(cfg) == {(16, 21, 60, 104): 0.75, (16, 1, 90, 160): 0.25}


@pytest.mark.parametrize("settings", [
    dict(phases=1), dict(phases=4), dict(phases=1, truncate="off"), dict(fake_per_depth=True),
    dict(interval="disjoint", shift=3.0), dict(reuse_rollouts=True), dict(depths="mixed"),
    dict(target="biased"), dict(weight="normalised"), dict(fake_per_depth=True, depths="mixed"),
])  # fmt: skip
def test_every_way_of_figure_1_distils_a_teacher_of_two_experts(settings):
    """All phases to their end, and the same losses where the step is recorded last."""
    found = []
    for record in ("first", "last"):
        run = begun(
            stir=False,
            iters=2,
            batch=2,
            micro_batch=1,
            fake_updates=2,
            eval_samples=3,
            record=record,
            lr=1e-3,
            **settings,
        )
        found.append([])
        for rows in train.train(run):
            found[-1] += [row["loss"] for row in rows]
            train.look(run)  # in passes smaller than what it looks at
        assert run.finished and all(loss is not None for loss in found[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# -- files and commands --------------------------------------------------------------------------


def embeddings(path: Path, teacher="wan22-tiny", dim=64, prompts=("a", "b", "c")) -> Path:
    """A file as models.text makes them."""
    lengths = [2 + i for i in range(len(prompts))]
    tensors = {
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "text": normal((sum(lengths), dim), "text").bfloat16(),
        "negative": normal((3, dim), "negative").bfloat16(),
    }
    about = {"kind": "embeddings", "teacher": teacher, "prompts": list(prompts), "negative": "no"}
    save_file(tensors, path, {"about": json.dumps(about)})
    return path


def frames(path: Path, captions=("a", "b")) -> Path:
    """First frames as models.vae makes them, at 48 x 64 and 9 frames."""
    tensors = {"image.48x64": normal((len(captions), 20, 3, 6, 8), "image").bfloat16()}
    about = {"kind": "images", "captions": {"48x64": list(captions)}}
    save_file(tensors, path, {"about": json.dumps(about)})
    return path


def published(folder: Path, **settings) -> Path:
    """Two experts of a small Wan, in the layout of diffusers."""
    row = weights.TEACHERS["wan22-tiny"]
    for e, name in ((1, "transformer"), (2, "transformer_2")):
        net = weights.random_network(row.network, row.settings | settings, torch.float32, seed=e)
        (folder / name).mkdir(parents=True)
        config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "text_len": 16,
                  "attention_head_dim": net.head_dim}  # fmt: skip
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {net.diffusers_name(n): p.detach() for n, p in net.named_parameters()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    return folder


QUICK = "--iters 1 --batch 2 --fake-updates 1 --eval-samples 2 --sample-every 0 --keep 0".split()


def test_embeddings_and_first_frames_of_files_are_what_a_run_sees(tmp_path):
    """Rows are drawn by sample, an image with the embedding of its caption."""
    prompts, images = embeddings(tmp_path / "p.safetensors"), frames(tmp_path / "i.safetensors")
    cfg = train.config("wan22-i2v-tiny", prompts=str(prompts), images=str(images), size=("48x64",))
    train.validate(cfg)
    batch, file = large.data(cfg, tmp_path), large.open_prompts(cfg, prompts)
    pictures = large.open_images(cfg, images)[0].get_tensor("image.48x64")
    seen = set()
    for first in range(20):
        c, shape = batch(1, 0, 1, 0, 0, first)
        assert shape == (16, 3, 6, 8) and set(c) == {"text", "image"}
        i = next(i for i in (0, 1) if torch.equal(c["image"][0], pictures[i]))
        assert torch.equal(c["text"][0], file.row(i))
        seen.add(i)
    assert seen == {0, 1}


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in TINY[::2]]


@pytest.mark.parametrize("name", ["wan22-tiny", "qwen-image-tiny", *SLOWER])
def test_a_small_teacher_is_distilled_sampled_and_resumed(name, tmp_path, capsys):
    """Both phases; sampling repeats; a run cut short ends as if it had not been."""
    out = tmp_path / "run"
    flags = ["--teacher", name, "--phases", "2", "--fake-updates", "1", "--iters", "3"]
    flags += ["--save-every", "1"]
    assert train.main([*flags, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"diversity", "diversity_teacher_same_steps", "seconds"} <= set(metrics)
    looks = sorted(p.name for p in (out / "looks").iterdir())
    assert "phase1-000002.png" in looks and sum(n.endswith(".safetensors") for n in looks) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    fast = {"tokens_per_second", "share", "share_recomputed", "memory_gb", "x_std"}
    assert fast <= set(rows[1]) and len(rows[0]["loss_by_t"]) == 5
    found = []
    for where in (out, out / "looks" / looks[-1].replace(".png", ".safetensors")):
        assert sample.main(["--student", str(where), "--n", "2"]) == 0
        found.append((out / "samples" / "latents.safetensors").read_bytes())
    assert found[0] == found[1]
    student = (out / "student.safetensors").read_bytes()
    half = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", partial(cut_short, 5, train.train))  # inside phase 2
        assert train.main([*flags, "--out", str(half)]) == 2
    assert not (half / "student.safetensors").exists()
    assert train.main(["--teacher", name, "--resume", "--out", str(half)]) == 0
    assert (half / "student.safetensors").read_bytes() == student


def cut_short(n: int, whole, run):
    """The generator of a run that fails after n iterations."""
    for i, rows in enumerate(whole(run)):
        if i == n:
            raise UserError("enough")
        yield rows


def test_published_weights_are_distilled_and_watched_for_changes(tmp_path, capsys):
    """A folder, embeddings and a LoRA an expert; what has changed since is refused."""
    folder, prompts = published(tmp_path / "weights"), embeddings(tmp_path / "p.safetensors")
    row = weights.TEACHERS["wan22-tiny"]
    files = []
    for name in ("high", "low"):
        net = weights.random_network(row.network, row.settings, torch.float32)
        tensors = {}
        for key, p in lora.start_adapter(net, "x", (name,), 2).items():
            module, part = key.rsplit(".", 1)
            tensors[f"diffusion_model.{module}.lora_{part}.weight"] = p.detach() + 0.01
        files.append(tmp_path / f"{name}.safetensors")
        save_file(tensors, files[-1])
    out = tmp_path / "run"
    flags = [*QUICK, "--teacher", "wan22-tiny", "--weights", folder, "--prompts", prompts,
             "--out", out, "--teacher-lora", *files]  # fmt: skip
    assert train.main([str(flag) for flag in flags]) == 0
    held = json.loads((out / "config.json").read_text())["files"]
    assert len(held) == 5 and str(prompts) in held
    assert sample.main(["--student", str(out), "--n", "2"]) == 0
    embeddings(prompts, prompts=("x", "y", "z", "w"))  # of no matter for sampling
    assert sample.main(["--student", str(out), "--n", "2"]) == 0
    save_file({key: 2 * x for key, x in tensors.items()}, files[-1])
    capsys.readouterr()
    assert sample.main(["--student", str(out)]) == 2 and "has changed" in capsys.readouterr().err


def test_weights_that_are_not_there_are_refused_before_phase_1(tmp_path, capsys):
    """Also the low-noise expert's, which only phase 2 needs."""
    folder, prompts = published(tmp_path / "weights"), embeddings(tmp_path / "p.safetensors")
    (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    flags = [
        "--teacher",
        "wan22-tiny",
        "--weights",
        folder,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "o",
    ]
    capsys.readouterr()
    assert train.main([str(flag) for flag in flags]) == 2
    assert "transformer_2" in capsys.readouterr().err and not (tmp_path / "o").exists()


WRONG = {
    "--guidance 4 3 2": "two: high low",
    "--teacher wan21-tiny --guidance 4 3": "one number",
    "--size 50x64": "nearest that fits is 48x64",
    "--teacher wan22-5b --weights random --size 720x1280": "nearest that fits is 704x1280",
    "--size wide": "HEIGHTxWIDTH",
    "--size 48x64:none": "no probability",
    "--frames 80": "nearest: 81",
    "--teacher qwen-image-tiny --frames 5": "makes pictures",
    "--record first --offload expert": "--record last",
    "--offload blocks --checkpointing off": "--checkpointing on",
    "--images x.safetensors": "takes none",
    "--prompts nowhere.txt": "No such file",
    "--prompts nowhere.safetensors": "holds no embeddings",
    "--prompts empty.txt": "holds no prompt",
    "--prompts latin.txt": "UTF-8",
    "--prompts some.txt": "no text encoder",
    "--prompts of-qwen.safetensors": "another encoder",
    "--prompts wide.safetensors": "has 32 channels",
    "--prompts long.safetensors": "a text of 21 tokens, wan22-tiny takes 16",
    "--teacher wan22-i2v-tiny --images frames.safetensors --prompts p.safetensors --size 64x48":
        "has no 9x64x48",
    "--teacher wan22-i2v-tiny --images p.safetensors --prompts p.safetensors": "no first frames",
    "--teacher wan22-i2v-tiny --images frames.safetensors": "needs --prompts",
    "--teacher wan22-i2v-tiny --size 48x64 --images few.safetensors --prompts p.safetensors":
        "do not fit",
    "--size 100000x100000": "at most 8192",
    "--teacher wan22 --weights random --prompts some.txt": "random weights have no text encoder",
    "--teacher wan22": "hf download",
    "--teacher wan22 --weights nowhere": "does not exist",
    "--weights weights --prompts p.safetensors --teacher-lora p.safetensors": "one an expert",
    "--weights weights --prompts p.safetensors --teacher-lora other.safetensors other.safetensors":
        "has not the shape",
    "--teacher wan21-tiny --weights weights --prompts p.safetensors": "has one transformer",
    "--teacher qwen-image-tiny --weights weights/transformer": "is of a Wan",
    "--teacher-lora x.safetensors": "random ones have none",
    "--toy grid": "belong to --teacher toy2d",
    "--teacher toy2d --offload expert": "for large teachers",
    "--teacher toy2d --generator lora": "for large teachers",
    "--teacher toy2d --prompts x": "for large teachers",
    "--rank 0": "below 1",
    "--micro-batch 0": "at least 1",
    "--adapter none": "invalid choice",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all that the wrong commands name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "latin.txt").write_bytes("é".encode("latin1"))
    (folder / "some.txt").write_text("a cat\n")
    embeddings(folder / "p.safetensors")
    embeddings(folder / "of-qwen.safetensors", "qwen-image")
    embeddings(folder / "wide.safetensors", dim=32)
    embeddings(folder / "long.safetensors", prompts=[str(i) for i in range(20)])
    frames(folder / "frames.safetensors")
    few = {"image.48x64": normal((1, 20, 3, 6, 8), "few")}
    about = json.dumps({"captions": {"48x64": ["a", "b"]}})
    save_file(few, folder / "few.safetensors", {"about": about})
    published(folder / "weights")
    up, down = torch.ones(64, 2), torch.ones(2, 64)
    module = "blocks.0.self_attn.q"
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down},
              folder / "other.safetensors")  # fmt: skip
    return folder


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_answered_in_one_line(line, files, monkeypatch, capsys):
    """Exit status 2, no traceback, nothing written."""
    monkeypatch.chdir(files)
    teacher = [] if "--teacher " in line else ["--teacher", "wan22-tiny"]
    capsys.readouterr()
    assert train.main([*teacher, *line.split()]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and WRONG[line] in said.err and said.out == "", said
    assert not (files / "out").exists()


def test_captions_without_embeddings_are_refused(tmp_path):
    cfg = train.config(
        "wan22-i2v-tiny", size=("48x64",), prompts=str(embeddings(tmp_path / "p.safetensors")),
        images=str(frames(tmp_path / "i.safetensors", ("a", "z"))),
    )  # fmt: skip
    with pytest.raises(UserError, match="has not the caption 'z'"):
        train.validate(cfg)


def test_what_is_not_finite_in_a_teacher_stops_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    """After --max-skips updates in a row, looks between; the line names phase, role and loss."""
    kept = large.load

    def broken(*a):
        net = kept(*a)
        blocks_of(net)[0].ffn[0].weight.data[0] = float("nan")
        return net

    monkeypatch.setattr(large, "load", broken)
    flags = ["--teacher", "wan22-tiny", "--iters", "20", "--out", str(tmp_path / "o")]
    capsys.readouterr()
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "phase 1" in error and "of fake1 is not finite" in error


def test_the_rates_go_with_the_kind_of_role():
    """LoRA 5e-5; a full fake 4e-7, the paper's; a full generator 2e-6; and what was given stays."""
    assert (train.config("wan22").lr, train.config("wan22").fake_lr) == (5e-5, 5e-5)
    mix = train.config("wan22", fake="full")
    assert (mix.generator, mix.lr, mix.fake_lr) == ("lora", 5e-5, 4e-7)
    assert train.config("wan22", generator="full", fake="full", lr=1e-6).lr == 1e-6
    assert train.config("wan22", generator="full").lr == 2e-6
    assert train.config().lr == 1e-3


def test_times_of_the_presets_are_the_papers():
    """Wan: 1000 937.5 833.3 625; Qwen-Image: 1000 900 750 500."""
    for name, expected in (
        ("wan22", [1000, 937.5, 833.33, 625]),
        ("qwen-image", [1000, 900, 750, 500]),
    ):
        cfg = train.config(name)
        times = ph.step_times(cfg.steps, cfg.shift)
        assert [1000 * t for t in times[:-1]] == pytest.approx(
            expected, abs=0.01
        ) and cfg.phases == 2
    assert shift(0.5, 5.0) == pytest.approx(0.8333, abs=1e-4)
