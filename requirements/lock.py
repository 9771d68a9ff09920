"""Resolve moekit's extras and write the lock files beside this script: all of them, or those named.

Run by `make lock`. Each lock lists exact versions, one a line, and nothing else: no index address, no path.
The test lock constrains those of the demo, so that one environment can grow from demo to test. The newest lock is the other
end of the range of versions that is tested (docs/versions.md); it goes into an environment of its own.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())

#: lock file → what is held in it: what the figures in docs/ were measured with, and the newest that the tests pass with
PINS = {
    "test.lock": ("torch==2.11.0", "triton==3.6.0", "jax==0.11.2"),
    "test-newest.lock": ("torch==2.14.1", "jax==0.12.0.1", "transformers==5.24.0"),
}

#: lock file → the extras it holds
LOCKS = {
    "test.lock": ("dev",),
    "test-newest.lock": ("dev",),
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


def main(names: list[str]) -> None:
    """Write these lock files, or all of them: those without pins of their own hold what the test lock holds."""
    for name in names or LOCKS:
        constraint = HERE / (name if name in PINS else "test.lock")
        if name in PINS:
            constraint.write_text("\n".join(PINS[name]) + "\n")
        extras = LOCKS[name]
        pins = resolve(requirements(extras), constraint)
        header = f"# moekit[{','.join(extras)}], resolved by `make lock` for Linux and Python 3.12"
        (HERE / name).write_text("\n".join([header, *pins]) + "\n")
        print(f"requirements/{name}: {len(pins)} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
