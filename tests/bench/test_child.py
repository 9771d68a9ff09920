"""bench/child.py: a case that ends its process costs itself alone."""

import os
import time
from pathlib import Path

from bench.child import Child


def measure(what, folder=""):
    """Rows, an error, a death or a long wait; `once` dies only the first time."""
    if what == "error":
        raise ValueError("a case that is refused\nat length")
    if what == "die" or (what == "once" and not (Path(folder) / "died").exists()):
        (Path(folder) / "died").touch() if folder else None
        os._exit(7)
    if what == "hang":
        time.sleep(60)
    yield {"side": what, "us": 1.0}


def problem(rows):
    (row,) = rows
    return row["problem"]


def test_a_case_that_ends_its_process_is_tried_once_more_and_the_next_goes_on(tmp_path):
    child = Child(measure)
    assert problem(child.rows("die")) == "its process died with exit code 7"
    assert child.rows("a") == [{"side": "a", "us": 1.0}]
    first = child.process.pid
    assert child.rows("once", str(tmp_path)) == [{"side": "once", "us": 1.0}]
    assert child.process.pid != first
    assert problem(child.rows("error")) == "ValueError: a case that is refused"
    child.patience = 0.5
    assert problem(child.rows("hang")) == "it did not end in 0.5 seconds"
    assert child.process is None
