"""Frames over a real socket pair: whatever the sizes, the splits and the descriptors, what was put is what is taken."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from stager.workers.pool.channel import Frame, Inbox, Outbox
from stager.workers.pool.codec import close_fds
from stager.workers.pool.messages import Done

messages = st.lists(
    st.tuples(st.integers(0, 400_000), st.one_of(st.integers(0, 3), st.integers(250, 260), st.integers(500, 520))),
    max_size=6,
)


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


@contextmanager
def numbered_fds(count: int) -> Iterator[list[int]]:
    """Descriptors that can be told apart: the n-th is at offset n of its file."""
    fds = [os.memfd_create("test-channel") for _ in range(count)]
    for number, fd in enumerate(fds):
        os.lseek(fd, number, os.SEEK_SET)
    try:
        yield fds
    finally:
        close_fds(list(fds))


def take_all(inbox: Inbox) -> list[Frame]:
    frames = []
    while (frame := inbox.take()) is not None:
        frames.append(frame)
    return frames


def pump(outbox: Outbox, inbox: Inbox) -> list[Frame]:
    """Alternate until all is through."""
    frames: list[Frame] = []
    while True:
        sent = outbox.flush()
        while inbox.receive():
            frames += take_all(inbox)
        if sent:
            return frames


@given(messages)
def test_messages_and_their_descriptors_arrive_whole_and_in_order(sizes: list[tuple[int, int]]) -> None:
    with pair() as (left, right), numbered_fds(max((n for _, n in sizes), default=0)) as fds:
        outbox, inbox = Outbox(left), Inbox(right)
        for task_id, (nbytes, num_fds) in enumerate(sizes):
            outbox.put(Done(task_id, os.urandom(8) * (nbytes // 8)), fds[:num_fds])
        frames = pump(outbox, inbox)
        assert [(f.message.task_id, len(f.fds), f.whole) for f in frames if isinstance(f.message, Done)] == [
            (task_id, num_fds, True) for task_id, (_, num_fds) in enumerate(sizes)
        ]
        for frame, (nbytes, _) in zip(frames, sizes, strict=True):
            assert isinstance(frame.message, Done) and len(frame.message.payload) == nbytes // 8 * 8
            assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in frame.fds] == list(range(len(frame.fds)))
            close_fds(frame.fds)
        assert not outbox


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=12))
def test_stream_split_anywhere_is_reassembled(payload: bytes, cuts: list[int]) -> None:
    with pair() as (left, right), pair() as (relay_in, relay_out):
        outbox, inbox = Outbox(left), Inbox(relay_out)
        for task_id in range(2):
            outbox.put(Done(task_id, payload))
        assert outbox.flush()
        stream = right.recv(1 << 20)
        frames = []
        places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
        for start, end in itertools.pairwise(places):
            relay_in.sendall(stream[start:end])
            assert inbox.receive()
            frames += take_all(inbox)
        assert [frame.message for frame in frames] == [Done(0, payload), Done(1, payload)]


def test_peer_that_is_gone_is_the_end_of_the_stream_after_what_it_sent() -> None:
    with pair() as (left, right):
        outbox, inbox = Outbox(left), Inbox(right)
        outbox.put(Done(1, b"last words"))
        assert outbox.flush()
        left.close()
        assert inbox.receive()
        assert inbox.take() == Frame(Done(1, b"last words"), [], True)
        assert not inbox.receive() and inbox.ended


def test_half_a_message_is_no_message_and_its_descriptors_are_closed() -> None:
    with pair() as (left, right), numbered_fds(2) as fds:
        outbox, inbox = Outbox(left), Inbox(right)
        outbox.put(Done(1, bytes(10 << 20)), fds)
        assert not outbox.flush()  # the socket is full
        outbox.drop()
        while inbox.receive():
            pass
        assert inbox.take() is None
        inbox.drop()  # the leak check looks for the descriptors


def test_descriptors_that_did_not_fit_are_reported_and_do_not_shift_those_of_the_next_message() -> None:
    """Wrong descriptors would be somebody else's tensors."""
    with pair() as (left, right), numbered_fds(20) as fds:
        outbox, inbox = Outbox(left), Inbox(right)
        outbox.put(Done(1, b"too many"), fds)
        outbox.put(Done(2, b"one"), fds[7:8])
        assert outbox.flush()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 5, hard))
        try:
            inbox.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        while inbox.receive():
            pass
        first, second = take_all(inbox)
        assert (first.fds, first.whole) == ([], False)
        assert second.whole and [os.lseek(fd, 0, os.SEEK_CUR) for fd in second.fds] == [7]
        close_fds(second.fds)


class ShortOfSomething(socket.socket):
    """Refuses descriptors, as the kernel does when too many are in flight."""

    refusals = 2

    def sendmsg(self, *args: object) -> int:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ETOOMANYREFS, "Too many references")
        return super().sendmsg(*args)


def test_too_many_descriptors_in_flight_is_tried_again_later() -> None:
    with pair() as (left, right), numbered_fds(1) as fds, ShortOfSomething(fileno=os.dup(left.fileno())) as sock:
        sock.setblocking(False)
        outbox, inbox = Outbox(sock), Inbox(right)
        outbox.put(Done(1, b""), fds)
        for _ in range(2):
            assert not outbox.flush()
            assert outbox.throttled
        (frame,) = pump(outbox, inbox)
        assert not outbox.throttled
        assert frame.whole and len(frame.fds) == 1
        close_fds(frame.fds)
