"""The emitted Triton in Triton's own interpreter, a process of its own: in every float dtype."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import re
from itertools import product
import torch
from moekit.testing import Call, check, operands
from moekit.testing.schedules import variants
from tests.declarations import DECLARATIONS

DTYPES = ("float32", "float16", "bfloat16")  # the rules' schedule in each; others and layouts in the first two, by turns
SIZES = {
    "gate_gemm": [dict(T=5, P=19, D=38), dict(T=17, P=8, D=16)],
    "silu_and_mul": [dict(T=7, I=37)],
    "topk_softmax": [dict(T=5, E=60), dict(T=3, E=128)],
    "shared_expert_combine": [dict(T=5, H=50)],
    "add_rms_norm": [dict(T=5, H=50), dict(T=3, H=300)],
    "all_reduce_add_rms_norm": [dict(T=5, H=50)],
    "gated_rms_norm": [dict(T=3, V=4, D=33)],
    "delta_rule_step": [dict(T=3, K=2, V=4, Dk=8, Dv=9)],
    "delta_rule_chunks": [dict(T=2, M=2, Cq=5, Ck=5, Cv=5, K=1, V=2, Dk=6, Dv=17)],
    "unit_lower_inverse": [dict(T=3, Lr=5, Lc=5)],
    "gate_projections": [dict(T=3, D=35, I=5, E=9, G=1)],
    "gate_block": [dict(T=3, D=35, I=5, E=9, G=1)],
    "down_combine": [dict(T=3, H=19, I=33, **{"H?": 1})],
    "expert_gate_up": [dict(T=3, D=35, I=5, E=7, K=3)],
    "attention_decode": [dict(T=3, K=2, G=3, L=20, D=6, Dv=9)],
    "expert_down": [dict(T=3, H=19, I=9, E=7, K=3)],
    "qk_norm_rope": [dict(T=2, Q=2, K=1, D=10, R=2)],
    "causal_conv1d_step": [dict(T=3, C=19, S=3), dict(T=1, C=4, S=4)],
    "qkv_norm_rope": [dict(T=2, Q=2, K=1, L=3, R=2, N=6, Dv=7)],
    "gated_attention_decode": [dict(T=3, K=2, G=3, Q=6, L=20, D=6, Dv=9)],
    "conv_projections": [dict(T=2, D=35, C=9, P=5, S=3)],
    "gate_topk": [dict(T=3, D=35, I=5, E=19, G=1)],
    "row_product": [dict(T=3, D=35, P=9)],
    "add_norm_gate_projections": [dict(T=3, H=35, I=5, E=9, G=1)],
    "expert_down_shared": [dict(T=3, H=19, I=9, J=21, E=7, K=3, **{"H?": 1})],
    "experts": [dict(T=5, D=35, I=17, H=19, E=7, K=3)],
    "moe_align": [dict(T=40, K=3)],
    "scaled_product": [dict(T=3, D=35, P=9)],
}
LONG = {  # by the rules alone, as others take minutes
    "attention_decode": [dict(T=3, K=2, G=3, L=300, D=20, Dv=9)],
    "scaled_expert_gate_up": [dict(T=3, D=35, I=5, E=7, K=3)],
    "scaled_expert_down": [dict(T=3, H=19, I=9, E=7, K=3)],
    "scaled_experts": [dict(T=5, D=35, I=17, H=19, E=7, K=3)],
    "quantised": [dict(T=5, D=35)],
    "quantised_experts": [dict(T=5, D=35, I=17, H=19, E=7, K=3)],
    "scaled_conv_projections": [dict(T=2, D=35, C=9, P=5, Q=4, S=3)],
    "scaled_gate_topk": [dict(T=3, D=35, I=5, E=19, G=1)],
    "scaled_add_norm_gate_projections": [dict(T=3, H=35, I=5, E=9, G=1)],
    "scaled_expert_down_shared": [dict(T=3, H=19, I=9, J=21, E=7, K=3, **{"H?": 1})],
}
count = 0
for name, fusion in DECLARATIONS.items():
    known = dict(k=10, experts=7, block=4, rows=8, columns=8, inner=8, shared_inner=8)
    common = {n: v for n, v in known.items() if n in fusion.params}
    ways = [{}, {"lanes": True}] if name == "scaled_conv_projections" else [{}]
    for sizes, way in product(SIZES.get(name, []) + LONG.get(name, []), ways):
        params = common | way
        few = {axis: size if axis == "E" else min(size, 7) for axis, size in sizes.items()}
        calls, less = ([Call(fusion, operands(fusion, s, dtype, "normal", 7, params), params) for dtype in DTYPES]
                       for s in (sizes, few))
        cases = [(call, {}, None) for call in calls]
        for i in range(2) if sizes in SIZES.get(name, []) else ():
            schedules, of_few = (variants(fusion.trace(each[i].binding)) for each in (calls, less))
            for kind in [*schedules][1 + i :: 2]:
                tiny = kind in of_few and re.search(r"loop:\\w+:[124]\\b", str(schedules[kind]))  # each block costs the same
                cases.append((less[i], {}, of_few[kind]) if tiny else (calls[i], {}, schedules[kind]))
        for i, layout in enumerate(("padded", "strided", "transposed padded", "shifted")):
            cases.append((calls[i // 2], dict.fromkeys([*calls[0].operands, *calls[0].names], layout), None))
        for call, layouts, schedule in cases:
            check("triton-interpreter", Call(fusion, call.operands, params, layouts, schedule))
            count += 1
print(count, "cases")
"""


@pytest.mark.timeout(600)
def test_emitted_triton_runs_in_its_interpreter():
    """Every fusion, several schedules and layouts, outputs poisoned and guarded."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100
