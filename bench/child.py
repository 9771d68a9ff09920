"""A process that measures one case after another, so that one which dies or hangs costs that case and no more."""

import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Child:
    """Calls `measure`, a function of a module, in a process of its own; a new one is started when it has died."""

    def __init__(self, measure: Callable[..., Iterable[dict]], patience: float = 180.0):
        """patience: seconds for one case."""
        self.measure, self.patience = measure, patience
        self.process: Any = None

    def rows(self, *args: object) -> list[dict]:
        """The rows of one case. One that fails in a used process is tried once more in a new one; then a row says why."""
        fresh = self.process is None
        found = self.asked(*args)
        return self.asked(*args) if not fresh and any("problem" in row and row["side"] == "all" for row in found) else found

    def asked(self, *args: object) -> list[dict]:
        """The rows of one case, tried once."""
        found = self._asked(args)
        return [{"side": "all", "problem": found}] if isinstance(found, str) else found

    def _asked(self, args: tuple) -> list[dict] | str:
        if self.process is None:
            self.pipe, theirs = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=_serve, args=(theirs, self.measure), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(args)
            why = f"it did not end in {self.patience:g} seconds"
            if self.pipe.poll(self.patience):
                why = self.pipe.recv()
                if not isinstance(why, str):
                    return why
        except (EOFError, OSError):
            self.process.join(5)
            why = f"its process died with exit code {self.process.exitcode}"
        self.close()
        return why

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join(5)
            self.pipe.close()
            self.process = None


def _serve(pipe: Any, measure: Callable[..., Iterable[dict]]) -> None:
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        try:
            answer: list[dict] | str = list(measure(*args))
        except Exception as error:
            answer = said(error)
        pipe.send(answer)
