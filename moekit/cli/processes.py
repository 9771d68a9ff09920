"""A command that runs as one of several processes, on one machine or many, which share a model."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import wraps
from typing import Any

import click

from moekit.cli.platform import installed, prepare_jax
from moekit.errors import UnavailableError

SECONDS = 300  # that a process waits for the others
GO = b"go"  # all are there


def several_processes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `jax.distributed`: every process is started with the same arguments but for its number."""

    @click.option("--coordinator", metavar="HOST:PORT", envvar="JAX_COORDINATOR_ADDRESS", help="Of process 0; given to all.")
    @click.option("--processes", type=click.IntRange(1), envvar="JAX_NUM_PROCESSES", help="How many share the model.")
    @click.option("--process", type=click.IntRange(0), envvar="JAX_PROCESS_ID", help="Which of them this is; 0 prints.")
    @wraps(command)
    def as_one(*, coordinator: str | None, processes: int | None, process: int | None, **rest: Any) -> Any:
        if coordinator is None and processes is None and process is None:
            return command(**rest)
        if coordinator is None or processes is None or process is None:
            raise click.UsageError("--coordinator, --processes and --process go together: give all three or none")
        if process >= processes:
            raise click.BadParameter(f"{process} is none of {processes} processes, from 0", param_hint="--process")
        _join(coordinator, processes, process)
        with _heard(process):
            return command(**rest)

    return as_one


def _join(coordinator: str, processes: int, process: int) -> None:
    """Wait for all processes; jax then shows every one the devices of all."""
    host, _, digits = coordinator.rpartition(":")
    port = int(digits) if digits.isdecimal() else 0
    if not host or not 0 < port < 2**16:
        raise click.BadParameter(f"{coordinator!r} is no HOST:PORT such as 10.0.0.1:8476", param_hint="--coordinator")
    if not installed("jax"):
        raise UnavailableError("several processes need jax; install moekit[jax]")
    prepare_jax()
    import jax

    try:
        if process:
            _report(host.strip("[]"), port, process)
        else:
            _gather(port, processes)
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=SECONDS)
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UnavailableError(f"process {process} of {processes} found no others at {coordinator}: {why}") from None


def _gather(port: int, processes: int) -> None:
    """Wait until all others have reported: where one does not come, jax (0.11) ends the process without a sentence."""
    last, there, waiting = time.monotonic() + SECONDS, set(), []
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with ExitStack() as stack:
        with socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=processes) as server:
            while missing := set(range(1, processes)) - there:
                server.settimeout(max(0.01, last - time.monotonic()))
                try:
                    connection = stack.enter_context(server.accept()[0])
                except TimeoutError:
                    raise TimeoutError(f"process {min(missing)} did not come within {SECONDS} seconds") from None
                connection.settimeout(1)
                with suppress(OSError, ValueError):  # of whoever else knocks at the port
                    there.add(int(connection.recv(16)))
                    waiting.append(connection)
        for connection in waiting:  # the port is free for jax by now
            with suppress(OSError):
                connection.sendall(GO)


def _report(host: str, port: int, process: int) -> None:
    """Tell process 0 that this one is there, and wait until it says that all are; it may be the last to come itself."""
    last = time.monotonic() + SECONDS
    while True:
        left, problem = max(0.01, last - time.monotonic()), "process 0 has gone"
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(str(process).encode())
                connection.settimeout(left)
                if connection.recv(len(GO)) == GO:
                    return
        except OSError as error:
            problem = str(error)
        if time.monotonic() > last:
            raise TimeoutError(f"{problem}, for {SECONDS} seconds")
        time.sleep(0.1)


def process_count() -> int:
    """How many processes share the model; jax is imported by then."""
    import jax

    return jax.process_count()


@contextmanager
def _heard(process: int) -> Iterator[None]:
    """Process 0 prints; of the others an error is heard, which is printed when this is over.

    Gloo, by which CPUs talk, writes to the descriptor of stdout, where results are to stand alone: it leads nowhere meanwhile.
    """
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        results = stack.enter_context(_kept_from_libraries(nowhere.fileno()))
        stack.enter_context(redirect_stdout(nowhere if process else results))
        if process:
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def _kept_from_libraries(nowhere: int) -> Iterator[Any]:
    """What Python is to write results to, while the descriptor of stdout is another."""
    if sys.stdout is not sys.__stdout__ or sys.stdout is None:  # which something else has already put aside
        yield sys.stdout
        return
    sys.stdout.flush()
    number = sys.stdout.fileno()
    with os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as results:
        os.dup2(nowhere, number)
        try:
            yield results
        finally:
            results.flush()
            os.dup2(results.fileno(), number)
