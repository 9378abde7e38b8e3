"""The daemon's view of a process: replies belong to their calls, and last words are heard."""

import asyncio
import errno
import os
import socket
from typing import Any

import pytest

from snapd.block.errors import SnapdError
from snapd.manager.process import ControlConnection, Watch
from snapd.proc import control
from snapd.proc.child import Child


def run(test: Any) -> None:
    """Run an async test with a connected pair."""

    async def with_pair() -> None:
        ours, theirs = control.pair()
        events: list[control.Message] = []
        link = ControlConnection(ours, events.append)
        try:
            await test(link, theirs, events)
        finally:
            link.close()
            theirs.close()

    asyncio.run(with_pair())


async def request(peer: socket.socket) -> control.Message:
    received = await asyncio.to_thread(control.receive, peer)
    assert received is not None
    return received[0]


def test_a_late_reply_is_not_taken_for_the_next_calls() -> None:
    async def test(link: ControlConnection, peer: socket.socket, _events: list[control.Message]) -> None:
        with pytest.raises(SnapdError, match="no answer to slow") as caught:
            await link.call({"verb": "slow"}, timeout_s=0)
        assert caught.value.errno == errno.ETIMEDOUT
        slow = await request(peer)
        call = asyncio.create_task(link.call({"verb": "quick"}))
        quick = await request(peer)
        control.send(peer, {"ok": True, "id": slow["id"], "answer": "slow"})
        control.send(peer, {"ok": True, "id": quick["id"], "answer": "quick"})
        assert (await call)[0]["answer"] == "quick"

    run(test)


def test_a_refusal_is_raised_with_its_errno() -> None:
    async def test(link: ControlConnection, peer: socket.socket, _events: list[control.Message]) -> None:
        call = asyncio.create_task(link.call({"verb": "v"}))
        asked = await request(peer)
        control.send(peer, {"ok": False, "id": asked["id"], "errno": errno.EBADMSG, "message": "damaged"})
        with pytest.raises(SnapdError, match="damaged") as caught:
            await call
        assert caught.value.errno == errno.EBADMSG

    run(test)


def test_a_peer_that_hangs_up_ends_the_call() -> None:
    async def test(link: ControlConnection, peer: socket.socket, _events: list[control.Message]) -> None:
        call = asyncio.create_task(link.call({"verb": "v"}))
        await request(peer)
        peer.close()
        with pytest.raises(SnapdError, match="hung up"):
            await call
        with pytest.raises(SnapdError, match="hung up"):
            await link.call({"verb": "again"})

    run(test)


def test_last_words_are_heard_after_the_exit_was_seen() -> None:
    async def test(link: ControlConnection, peer: socket.socket, events: list[control.Message]) -> None:
        control.send(peer, {"event": "progress"})
        control.send(peer, {"event": "merged"})
        peer.close()
        link.drain()
        assert [event["event"] for event in events] == ["progress", "merged"]

    run(test)


def test_an_exit_is_seen_by_every_waiter_and_the_child_is_reaped() -> None:
    async def test() -> None:
        child = Child.spawn("this", [], [])
        watch = Watch(child.pid, child.pidfd, child=True)
        waiter = asyncio.create_task(watch.exited())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait_for(watch.exited(), 20)
        with pytest.raises(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)

    asyncio.run(test())
