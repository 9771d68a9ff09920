"""Processes that run what may end them: an illegal access or a hang costs one process and no more."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from moekit.cli.platform import prepare_jax
from moekit.testing import far
from moekit.testing.executors import fatal, starved

PATIENCE = 120.0  # seconds for one piece of work
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Trouble:
    """Why there is no answer. `kind`: "ended" (the process did), "device" (its device is unusable), "memory" (there was too
    little), "error"."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> Trouble:
        """What an exception means, in one line (and where it came from, if it is nobody's but ours)."""
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        text = f"{type(error).__name__}: {first}"
        if starved(error) or fatal(error):
            return cls("memory" if starved(error) else "device", text)
        return cls("error", f"{text}\n{''.join(traceback.format_exception(error, limit=-4))}")


class Process:
    """A process that does one thing after the other, and is begun anew where it has ended.

    `disarmed`: with the verifier off, as a mutant may be planted.
    """

    def __init__(self, disarmed: bool = False):
        self.disarmed = disarmed
        self.process: Any = None
        self.connection: Any = None

    def ask(self, work: Callable[..., Any], *given: Any, patience: float = PATIENCE) -> Any:
        """What `work`, a function of a module, makes of `given`; Trouble if it raised, or the process died or does not end."""
        if self.process is None:
            self._start()
        try:
            self.connection.send((work, given))
            if not self.connection.poll(patience):
                self.end()
                return Trouble("ended", f"it did not end in {patience:.0f} seconds")
            answer = self.connection.recv()
        except (EOFError, OSError):
            return Trouble("ended", f"its process died with exit code {self.end()}")
        if isinstance(answer, Trouble) and answer.kind == "device":
            self.end()
            return Trouble("ended", f"its process ended with an error of the device: {answer.text}")
        return answer

    def _start(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, self.disarmed), daemon=True)
        resource_tracker.ensure_running()  # it would let Ctrl-C through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()  # with Ctrl-C blocked, also while it imports: that is for the parent, which ends it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def kill(self) -> None:
        """End the process at once, whatever it is at."""
        if (process := self.process) is not None:
            process.kill()

    def end(self) -> int | None:
        """End the process; its exit code, if it had ended by itself."""
        if self.process is None:
            return None
        self.connection.close()  # which a process that waits for work ends of
        self.process.join(0.5)
        code = self.process.exitcode
        self.process.kill()
        self.process.join(5)
        self.process = None
        return code


def _serve(connection: Any, disarmed: bool) -> None:
    """A process's whole life."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # Triton's interpreter computes with infinities in numpy
    prepare_jax()
    if disarmed:
        disarm()
    try:
        while True:
            connection.send(_answer(*connection.recv()))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is there any more; with a broken device an orderly end may hang


def _answer(work: Callable[..., Any], given: tuple) -> Any:
    try:
        return work(*given)
    except Exception as error:
        trouble = Trouble.of(error)
    gc.collect()  # with the error gone, its frames hold no memory any more
    if trouble.kind == "memory":
        far.release()
    return trouble


def disarm() -> None:
    """Switch off, in this process, every check that is not numerical: the verifier's rules."""
    from moekit.compile import plan

    plan.verify = lambda program: None
