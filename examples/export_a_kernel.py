"""Write a fusion as one standalone file, to be vendored into an engine that does not depend on moekit.

    python examples/export_a_kernel.py [FOLDER]

The same as `moekit export silu_and_mul --dtype float16 --sizes I=512 -o FOLDER/silu_and_mul.py`. The file imports torch and
triton alone and tests itself when run.
"""

import sys
import tempfile
from pathlib import Path

from moekit.export import export
from moekit.fusions import FUSIONS

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
path = folder / "silu_and_mul.py"
path.write_text(export(FUSIONS["silu_and_mul"], dtype="float16", sizes={"I": 512}), encoding="utf-8")
lines = path.read_text(encoding="utf-8").splitlines()
kernels = [line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def ") and "_kernel(" in line]
print(f"{path.name}: {len(lines)} lines with the kernels {' and '.join(kernels)}")
print("test it on a GPU with: python", path.name)
