"""Names that differ: what is said of them, prefixes that wrappers make, rename= and strip_prefix=."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stager import Checkpointer, Loaded, StateMismatchError, UsageError, load_checkpoint
from tests.persistence.tasks import save
from tests.states import same

PREFIXES = ["module.", "_orig_mod.", "_forward_module.", "base_model.model.", "module._orig_mod."]


class Wrapped(nn.Module):
    """A module within modules whose names are a prefix."""

    def __init__(self, inner: nn.Module, prefix: str) -> None:
        super().__init__()
        first, _, rest = prefix.rstrip(".").partition(".")
        self.add_module(first, Wrapped(inner, rest) if rest else inner)


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(5)])


def load(run_dir: Path, into: Any, **options: Any) -> Loaded:
    with Checkpointer(run_dir, read_only=True) as ckpt:
        loaded = ckpt.load(into=into, **options)
    assert loaded is not None
    return loaded


def lines_of(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines()[1:]]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_the_checkpoint_is_one_line(run_dir: Path, prefix: str, strict: bool) -> None:
    save(run_dir, {"model": Wrapped(model(), prefix), "epoch": 1})
    target = model(1)
    before = target[0][0].weight.clone()
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": target, "epoch": 0}, strict=strict)
    assert lines_of(raised.value) == [
        f"the checkpoint's keys of model begin with {prefix!r}, because a wrapped model was saved (in future, save "
        f"model.{prefix.rstrip('.')}); pass strip_prefix={prefix!r}"
    ]
    assert torch.equal(target[0][0].weight, before)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_the_target_is_one_line(run_dir: Path, prefix: str) -> None:
    save(run_dir, {"model": model()})
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": Wrapped(model(1), prefix)})
    assert (
        f"the target's keys of model begin with {prefix!r}, because its model is wrapped; load into "
        f"model.{prefix.rstrip('.')}, or pass strip_prefix={prefix!r}" in lines_of(raised.value)
    )


@pytest.mark.parametrize("form", ["module", "state dict", "parameters"])
@pytest.mark.parametrize("is_there", [True, False], ids=["checkpoint", "target"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_strip_prefix(run_dir: Path, tmp_path: Path, prefix: str, is_there: bool, form: str) -> None:
    source, target = model(), model(1)
    saved = Wrapped(source, prefix) if is_there else source
    here: Any = target if is_there else Wrapped(target, prefix)
    if form == "state dict":
        here = here.state_dict()
    elif form == "parameters":
        here = dict(here.state_dict().items())  # without what marks a module's state
    torch.save({"nets": [1], "model": saved.state_dict()}, tmp_path / "a.pt")
    save(run_dir, {"nets": [1], "model": saved})
    loaded = load(run_dir, {"model": here}, strip_prefix=prefix)
    assert same(dict(target.state_dict()), dict(source.state_dict()))
    assert loaded.missing == () and loaded.unexpected == ("nets",)
    with torch.no_grad():
        target[0][0].weight.zero_()
    load_checkpoint(tmp_path / "a.pt", {"model": here}, strip_prefix=prefix)
    assert same(dict(target.state_dict()), dict(source.state_dict()))


def test_a_wrapper_within_the_module(run_dir: Path) -> None:
    source, target = model(), model(1)
    source[2] = Wrapped(source[2], "_orig_mod.")  # as torch.compile of one layer does
    save(run_dir, {"model": source})
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": target})
    (line,) = lines_of(raised.value)[:-1]
    assert line == (
        "the checkpoint's keys of model have '_orig_mod.' within them; "
        "pass rename=lambda name: name.replace('._orig_mod.', '.')"
    )
    load(run_dir, {"model": target}, rename=lambda name: name.replace("._orig_mod.", "."))
    assert torch.equal(target[2][0].weight, source[2]._orig_mod[0].weight)


def test_what_differs_beside_a_prefix_is_listed(run_dir: Path) -> None:
    save(run_dir, {"model": Wrapped(model(), "module.")})
    larger = nn.Sequential(*model(1), nn.Linear(2, 2))
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": larger})
    assert lines_of(raised.value)[1:] == [
        "model['5.weight']: is in the target but not in the checkpoint",
        "model['5.bias']: is in the target but not in the checkpoint",
    ]


def test_a_module_with_a_prefix_keeps_the_versions_of_its_parts(run_dir: Path) -> None:
    """Without them, BatchNorm would invent num_batches_tracked."""
    save(run_dir, {"model": Wrapped(model(), "module.")})
    seen: list[Any] = []
    target = model(1)
    target[0][1]._register_load_state_dict_pre_hook(lambda state, prefix, metadata, *_: seen.append(metadata))
    load(run_dir, {"model": target}, strip_prefix="module.")
    assert seen[0]["version"] == 2
    state = load_state(run_dir, strip_prefix="module.")
    assert state["model"]._metadata["0.1"] == {"version": 2} and "0.1.running_mean" in state["model"]


def load_state(run_dir: Path, **options: Any) -> Any:
    with Checkpointer(run_dir, read_only=True) as ckpt:
        loaded = ckpt.load(**options)
    assert loaded is not None
    return loaded.state


# -- rename ---------------------------------------------------------------------------------------------------------

NESTED = {
    "model": {"enc.l1.w": torch.ones(1), "enc.l1.b": torch.ones(2), "head.w": torch.ones(3)},
    "nested": {"a": {"b": 1, 7: "x"}, "list": [{"a": 1}]},
    "empty": {"inner": {}},
}
RENAMED: list[tuple[Any, Any]] = [
    ({"model.enc": "model.body"}, ("model", {"body.l1.w", "body.l1.b", "head.w"})),
    ({"model.enc.l1.w": "model.first"}, ("model", {"first", "enc.l1.b", "head.w"})),
    ({"model": "net"}, ("net", {"enc.l1.w", "enc.l1.b", "head.w"})),
    ({"model.enc": "model", "model.enc.l1.b": "model.c"}, ("model", {"l1.w", "c", "head.w"})),
    (lambda name: name.replace("enc.l1", "body.layers.0"), ("model", {"body.layers.0.w", "body.layers.0.b", "head.w"})),
    ({"nested.a": "nested.c"}, ("nested", {"c", "list"})),
    ({"nested.list": "nested.other"}, ("nested", {"a", "other"})),
    ({"empty.inner": "empty.outer"}, ("empty", {"outer"})),
]


def saved_by(origin: str, run_dir: Path, state: dict[str, Any]) -> Path:
    """Save a state as ``origin`` does; return the path of the checkpoint."""
    if origin == "stager":
        return Path(save(run_dir, state).path)
    run_dir.mkdir()
    torch.save(state, run_dir / "a.pt")
    return run_dir / "a.pt"


@pytest.mark.parametrize("rename, expected", RENAMED)
@pytest.mark.parametrize("origin", ["stager", "torch.save"])
def test_rename(run_dir: Path, rename: Any, expected: Any, origin: str) -> None:
    state = load_checkpoint(saved_by(origin, run_dir, NESTED), rename=rename).state
    name, keys = expected
    assert set(state[name]) == keys
    if name == "nested":
        assert state[name].get("c", {"b": 1, 7: "x"}) == {"b": 1, 7: "x"}
    others = NESTED.keys() - {"model", "nested", "empty"} | (NESTED.keys() - {name})
    assert all(same(state[other], NESTED[other]) for other in others - {"model" if name == "net" else name})


def test_rename_into_a_module_and_what_is_beside_it(run_dir: Path) -> None:
    source, target = model(), nn.ModuleDict({"body": model(1)})
    optimizer = torch.optim.AdamW(source.parameters())
    source(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    save(run_dir, {"net": source, "opt": optimizer, "epoch": 3})
    other = torch.optim.AdamW(target.parameters())
    into = {"model": target, "opt": other, "epoch": 0}
    loaded = load(run_dir, into, rename=lambda name: f"model.body.{name[4:]}" if name.startswith("net.") else name)
    assert same(dict(target["body"].state_dict()), dict(source.state_dict())) and into["epoch"] == 3
    assert same(other.state_dict(), optimizer.state_dict()) and loaded.missing == loaded.unexpected == ()


MOVED_FROM = {
    "x": torch.ones(2),
    "m": {"y": torch.zeros(2)},
    "n": {0: 5, 1: 6, "z": 7},
    "model": {"enc.w": torch.ones(3)},
}
MOVED = [
    ({"x": "m.x"}, {"m": {"y", "x"}}),
    ({"x": "new.x"}, {"new": {"x"}, "m": {"y"}}),
    ({"x": "new.inner"}, {"new": {"inner"}}),
    ({"m.y": "y"}, {"y": 2}),
    ({"n.0": "n.7"}, {"n": {7, 1, "z"}}),
    ({"n": "k.n"}, {"k": {"n"}}),
    ({"n": "k"}, {"k": {0, 1, "z"}}),
    ({"n.z": "n.2"}, {"n": {0, 1, "2"}}),
    ({"model.enc": "model.body.enc"}, {"model": {"body.enc.w"}}),
    ({"x": "model.x"}, {"model": {"enc.w", "x"}}),
]


@pytest.mark.parametrize("rename, expected", MOVED)
@pytest.mark.parametrize("origin", ["stager", "torch.save"])
def test_rename_to_another_depth_and_of_integers(run_dir: Path, rename: Any, expected: Any, origin: str) -> None:
    state = load_checkpoint(saved_by(origin, run_dir, MOVED_FROM), rename=rename).state
    for name, keys in expected.items():
        if isinstance(keys, set):
            assert set(state[name]) == keys and {*map(type, state[name])} == {*map(type, keys)}
        else:
            assert len(state[name]) == keys


def test_rename_gives_the_keys_of_the_target(run_dir: Path) -> None:
    """What the target has decides which keys a name consists of, and of which types they are."""
    save(run_dir, MOVED_FROM)
    x = torch.zeros(2)
    into: dict[str, Any] = {"m": {"x": x, "y": torch.ones(2)}, "n": {0: 0, 9: 0, 1: 0}}
    loaded = load(run_dir, into, rename={"x": "m.x", "n.z": "n.9"})
    assert into["m"]["x"] is x and x.tolist() == [1, 1] and into["n"] == {0: 5, 1: 6, 9: 7}
    assert loaded.missing == () and loaded.unexpected == ("model",)
    module = nn.Module()
    module.inner = nn.ParameterDict({"w": torch.zeros(2)})
    load(run_dir, {"net": module}, rename={"x": "net.inner.w"})
    assert module.inner["w"].tolist() == [1, 1]


def test_keys_have_the_new_names(run_dir: Path) -> None:
    save(run_dir, NESTED)
    assert set(load_state(run_dir, rename={"model.enc": "model.body"}, keys="model.body")["model"]) == {
        "body.l1.w",
        "body.l1.b",
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rename": {"model.enc.l1.w": "model.enc.l1.b"}}, "gives model.enc.l1.b and model.enc.l1.w the same name"),
        ({"rename": {"model.enc.l1.w": "nested.a"}}, r"nested\.a"),
        ({"rename": lambda name: None}, "rename= made None of"),
        ({"rename": {"model.encc": "model.x"}}, "rename= has 'model.encc', which is no name of the checkpoint"),
        ({"rename": {"nested.list.0": "nested.x"}}, "rename= has 'nested.list.0', which is no name"),
        ({"rename": 3}, "rename= is a int; give a mapping"),
        ({"strip_prefix": ["module."]}, "strip_prefix= is a list; give a text"),
    ],
)
def test_a_renaming_that_cannot_be(run_dir: Path, options: Any, message: str) -> None:
    save(run_dir, NESTED)
    with pytest.raises((StateMismatchError, UsageError), match=message):
        load_state(run_dir, **options)


# -- what fits, and what does not -----------------------------------------------------------------------------------


def test_nothing_of_a_name_fits(run_dir: Path) -> None:
    save(run_dir, {"m": nn.Linear(1, 1), "d": {"w": torch.ones(1)}, "log": {"a": 1}})
    for into in (
        {"m": nn.GRU(1, 1)},
        {"d": {"v": torch.zeros(1)}},
        {"Model": nn.Linear(1, 1)},
    ):
        with pytest.raises(StateMismatchError, match=r"nothing (of it )?fits"):
            load(run_dir, into, strict=False)
    into = {"log": {"b": 2}}
    load(run_dir, into)
    assert into == {"log": {"a": 1}}


def test_names_of_what_was_not_restored(run_dir: Path) -> None:
    save(run_dir, {"m": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "n": 1, "other": {"a": 2}})
    target = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1))
    loaded = load(run_dir, {"m": target, "absent": 5, "n": 0}, strict=False)
    assert sorted(loaded.missing) == ["absent", "m.2.bias", "m.2.weight"]
    assert sorted(loaded.unexpected) == ["m.1.bias", "m.1.weight", "other"]
    assert load(run_dir, {"n": 0}).unexpected == ("m", "other")


# -- an object itself -----------------------------------------------------------------------------------------------


class Scheduler:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["last_epoch"]


def test_an_object_itself_takes_what_fits_it(run_dir: Path, tmp_path: Path) -> None:
    source = model()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.5, momentum=0.9)
    state = {"net": source, "opt": optimizer, "sched": Scheduler(7), "ema": nn.Linear(3, 3), "epoch": 4}
    save(run_dir, state)
    torch.save({name: value.state_dict() for name, value in state.items() if name != "epoch"}, tmp_path / "a.pt")
    for path in (run_dir / "step-00000001", tmp_path / "a.pt"):
        target = model(1)
        other, scheduler = torch.optim.SGD(target.parameters(), lr=0.1), Scheduler(0)
        loaded = load_checkpoint(path, target)
        assert loaded.state is target and same(dict(target.state_dict()), dict(source.state_dict()))
        load_checkpoint(path, other)
        load_checkpoint(path, scheduler)
        assert other.param_groups[0]["lr"] == 0.5 and scheduler.epoch == 7


def test_the_whole_state_is_what_fits(run_dir: Path) -> None:
    source, target = model(), model(1)
    save(run_dir, source.state_dict())
    assert load(run_dir, target).state is target
    assert same(dict(target.state_dict()), dict(source.state_dict()))


def test_an_object_that_nothing_or_too_much_fits(run_dir: Path) -> None:
    save(run_dir, {"net": model(), "ema": model(1), "epoch": 4})
    with pytest.raises(StateMismatchError, match=r"net and ema both fit the Sequential .* into=\{'net': \.\.\.\}"):
        load(run_dir, model(2))
    target = model(2)
    load(run_dir, target, keys="ema")
    assert torch.equal(target[0][0].weight, model(1)[0][0].weight)
    with pytest.raises(StateMismatchError, match=r"nothing in it fits the Linear .* It has net \(a mapping\)"):
        load(run_dir, nn.Linear(2, 2))


def test_an_object_itself_that_differs_by_a_prefix_or_in_part(run_dir: Path) -> None:
    source = model()
    save(run_dir, {"net": source, "epoch": 4})
    wrapped = Wrapped(model(1), "module.")
    with pytest.raises(StateMismatchError, match=r"keys of net begin with 'module\.', .*; load into net\.module"):
        load(run_dir, wrapped)
    load(run_dir, wrapped, strip_prefix="module.")
    assert same(dict(wrapped.module.state_dict()), dict(source.state_dict()))
    larger = nn.Sequential(*model(1), nn.Linear(2, 2))
    with pytest.raises(StateMismatchError, match="nothing in it fits the Sequential"):
        load(run_dir, larger)
    assert load(run_dir, larger, strict=False).missing == ("net.5.weight", "net.5.bias")
    assert torch.equal(larger[0][0].weight, source[0][0].weight)


@pytest.mark.parametrize(
    "wrong", [[model()], (1, 2), nn.Linear, 5, "model", torch.ones(2)], ids=lambda v: type(v).__name__
)
def test_a_target_of_no_kind_that_can_be_restored(run_dir: Path, wrong: Any) -> None:
    save(run_dir, {"n": 1})
    with pytest.raises(
        UsageError, match=r"into must be a mapping or an object with load_state_dict\(\), got .*as in load\("
    ):
        load(run_dir, wrong)


def test_a_prefix_of_some_names_only_is_not_told_if_the_shapes_differ(run_dir: Path) -> None:
    save(run_dir, {"model": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    for target in (nn.Linear(5, 5), dict(nn.Linear(5, 5).named_parameters())):
        with pytest.raises(StateMismatchError) as raised:
            load(run_dir, {"model": target})
        assert lines_of(raised.value) == [
            "model: nothing fits: the target has the keys weight, bias; the checkpoint has the keys 0.weight, 0.bias, "
            "1.weight, 1.bias. Is this the object that was saved as model?"
        ]


def test_another_name_at_the_top_is_told_with_the_nearest(run_dir: Path) -> None:
    save(run_dir, {"model": model(), "optimizer": {"lr": 0.1}, "epoch": 3})
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": model(), "optim": {"lr": 0.0}, "x": 1})
    assert lines_of(raised.value)[:2] == [
        "optim: is in the target but not in the checkpoint, which also has optimizer, epoch; did you mean optimizer?",
        "x: is in the target but not in the checkpoint, which also has optimizer, epoch",
    ]


def test_a_prefix_of_some_names_only_is_told_as_such_and_the_advice_works(run_dir: Path) -> None:
    save(run_dir, {"model": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    target = nn.Linear(3, 3)
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, {"model": target})
    assert lines_of(raised.value)[0] == (
        "the target's keys of model that do not fit (bias, weight) are in the checkpoint with '0.' before them; if these "
        "are meant, pass strip_prefix='0.' and strict=False, which leaves out the other keys"
    )
    loaded = load(run_dir, {"model": target}, strip_prefix="0.", strict=False)
    assert (loaded.missing, loaded.unexpected) == ((), ("model.1.weight", "model.1.bias"))
    assert torch.equal(target.weight, load_state(run_dir)["model"]["0.weight"])
