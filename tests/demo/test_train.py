"""Two runs of one configuration are equal bit for bit, also when one goes on from the other's state."""

from __future__ import annotations

import io

import torch

from stager.demo import DemoSettings
from stager.demo.compare import state_differences
from stager.demo.train import TrainingRun, lr_factor


def final_state(run: TrainingRun) -> dict[str, object]:
    return {name: value.state_dict() for name, value in run.state.items()}


def test_two_runs_give_the_same_losses_and_state(settings: DemoSettings) -> None:
    losses, states = [], []
    for _ in range(2):
        run = TrainingRun(settings)
        losses.append([run.train_step().hex() for _ in range(6)])
        states.append(final_state(run))
    assert losses[0] == losses[1]
    assert list(state_differences(states[0], states[1])) == []
    assert len(set(losses[0])) == 6


def test_a_run_goes_on_from_another_runs_state_as_if_nothing_had_happened(settings: DemoSettings) -> None:
    run = TrainingRun(settings)
    for _ in range(5):
        run.train_step()
    stored = io.BytesIO()
    torch.save(final_state(run), stored)
    expected = [run.train_step().hex() for _ in range(6)]

    stored.seek(0)
    resumed = TrainingRun(settings.model_copy(update={"seed": 4321}))
    for name, state in torch.load(stored, weights_only=True).items():
        resumed.state[name].load_state_dict(state)
    assert [resumed.train_step().hex() for _ in range(6)] == expected
    assert list(state_differences(final_state(run), final_state(resumed))) == []


def test_each_part_of_the_state_matters(settings: DemoSettings) -> None:
    """Were one left out of the checkpoint, the demo would see it."""
    run = TrainingRun(settings)
    for _ in range(5):
        run.train_step()
    stored = io.BytesIO()
    torch.save(final_state(run), stored)
    expected = [run.train_step().hex() for _ in range(6)]
    for left_out in run.state:
        resumed = TrainingRun(settings)
        resumed.train_step()
        stored.seek(0)
        for name, state in torch.load(stored, weights_only=True).items():
            if name != left_out:
                resumed.state[name].load_state_dict(state)
        assert [resumed.train_step().hex() for _ in range(6)] != expected, left_out


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [lr_factor(step, 3, 24) for step in range(30)]
    assert rates[0] < rates[1] < rates[2] < rates[3] == 1.0
    assert rates[3:25] == sorted(rates[3:25], reverse=True)
    assert abs(rates[24] - 0.1) < 1e-12
    assert rates[25] == rates[24]
