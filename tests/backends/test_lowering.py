"""Every fusion and probe of the sanitizer's pass, in every kind of schedule, as Triton IR made by Pallas for a GPU."""

from collections import defaultdict

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from moekit.testing.gpu_pass import cases, pallas_call

H200 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA H200", platform="cuda", num_cores=132))
CASES = defaultdict(dict)
for implementation, case in cases():
    if implementation == "pallas":
        CASES[case.fusion].setdefault(case.schedule, case)


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_lowers_for_a_gpu(name):
    """What interpret mode takes, JAX's Triton lowering need not: it once gave a choice of two literals the condition's type."""
    for schedule, one in CASES[name].items():
        call, arrays = pallas_call(one)
        with jax.sharding.use_abstract_mesh(H200):
            text = call.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert "__gpu$xla.gpu.triton" in text, schedule
