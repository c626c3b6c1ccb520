"""toy/minimal.py is the loop of train.py: the same random numbers give the same parameters."""

import train
from toy import minimal, toy2d


def test_the_file_that_shows_it_all_trains_as_train_py_does(new_run, start):
    """The rate is 1e-3. Controls: another weight, another target, truncated rollouts."""

    def largest_difference(**settings):
        """Largest difference of parameters, after few iterations of both phases."""
        run = new_run(iters=4, warmup=3, **settings)
        for _ in train.train(run):
            pass
        network, experts = toy2d.make_network(run.cfg), []
        network.load_state_dict(start(run.cfg))
        for phase in minimal.phases:
            minimal.train_phase(phase, experts, network, iters=4, warmup=3)
        theirs = [p for role in run.roles.student.values() for p in role.parameters.values()]
        ours = [p for expert in experts for p in expert.parameters()]
        return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))

    assert largest_difference() < 2e-5
    for wrong in (
        dict(kl_weight="none"),
        dict(target="biased"),
        dict(fake_rollout="truncated"),
    ):
        assert largest_difference(**wrong) > 1e-3


def test_the_start_network_is_that_of_the_preset():
    net, tensors = minimal.fit_start(20), toy2d.fit_start(train.make_config(), steps=20)
    assert all((p - tensors[name]).abs().max() < 1e-4 for name, p in net.state_dict().items())
