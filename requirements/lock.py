"""Resolve moekit's extras and write the lock files beside this script.

Run by `make lock`. Each lock lists exact versions, one a line, and nothing else: no index address, no path.
The test lock is resolved first and constrains the others, so that one environment can grow from demo to test.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())

#: What the figures in docs/ were measured with: held back until they are measured anew.
PINS = ("torch==2.11.0", "triton==3.6.0", "jax==0.11.2")

#: lock file → the extras it holds
LOCKS = {
    "test.lock": ("dev",),
    "demo.lock": ("jax", "cli"),
    "demo-cuda.lock": ("jax", "cuda", "cli"),
}


def requirements(extras: tuple[str, ...]) -> list[str]:
    """The requirement strings of the core and of these extras, with moekit's own extras expanded."""
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = list(PROJECT["project"]["dependencies"]) + PROJECT["build-system"]["requires"]
    for extra in extras:
        for line in optional[extra]:
            nested = re.fullmatch(r"moekit\[(.*)\]", line)
            wanted += requirements(tuple(nested[1].split(","))) if nested else [line]
    return list(dict.fromkeys(wanted))


def resolve(wanted: list[str], constraint: Path) -> list[str]:
    """What pip would install for these requirements in an empty environment, as sorted `name==version`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", *wanted, "--constraint", str(constraint)]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = [item["metadata"] for item in report["install"]]
    return sorted(f"{re.sub(r'[-_.]+', '-', m['name']).lower()}=={m['version']}" for m in found)


def main() -> None:
    """Write every lock file."""
    test_lock = HERE / "test.lock"
    for name, extras in LOCKS.items():
        if name == test_lock.name:
            test_lock.write_text("\n".join(PINS) + "\n")
        pins = resolve(requirements(extras), test_lock)
        header = f"# moekit[{','.join(extras)}], resolved by `make lock` for Linux and Python 3.12"
        (HERE / name).write_text("\n".join([header, *pins]) + "\n")
        print(f"requirements/{name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
