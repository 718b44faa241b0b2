"""torchft: a replica that recovers gets the state whole, or an error; the sender goes on. docs/integrations/torchft.md."""

from __future__ import annotations

import gc
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stager import (
    ArgumentError,
    ClosedError,
    MemoryBudgetError,
    ReplicationError,
    StateMismatchError,
    UnsafePickleError,
    UnstageableError,
)
from tests import fork_server
from tests.faults import Faults
from tests.integrations.training import Training, final, page_script, resumes_bit_equal
from tests.staging.child import environment
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # torchft warns of its own code

pytest.importorskip("torchft", reason="pip install 'stager[torchft]'")

from stager.integrations import torchft as module
from stager.integrations.torchft import StagerTransport
from stager.integrations.torchft_parts.connection import Connection
from tests.integrations.torchft_bodies import SHORT, Pair, in_thread, large, nested, pair_of, until

SECRET = "a secret of this test"
BODIES = "tests.integrations.torchft_bodies"


@pytest.fixture
def pair() -> Iterator[Pair]:
    with pair_of() as made:
        yield made


def in_child(name: str, directory: Path) -> None:
    """Run a function of ``torchft_bodies.py``."""
    server, output = fork_server.shared(), directory / "output"
    pid = server.start(f"{BODIES}:{name}", stdout=output, stderr=output, environment=environment(), modules=[BODIES])
    assert server.wait(pid, 120) == 0, output.read_text()


# -- what torchft expects of a transport ------------------------------------------------------------------------------


def test_several_receive_one_snapshot_whoever_comes_first(pair: Pair) -> None:
    early = in_thread(pair.receive)
    state = large()
    pair.send(state, num_receivers=2)
    assert same(early.result(), state)
    assert same(pair.receive(), state)
    pair.until_idle()
    until(lambda: pair.num_leased() == 0)


def test_the_state_may_be_changed_once_it_is_staged(pair: Pair) -> None:
    weights = torch.arange(4.0)
    pair.send(nested({"weights": weights}))
    weights.zero_()
    assert pair.receive()["user"]["default"]["weights"].tolist() == [0, 1, 2, 3]


def test_memory_is_used_again(pair: Pair) -> None:
    for step in range(4):
        assert same(pair.moved(large(step), step), large(step))
        pair.until_idle()
    pool: Any = pair.sender._stager.memory
    assert len(pool) == 1


def test_a_snapshot_stays_until_its_receivers_must_have_given_up(pair: Pair) -> None:
    pair.send(large())
    pair.sender.disallow_checkpoint()  # before anybody has come
    assert same(pair.receive(), large())
    pair.sender.send_checkpoint([1], 2, large(), timedelta(0))
    pair.sender.disallow_checkpoint()
    assert pair.num_leased() == 0
    with pytest.raises(ReplicationError, match="timed out"):
        pair.receive(step=2, timeout=SHORT)


def test_a_step_that_is_tried_again_is_staged_again(pair: Pair) -> None:
    pair.send(nested({"x": torch.zeros(1)}))
    pair.sender.disallow_checkpoint()
    pair.send(nested({"x": torch.ones(1)}))
    assert pair.receive()["user"]["default"]["x"].item() == 1


def test_a_step_that_is_not_offered_is_an_error(pair: Pair) -> None:
    with pytest.raises(ReplicationError, match="timed out"):
        pair.receive(step=1, timeout=SHORT)
    pair.send(nested({}), step=5)
    with pytest.raises(ReplicationError, match="step 3 is past, and step 5 is offered now"):
        pair.receive(step=3)


def test_what_cannot_be_staged_fails_the_sender_and_the_receiver_is_told(pair: Pair) -> None:
    for value in (threading.Lock(), lambda: 1):
        with pytest.raises(UnstageableError):
            pair.send(nested({"bad": value}))
        with pytest.raises(ReplicationError, match="snapshot of step 1 could not be taken: UnstageableError"):
            pair.receive()


def test_a_state_for_which_there_is_no_memory_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match="needs 33,554,432 more bytes of memory, and this host has 1,000"):
        pair.send(large())
    pair.send(nested({"x": torch.zeros(8)}))


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_every_kind_of_plain_value_arrives_as_it_was(pair: Pair) -> None:
    tied, wide = torch.randn(6), torch.randn(4, 6)
    user = {
        "dtypes": [
            torch.arange(3).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool)
        ],
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "views": (wide.t(), wide[1:, ::2], torch.ones(1).expand(3), torch.empty(0, 3), torch.tensor(2.5)),
        "tied": [tied, tied],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "sparse": torch.eye(3).to_sparse(),
        "ordered": OrderedDict(b=1, a=torch.ones(2)),
        "numpy": np.float32(1.5),
        "values": [None, True, 1, 2.5, 1j, "text", b"bytes", {1, 2}, (0.9, 0.999), torch.float16, torch.Size([2, 3])],
        "odd keys": {0: "a", (1, 2): "b", None: "c"},
    }
    arrays = {"array": np.arange(5.0), "random": np.random.RandomState(3).get_state()[1]}
    received = pair.moved({**nested(user), "arrays": arrays})
    for name, array in received.pop("arrays").items():
        np.testing.assert_array_equal(array, arrays[name])
    assert same(received, nested(user))
    again = received["user"]["default"]
    assert again["tied"][0] is again["tied"][1] and again["views"][0].stride() == (1, 6)


def test_what_a_module_says_of_its_version_arrives(pair: Pair) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    received: Any = pair.moved(nested(module.state_dict()))["user"]["default"]
    assert received._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(received)


class Settings:
    """A class of the user's."""

    def __init__(self) -> None:
        self.weights = torch.arange(3.0)


def test_an_object_that_could_run_code_is_refused_unless_its_class_is_allowed(pair: Pair) -> None:
    state = nested({"settings": Settings()})
    with pytest.raises(UnsafePickleError, match=r"Settings is not allowed\). .* allow_pickle=True") as refused:
        pair.moved(state)
    name = f"{Settings.__module__}.Settings"
    assert name in str(refused.value) and "safe_globals" in str(refused.value)
    for options in ({"allow_pickle": True}, {"safe_globals": [name]}):
        with pair_of(**options) as permitted:
            settings = permitted.moved(state)["user"]["default"]["settings"]
            assert isinstance(settings, Settings) and settings.weights.tolist() == [0, 1, 2]


# -- into tensors that are there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "contract",
        "sharded_tensors_arrive_as_they_were_placed",
        "tensors_that_are_given_are_filled_in_place",
        "what_does_not_fit_changes_nothing",
    ],
)
def test_in_a_child_where_a_process_group_is(tmp_path: Path, name: str) -> None:
    in_child(name, tmp_path)


def view(base: torch.Tensor, *shape: int, stride: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    return base.as_strided(shape, stride, offset)


FOUR, OF_TWO = torch.arange(4.0), torch.zeros(2)
UNFIT: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]] = {  # target, received, message
    "expanded": ({"a": torch.zeros(1).expand(4)}, {"a": FOUR}, r"\['a'\] is expanded"),
    "expanded rows": ({"a": torch.zeros(2).expand(2, 2)}, {"a": FOUR.view(2, 2)}, r"\['a'\] is expanded"),
    "elements of one tensor": (
        {"a": view(torch.zeros(3), 2, 2, stride=(1, 1))},
        {"a": FOUR.view(2, 2)},
        r"\['a'\] has elements that share memory",
    ),
    "two views": (
        {"a": FOUR[:3], "b": FOUR[1:]},
        {"a": torch.ones(3), "b": torch.zeros(3)},
        r"\['a'\] and .*\['b'\] share",
    ),
    "one tensor twice": (
        {"a": OF_TWO, "b": OF_TWO},
        {"a": torch.ones(2), "b": torch.ones(2) * 2},
        r"\['a'\] and .*\['b'\] share memory, and different values were received",
    ),
    "no memory": ({"a": torch.zeros(4, device="meta")}, {"a": FOUR}, r"\['a'\] is on the meta device"),
}


@pytest.mark.parametrize(("target", "received", "message"), UNFIT.values(), ids=list(UNFIT))
def test_a_target_that_cannot_hold_what_was_received_is_refused_by_its_key_path(
    target: dict[str, torch.Tensor], received: dict[str, torch.Tensor], message: str
) -> None:
    before = {name: tensor.clone() for name, tensor in target.items() if not tensor.is_meta}
    first = torch.ones(3)
    with pair_of(state_dict=lambda: nested({"first": first, **target})) as filling:
        with pytest.raises(
            StateMismatchError, match=rf"^state_dict\(\)\['user'\]\['default'\]{message}.*; nothing was changed"
        ):
            filling.moved(nested({"first": torch.zeros(3), **{name: one.clone() for name, one in received.items()}}))
    assert first.tolist() == [1, 1, 1]
    assert all(torch.equal(target[name], tensor) for name, tensor in before.items())


def test_targets_that_share_memory_are_filled_if_the_values_agree() -> None:
    """Tied weights, a view of a part, its transpose, and elements of one tensor that get the same value."""
    whole, other, source = torch.zeros(6, 4), torch.zeros(3), torch.arange(24.0).view(6, 4)
    tied, apart = nn.Parameter(torch.zeros(4)), torch.zeros(8)

    def target() -> Any:
        parts = {
            "w": whole,
            "tied": whole,
            "part": whole[1:3],
            "t": whole.t(),
            "same": view(other, 2, 2, stride=(1, 1)),
        }
        return {**parts, "p": tied, "q": tied, "even": apart[::2], "odd": apart[1::2]}

    sent = {"w": source, "tied": source, "part": source[1:3], "t": source.t().clone(), "same": torch.ones(2, 2)}
    sent |= {"p": torch.ones(4), "q": torch.ones(4), "even": torch.arange(4.0), "odd": torch.arange(4.0) * 2}
    with pair_of(state_dict=target) as filling:
        received = filling.moved(sent)
    assert torch.equal(whole, source) and other.tolist() == [1, 1, 1] and tied.tolist() == [1, 1, 1, 1]
    assert apart.tolist() == [0, 0, 1, 2, 2, 4, 3, 6]
    assert all(torch.equal(received[name], sent[name]) for name in sent)
    assert received["part"].data_ptr() == whole[1:].data_ptr()


def test_a_backward_pass_may_run_while_its_parameters_are_received() -> None:
    model = torch.nn.Linear(3, 3)
    source = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with pair_of(state_dict=lambda: nested(model.state_dict())) as filling:
        loss = model(model(torch.ones(1, 3))).sum()
        filling.moved(nested(source))
        loss.backward()
    assert not model.weight.any()


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


class Relay:
    """Stands between a receiver and its sender, and lets so many bytes of the sender's pass before it does something.

    Args:
        sender: whose place it takes.
        at: number of the byte.
        cut: end the connection there; otherwise, flip a bit of that byte.
    """

    def __init__(self, sender: StagerTransport, at: int, *, cut: bool = False) -> None:
        self._listener = socket.create_server(("localhost", 0))
        self._sender_port = int(re.split("[:/]", sender.metadata())[4])
        self.metadata = sender.metadata().replace(f":{self._sender_port}", f":{self._listener.getsockname()[1]}")
        self._at, self._cut = at, cut
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as receiver:
            with socket.create_connection(("localhost", self._sender_port)) as sender:
                back = threading.Thread(target=self._pass_on, args=(receiver, sender, -1))
                back.start()
                self._pass_on(sender, receiver, self._at)
                receiver.shutdown(socket.SHUT_RDWR)
                back.join()

    def _pass_on(self, source: socket.socket, destination: socket.socket, at: int) -> None:
        passed = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                if passed <= at < passed + len(data):
                    if self._cut:
                        destination.sendall(data[: at - passed])
                        return
                    data[at - passed] ^= 1
                passed += len(data)
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (10, "another protocol"),
        (60, "does not know the secret"),
        (120, "another signature"),
        (16 << 20, "another hash"),
    ],
    ids=["greeting", "proof", "header", "data"],
)
def test_a_bit_that_flips_on_the_way_is_noticed(at: int, message: str) -> None:
    weights = torch.full((8 << 20,), 1.0)
    with pair_of(state_dict=lambda: nested({"weights": weights})) as filling:
        filling.send(large(2.0))
        relay = Relay(filling.sender, at)
        with pytest.raises(ReplicationError, match=message):
            filling.receive(metadata=relay.metadata)
        relay.join()
        assert bool((weights == 1).all()), "something was changed"
        filling.until_idle()
        filling.receive()  # the next attempt
        assert bool((weights == 2).all())


@pytest.mark.parametrize("at", [0, 30, 100, 200, 16 << 20])
def test_a_torn_transfer_is_refused_and_the_next_attempt_succeeds(at: int) -> None:
    weights = torch.full((8 << 20,), 1.0)
    with pair_of(state_dict=lambda: nested({"weights": weights})) as filling:
        filling.send(large(2.0))
        relay = Relay(filling.sender, at, cut=True)
        with pytest.raises(ReplicationError, match=r"the other side has ended the connection|reset by peer"):
            filling.receive(metadata=relay.metadata)
        relay.join()
        assert bool((weights == 1).all()), "something was changed"
        filling.receive()
        assert bool((weights == 2).all())


class Stuck:
    """A receiver that greets, and then reads nothing."""

    def __init__(self, pair: Pair, step: int = 1, begins: bool = True) -> None:
        host, port, secret = pair.receiver._parse(pair.sender.metadata())
        self.connection = Connection.open(host, port, secret, step, threading.TIMEOUT_MAX)
        if begins:
            until(lambda: pair.sender._offer is not None and pair.sender._offer.connections)


def test_a_receiver_that_does_not_read_keeps_nobody_waiting(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.send(large(), num_receivers=2)
    stuck = Stuck(pair)
    assert same(pair.receive(), large())  # another one
    pair.sender.disallow_checkpoint()
    pair.send(large(2.0), step=2)  # ends what is still being sent of the one before
    assert same(pair.receive(step=2), large(2.0))
    until(lambda: pair.num_leased() == 0)
    stuck.connection.close()
    assert "did not receive its state: sending to" in caplog.text


def test_a_receiver_that_does_not_read_in_time_is_given_up(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.sender.send_checkpoint([1], 1, large(), SHORT)
    gc.disable()  # memory comes back without it
    try:
        stuck = Stuck(pair, begins=False)
        until(lambda: "did not answer within 0.2 s" in caplog.text)
        pair.until_idle()
        pair.sender.disallow_checkpoint()
        until(lambda: pair.num_leased() == 0)
    finally:
        gc.enable()
    stuck.connection.close()


def test_a_receiver_that_dies_in_the_middle_costs_nobody_anything(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.send(large())
    Stuck(pair).connection.close()
    pair.until_idle()
    assert "did not receive its state" in caplog.text
    assert same(pair.receive(), large())


def test_a_sender_that_is_gone_or_stopped_is_an_error_in_time(pair: Pair) -> None:
    with socket.create_server(("localhost", 0)) as silent:
        with pytest.raises(ReplicationError, match="did not answer in time: timed out"):
            pair.receive(metadata=f"stager://localhost:{silent.getsockname()[1]}/x", timeout=SHORT)
        port = silent.getsockname()[1]
    with pytest.raises(ReplicationError, match=f"the sender at localhost:{port} cannot be reached"):
        pair.receive(metadata=f"stager://localhost:{port}/x")


# -- strangers --------------------------------------------------------------------------------------------------------


def address_of(transport: StagerTransport) -> tuple[str, int]:
    host, port, _ = transport._parse(transport.metadata())
    return host, port


def test_who_does_not_know_the_secret_gets_nothing(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.send(large())
    with pytest.raises(ReplicationError, match="another secret"):
        pair.receive(metadata=re.sub("/[0-9a-f]+$", "/guessed", pair.sender.metadata()))
    with socket.create_connection(address_of(pair.sender)) as stranger:
        stranger.sendall(bytes(80))  # as long as an answer to the greeting is
        received = b"".join(iter(lambda: stranger.recv(1 << 16), b""))
    assert len(received) == 48, "more than the greeting"
    pair.until_idle()
    assert caplog.text.count("does not know the secret") == 2
    assert same(pair.receive(), large())


def test_a_sender_that_does_not_know_the_secret_is_not_believed() -> None:
    with pair_of(secret=SECRET) as ours, pair_of(secret="another one, as long") as theirs:
        theirs.send(nested({}))
        with pytest.raises(ReplicationError, match="another secret"):
            ours.receive(metadata=theirs.sender.metadata())


def test_strangers_that_say_nothing_keep_nobody_waiting(pair: Pair) -> None:
    strangers = [socket.create_connection(address_of(pair.sender)) for _ in range(5)]
    assert same(pair.moved(large()), large())
    for stranger in strangers:
        stranger.close()


def test_more_connections_than_there_can_be_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 2)
    with (
        socket.create_connection(address_of(pair.sender)) as first,
        socket.create_connection(address_of(pair.sender)) as second,
    ):
        assert first.recv(1) and second.recv(1)
        with pytest.raises(ReplicationError, match="refused, or did not answer"):
            pair.receive()


def test_a_secret_that_is_given_is_not_in_the_metadata() -> None:
    with pair_of(secret=SECRET) as secretive:
        assert SECRET not in secretive.sender.metadata() and secretive.sender.metadata().count("/") == 2
        assert same(secretive.moved(large()), large())


def test_metadata_that_does_not_fit_says_what_to_do(pair: Pair) -> None:
    with pytest.raises(ReplicationError, match="not of a StagerTransport; give all replica groups one"):
        pair.receive(metadata="http://localhost:1234/checkpoint/")
    for address, problem in (
        ("localhost:99999", r" \(Port out of range 0-65535\)"),
        ("localhost:port", r" \(Port could not be cast .*\)"),
        ("[::1", r" \(Invalid IPv6 URL\)"),
        ("localhost:0", ""),
        ("localhost", ""),
        ("", ""),
    ):
        with pytest.raises(ReplicationError, match=f"not of a StagerTransport{problem}; give all replica groups one"):
            pair.receive(metadata=f"stager://{address}/secret")
    for host in ("a" * 70, "a..b"):  # no name of a host
        with pytest.raises(ReplicationError, match=host):
            pair.receive(metadata=f"stager://{host}:1234/secret")
    with pair_of(secret=SECRET) as secretive:
        with pytest.raises(ReplicationError, match="this replica was given a secret, and the sender was not"):
            secretive.receive(metadata=pair.sender.metadata())
        with pytest.raises(ReplicationError, match="the sender was given a secret, and this replica was not"):
            pair.receive(metadata=secretive.sender.metadata())
    with pytest.raises(ArgumentError, match="secret has 5 characters"):
        StagerTransport(secret="short")


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_ends_what_is_under_way(wait: bool) -> None:
    with pair_of() as pair:
        pair.send(large())
        stuck, waiting = Stuck(pair), in_thread(lambda: pair.receive(step=9))
        until(lambda: len(pair.sender._connections) == 2)
        pair.sender.shutdown(wait)
        pair.sender.shutdown(wait)
        with pytest.raises(ReplicationError):
            waiting.result()
        with pytest.raises(ClosedError):
            pair.send(large())
        stuck.connection.close()
        with pytest.raises(ReplicationError, match="cannot be reached"):
            pair.receive()


# -- the real one -----------------------------------------------------------------------------------------------------


@contextmanager
def lighthouse(min_replicas: int) -> Iterator[str]:
    """A lighthouse, in a process of its own, that waits for so many replica groups."""
    source = (
        "import sys; from torchft.coordination import LighthouseServer\n"
        f"server = LighthouseServer(bind='[::]:0', min_replicas={min_replicas}, join_timeout_ms=200)\n"
        "print(server.address(), flush=True); sys.stdin.read(); server.shutdown()"
    )
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
        process.communicate()


def replica_group(script: Path, number: int, address: str) -> Training:
    return Training(script, environment=(("TORCHFT_LIGHTHOUSE", address), ("REPLICA_GROUP_ID", str(number))))


def script_that_is_killed(directory: Path, step: int) -> Path:
    """The script of the page, which kills itself in the middle of a step, before its group has given its gradients."""
    directory.mkdir()
    path = page_script("torchft", directory)
    source, line = path.read_text(), "            for parameter in model.parameters():\n"
    assert source.count(line) == 1
    path.write_text(
        source.replace(line, f"            if step == {step}:\n                os.kill(os.getpid(), 9)\n{line}")
    )
    return path


def trained_by_two(directory: Path, script: Path, killed: Path | None = None) -> str:
    """Train with two groups, of which one may be killed and come back. Returns what that one printed at last."""
    with lighthouse(min_replicas=2) as address, ThreadPoolExecutor(1) as threads:
        first = threads.submit(replica_group(script, 0, address).run, directory / "0")
        if killed is not None:
            ended = replica_group(killed, 1, address).run(directory / "1", check=False)
            assert ended.returncode == -signal.SIGKILL
        second = replica_group(script, 1, address).run(directory / "1")
        first.result()
    return second.output


@pytest.mark.long
def test_a_group_that_is_killed_comes_back_and_recovers_bit_equal(tmp_path: Path) -> None:
    script = page_script("torchft", tmp_path)
    trained_by_two(tmp_path / "whole", script)
    output = trained_by_two(tmp_path / "broken", script, script_that_is_killed(tmp_path / "killed", step=9))
    assert "loaded step None" in output, "it had a checkpoint of its own, and need not have recovered"
    whole = final(tmp_path / "whole/0")
    for number in ("whole/1", "broken/0", "broken/1"):
        assert same(whole, final(tmp_path / number)), number


def test_a_group_alone_saves_is_killed_and_resumes_bit_equal(tmp_path: Path, faults: Faults) -> None:
    training = Training(page_script("torchft", tmp_path))
    output = resumes_bit_equal(training, tmp_path, faults, "save.copied", 3)
    assert "loaded step 12" in output
