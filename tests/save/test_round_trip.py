"""What goes in comes out: values, types, aliasing; with stager and with stock torch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer, StateMismatchError, UnsafePickleError, UnstageableError
from tests.states import bits, everything, random_tensor, same


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch, unpickling a quantized tensor
def test_every_kind_of_value_comes_back_bit_for_bit(run_dir: Path) -> None:
    state = everything()
    with Checkpointer(run_dir) as ckpt:
        info = ckpt.save(3, state).upload_completion.result()
        loaded = ckpt.load()
    assert loaded is not None and loaded.step == 3 and loaded.info == info
    assert same(loaded.state, state)
    assert list(loaded.state["ordered"]) == ["z", "a"]
    assert loaded.state["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert loaded.state["tied"]["a"] is loaded.state["tied"]["b"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what stock torch says without a process group
def test_stock_dcp_load_reads_the_same_state(run_dir: Path) -> None:
    state = everything()
    target = everything(seed=1)
    with Checkpointer(run_dir) as ckpt:
        path = ckpt.save(0, state).upload_completion.result().path
    # dcp.load cannot copy into the first five; it returns an int key as a string, in a mapping of its own
    for unsupported in ("neg", "conj", "expanded", "sparse", "quantized", "ints"):
        del target[unsupported]
    dcp.load(target, checkpoint_id=path, no_dist=True)
    for name in target:
        if name not in ("strided", "column", "row", "transposed", "overlapping"):
            assert same(target[name], state[name]), name
    # Views of one base were loaded over each other in dict order: the base's last writer wins in the source as well.
    assert bits(target["transposed"]) == bits(state["transposed"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_to_torch_save_converts(run_dir: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = torch.nn.Linear(4, 3)
    with Checkpointer(run_dir) as ckpt:
        path = ckpt.save(0, {"model": model, "epoch": 3}).upload_completion.result().path
    dcp_to_torch_save(path, tmp_path / "out.pt")
    converted = torch.load(tmp_path / "out.pt", weights_only=True)
    assert converted["epoch"] == 3
    assert same(dict(converted["model"]), dict(model.state_dict()))


def test_tied_weights_and_overlapping_views_are_stored_once(run_dir: Path) -> None:
    weight = torch.randn(256, 256)
    with Checkpointer(run_dir) as ckpt:
        handle = ckpt.save(0, {"a": weight, "b": weight, "c": weight.detach()})
        info = handle.upload_completion.result()
    assert info.num_tensors == 1
    assert info.nbytes < 1.1 * weight.nbytes


def test_later_changes_do_not_reach_the_checkpoint(run_dir: Path) -> None:
    tensor, nested = torch.zeros(1000), {"steps": [1, 2]}
    with Checkpointer(run_dir) as ckpt:
        handle = ckpt.save(0, {"tensor": tensor, "nested": nested})
        tensor.fill_(7)
        nested["steps"].append(3)
        handle.upload_completion.result()
        loaded = ckpt.load()
    assert loaded is not None
    assert same(loaded.state, {"tensor": torch.zeros(1000), "nested": {"steps": [1, 2]}})


def test_model_and_optimizer_restore_in_place_and_keep_identity(run_dir: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
        model[2].weight = model[0].weight  # tied
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer)
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer, "scheduler": scheduler}).upload_completion.result()
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        state_ids = [id(v["exp_avg"]) for v in optimizer.state.values()]
        for _ in range(3):
            train(model, optimizer)
        addresses = [p.data_ptr() for p in model.parameters()]
        ckpt.load(into={"model": model, "optimizer": optimizer, "scheduler": scheduler})
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert [id(v["exp_avg"]) for v in optimizer.state.values()] == state_ids
        assert same(dict(model.state_dict()), saved)

        fresh_model, fresh_optimizer = make()
        ckpt.load(into={"model": fresh_model, "optimizer": fresh_optimizer})
    assert same(fresh_model.state_dict(), model.state_dict())
    assert same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert fresh_model[2].weight is fresh_model[0].weight


def test_shape_mismatch_is_named_and_nothing_is_changed(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"a": torch.ones(3), "b": torch.ones(4)}).upload_completion.result()
        into = {"a": torch.zeros(3), "b": torch.zeros(5)}
        with pytest.raises(StateMismatchError, match=r"b: has shape \[5\] in the target and \[4\] in the checkpoint"):
            ckpt.load(into=into)
    assert same(into, {"a": torch.zeros(3), "b": torch.zeros(5)})


class Opaque:
    """A class that torch.load's weights_only rules do not know."""

    def __init__(self, value: int) -> None:
        self.value = value


def make_state() -> dict[str, int]:
    return {}


def test_function_whose_call_was_forgotten_is_told_and_saved(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"f": make_state, "model": model.state_dict}).upload_completion.result()
        loaded = ckpt.load(allow_pickle=True)
    assert "model is the method state_dict of a Linear, not what it returns; if that is meant, call it" in caplog.text
    assert "f is the function make_state, not what it returns" in caplog.text
    assert loaded is not None and same(loaded.state["model"](), model.state_dict()) and loaded.state["f"] is make_state


def test_pickled_object_needs_permission_at_load(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"thing": Opaque(5), "x": torch.ones(2)}).upload_completion.result()
        assert "To load it, you will need load(allow_pickle=True), or the setting" in caplog.text
        with pytest.raises(UnsafePickleError, match="thing"):
            ckpt.load()
        loaded = ckpt.load(allow_pickle=True)
    assert loaded is not None and loaded.state["thing"].value == 5


def test_pickled_object_is_not_warned_of_where_the_configuration_permits_it(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(run_dir, {"loading": {"allow_pickle": True}}) as ckpt:
        ckpt.save(0, {"thing": Opaque(5), "forgotten": make_state}).upload_completion.result()
        loaded = ckpt.load()
    assert "thing" not in caplog.text and "forgotten is the function make_state" in caplog.text
    assert loaded is not None and loaded.state["thing"].value == 5


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, open]}, "f": {"g": (i for i in ())}}, r"^f\['g'\]: a generator cannot be pickled"),
        ({"f": {"g": lambda: 1}}, r"^f\['g'\]: a function cannot be pickled"),
    ],
)
def test_what_cannot_be_saved_is_named(run_dir: Path, state: dict[str, Any], message: str) -> None:
    with Checkpointer(run_dir) as ckpt:
        with pytest.raises(UnstageableError, match=message):
            ckpt.save(0, state)
        assert ckpt.save(1, {"fine": torch.ones(1)}).upload_completion.result().step == 1


def test_changed_structure_is_seen_on_every_save(run_dir: Path) -> None:
    """Swap, resize, retie, add and drop between saves: never a stale plan."""
    rng = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Any] = {f"t{i}": torch.randn(rng.randrange(1, 50), generator=generator) for i in range(6)}
    with Checkpointer(run_dir) as ckpt:
        for step in range(25):
            names = list(state)
            first, second = rng.sample(names, 2)
            change = step % 6
            if change == 0:
                state[first], state[second] = state[second], state[first]
            elif change == 1:
                state[first] = torch.randn(rng.randrange(1, 50), generator=generator)
            elif change == 2:
                state[first] = state[second]
            elif change == 3:
                state[f"new{step}"] = random_tensor(torch.int16, (2, 3), generator)
            elif change == 4:
                del state[first]
            else:
                state[first] = state[second][: max(1, len(state[second]) // 2)]
            expected = {name: tensor.clone() for name, tensor in state.items()}
            handle = ckpt.save(step, state)
            handle.upload_completion.result()
            loaded = ckpt.load(step)
            assert loaded is not None and same(loaded.state, expected), step
