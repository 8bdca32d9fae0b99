"""Signals: one end for all of them, in a process of its own where it would end the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from raytrain.core.signals import (
    EXIT_STATUS,
    Interrupted,
    continued_by,
    deferred,
    interrupted,
    interruptible,
    raise_if_interrupted,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers_before_and_after() -> object:
    """Ctrl-C is ignored where the tests run in the background."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in SIGNALS}
    yield
    assert {signal.getsignal(each) for each in SIGNALS} == {signal.default_int_handler}
    for each, handler in before.items():
        signal.signal(each, handler)


def command(text: str) -> subprocess.CompletedProcess[str]:
    start = "import os, signal, sys, time\nfrom raytrain.core.signals import *\n"
    return subprocess.run(
        [sys.executable, "-c", start + text], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_raises_keyboard_interrupt_where_work_is_recorded(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible(), interruptible():
        os.kill(os.getpid(), number)
        raise AssertionError("not interrupted")
    assert not interrupted()


def test_a_signal_that_a_library_has_caught_is_raised_at_the_next_look() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
        raise_if_interrupted()


def test_a_deferred_block_is_finished_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        with deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            done.append("all of it")
        raise AssertionError("not interrupted")
    assert done == ["all of it"]


def test_on_the_way_out_a_deferred_block_raises_nothing_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with deferred():
                pass


@pytest.mark.parametrize("consequence", [None, ValueError("a library's")])
def test_a_signal_says_what_continues_the_work_once_that_is_known(
    consequence: Exception | None,
) -> None:
    def interrupted_work(*offered: str) -> None:
        with interruptible(), continued_by() as offer:
            for command in offered:
                offer(command)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise consequence or KeyboardInterrupt from None

    with pytest.raises(Interrupted) as told:
        interrupted_work("go on")
    assert told.value.command == "go on"
    with pytest.raises((KeyboardInterrupt, ValueError)) as bare:
        interrupted_work()
    assert bare.type is (KeyboardInterrupt if consequence is None else ValueError)
    with pytest.raises(ValueError, match="a bug"), continued_by() as known:
        known("go on")
        raise ValueError("a bug")


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, signal.default_int_handler) == signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_has_begun_the_process_ends_at_once(number: int) -> None:
    done = command(
        f"signal.signal({number}, signal.SIG_DFL)\n"
        f"with handled():\n    os.kill(os.getpid(), {number})\n    print('went on')"
    )
    assert (done.returncode, done.stdout) == (EXIT_STATUS, "")
    assert done.stderr.startswith("raytrain: interrupted") and done.stderr.count("\n") == 1


def test_a_second_signal_ends_the_process_also_within_a_long_call() -> None:
    done = command(
        "with interruptible():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n"
        "        import threading\n"
        "        again = lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM))\n"
        "        threading.Thread(target=again, daemon=True).start()\n"
        "        print('cleaning up', flush=True)\n        threading.Event().wait()"
    )
    assert (done.returncode, done.stdout) == (EXIT_STATUS, "cleaning up\n")
    assert "second signal" in done.stderr


def test_one_signal_that_is_delivered_twice_is_one() -> None:
    done = command(
        "with interruptible():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        print('cleaned up')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


def test_when_the_command_is_over_a_signal_ends_it_with_its_own_status() -> None:
    done = command(
        "import atexit\natexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))\n"
        "with handled():\n    exit_with(3)"
    )
    assert (done.returncode, done.stderr) == (3, "")
