"""Worker processes: what a campaign gives its tasks to, so that an illegal access or a hang costs one process and no more."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from moekit.testing.case import FuzzCase
from moekit.testing.executors import fatal, starved
from moekit.testing.shrink import sort_of
from moekit.testing.tasks import JAX, Task, run_task

DEVICE = 70  # the exit code of a process that ends because its device is unusable
PATIENCE = 120.0  # seconds for one case
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Trouble:
    """Why a task came to no report. `kind`: "device" (the process ends of it), "memory" (there was too little), "error"."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """What an exception means, in one line (and where it came from, if it is nobody's but ours)."""
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        text = f"{type(error).__name__}: {first}"
        if isinstance(error, Exception) and starved(error):
            return cls("memory", text)
        if isinstance(error, Exception) and fatal(error):
            return cls("device", text)
        return cls("error", f"{text}\n{''.join(traceback.format_exception(error, limit=-4))}")


class Worker:
    """A process that runs one task at a time. `disarmed`: with the verifier off, as a mutant may be planted."""

    def __init__(self, disarmed: bool = False):
        self.process, self.connection = _started(run_task, disarmed)
        self.task: Task | None = None
        self.since = time.monotonic()

    def give(self, task: Task) -> None:
        """Hand over a task."""
        self.task, self.since = task, time.monotonic()
        with contextlib.suppress(OSError):  # it died meanwhile: its end of the pipe says so
            self.connection.send(task)

    def stop(self) -> None:
        """End the process, without waiting for it."""
        self.process.kill()

    def end(self) -> int | None:
        """Stop the process; its exit code, if it had ended by itself."""
        self.process.join(0.2)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join(5)
        self.connection.close()
        return code


def _started(work: Callable[[Any], Any], disarmed: bool) -> tuple[Any, Any]:
    """A process that does `work`, a function of a module, on whatever it is sent; and the connection to it."""
    connection, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs, work, disarmed), daemon=True)
    resource_tracker.ensure_running()  # it would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # with Ctrl-C blocked, also while it imports: that is for the parent, which ends its workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, connection


def _prepare(disarmed: bool) -> None:
    from moekit.cli.platform import prepare_jax

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # Triton's interpreter computes with infinities in numpy
    prepare_jax()
    if disarmed:
        from moekit.testing.mutants.killer import disarm

        disarm()


def _serve(connection: Any, work: Callable[[Any], Any], disarmed: bool) -> None:
    """A process's whole life. It ends itself after an error that leaves its device unusable."""
    _prepare(disarmed)
    try:
        while True:
            _tell(connection, _attempt(work, connection.recv()))
    except (EOFError, BrokenPipeError):
        return


def _attempt(work: Callable[[Any], Any], given: Any) -> Any:
    """What the work comes to, or the trouble there was: with the error gone, its frames hold no memory any more."""
    try:
        return work(given)
    except Exception as error:
        return Trouble.of(error)


def _tell(connection: Any, answer: Any) -> None:
    connection.send(answer)
    if not isinstance(answer, Trouble):
        return
    if answer.kind == "device":
        os._exit(DEVICE)
    if answer.kind == "memory":
        from moekit.testing.batch import release

        gc.collect()
        release()


def replay(case: FuzzCase, implementation: str) -> list[str]:
    """Run one case here and now; what is wrong with it."""
    from moekit.testing.batch import run_cases
    from moekit.testing.executors import executor
    from moekit.testing.oracle import Oracle

    if implementation in JAX:
        from moekit.testing.jax_batch import run_values

        return run_values(implementation, [(case, Oracle.of(case, implementation))])[0].problems
    made = executor(implementation)
    return run_cases(made, [(case, Oracle.of(case, implementation, made.standard))])[0].problems


class Prober:
    """Runs single cases in one process after another: replaying asks a few times, shrinking hundreds."""

    def __init__(self, implementation: str, disarmed: bool = False):
        self.implementation, self.disarmed = implementation, disarmed
        self.process: Any = None
        self.connection: Any = None

    def problems(self, case: FuzzCase, patience: float = PATIENCE) -> list[str]:
        """What is wrong with a case; that its process died of it, or did not end, is."""
        if self.process is None or not self.process.is_alive():
            self._start()
        try:
            self.connection.send(case)
            if self.connection.poll(patience):
                answer = self.connection.recv()
                if not isinstance(answer, Trouble):
                    return answer
                if answer.kind != "device":
                    return [answer.text]
                self.close()
                return [f"its process ended with an error of the device: {answer.text}"]
            self.close()
            return [f"it did not end in {patience:.0f} seconds"]
        except (EOFError, OSError):
            code = self.close()
            return [f"its process died with exit code {code}"]

    def fails(self, case: FuzzCase, like: Sequence[str]) -> bool:
        """Whether the case fails, or ends the process it runs in, as another did: running out of memory is neither, and an
        error raised (a refusal, say) is not the wrong values that were found.
        """
        found = self.problems(case)
        return bool(found) and not starved(Exception(found[0])) and sort_of(found) == sort_of(like)

    def _start(self) -> None:
        self.close()
        self.process, self.connection = _started(functools.partial(replay, implementation=self.implementation), self.disarmed)

    def close(self) -> int | None:
        """End the process; its exit code, if it had ended by itself."""
        if self.process is None:
            return None
        self.process.join(1)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join(5)
        self.connection.close()
        self.process = None
        return code


def isolated(case: FuzzCase, implementation: str, seconds: float = PATIENCE, disarmed: bool = False) -> list[str]:
    """Run one case in a process of its own, which may die of it."""
    prober = Prober(implementation, disarmed)
    try:
        return prober.problems(case, seconds)
    finally:
        prober.close()
