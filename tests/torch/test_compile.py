"""torch.compile: no graph break, no hidden clone, one graph for every number of tokens."""

import re

import pytest
import torch

import moekit.torch as mt
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def generated(call, *args, dynamic=None) -> str:
    """What inductor generates for a call: the part that runs."""
    from torch._inductor.utils import run_and_get_code

    _, code = run_and_get_code(torch.compile(call, fullgraph=True, dynamic=dynamic), *args)
    return code[0][code[0].index("def call") : code[0].index("runner = ")]


def test_functions_become_one_operator_each(fused, params, tensors):
    face = mt.op(FUSIONS[fused])
    wanted = face(*tensors(fused), **params)
    calls = []

    def backend(graph, example):
        calls.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    got = torch.compile(lambda *xs: face(*xs, **params), fullgraph=True, backend=backend)(*tensors(fused))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert [str(c) for c in calls if "getitem" not in str(c)] == [f"moekit.{fused}.default"]


def test_in_place_clones_nothing(tensors):
    code = generated(lambda x, r, w: mt.add_rms_norm_(x, r, w)[0], *tensors("add_rms_norm"))
    assert code.count("moekit.add_rms_norm_.default(arg0_1, arg1_1, arg2_1") == 1
    assert not re.search(r"clone|copy_|cpp_fused|empty_strided", code)


def test_out_and_views_clone_nothing(tensors):
    (fused,) = tensors("silu_and_mul", sizes={"T": 4, "I": 32})
    buffer = torch.empty(4, 64)
    code = generated(lambda x, o: mt.silu_and_mul(x[:, 8:40], out=o[:, 32:48]), fused, buffer)
    assert "moekit.silu_and_mul.into(reinterpret_tensor(arg0_1, (4, 32), (64, 1), 8), reinterpret_tensor(" in code
    assert not re.search(r"clone|copy_|cpp_fused|empty_strided", code)


def test_transposed_operands_stay_transposed():
    code = generated(lambda x: mt.silu_and_mul(x.T), torch.randn(64, 4))
    assert "moekit.silu_and_mul.default(reinterpret_tensor(arg0_1, (4, 64), (1, 4), 0))" in code
    assert not re.search(r"clone|copy_|cpp_fused|empty_strided", code)


def test_results_with_out_and_in_place(tensors):
    x, residual, weight = tensors("add_rms_norm")
    wanted = mt.add_rms_norm(x, residual, weight)

    def block(x, residual, weight, buffer):
        mt.add_rms_norm_(x, residual, weight, out=buffer)
        return mt.add_rms_norm(x, residual, weight, out=torch.empty_like(x))

    buffer, updated = torch.empty_like(x), residual.clone()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x, updated, weight, buffer)
    torch.testing.assert_close((buffer, updated), wanted, rtol=0, atol=0)
    torch.testing.assert_close(got, mt.add_rms_norm(x, updated, weight), rtol=0, atol=0)


def test_one_graph_for_every_number_of_tokens():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda x, r, w: mt.add_rms_norm(x, r, w), fullgraph=True, dynamic=True, backend=counter)
    weight, compiled = torch.randn(32), []
    for tokens in (3, 4, 17, 300):
        x, residual = torch.randn(tokens, 32), torch.randn(tokens, 32)
        torch.testing.assert_close(call(x, residual, weight), mt.add_rms_norm(x, residual, weight))
        compiled.append(counter.frame_count)
    assert compiled in ([1] * 4, [2] * 4)  # torch 2.14 begins anew within the first call, with its floats as constants


@pytest.mark.usefixtures("smooth")
def test_gradients(fused, params, tensors):
    face = mt.op(FUSIONS[fused])
    grads = []
    for call in (face, torch.compile(face, fullgraph=True, backend="aot_eager")):
        operands = [x.requires_grad_(x.is_floating_point()) for x in tensors(fused)]
        outs = call(*operands, **params)
        outs = outs if isinstance(outs, tuple) else (outs,)
        sum(x.square().sum() for x in outs if x.is_floating_point()).backward()
        grads.append([x.grad for x in operands if x.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])


def test_gate_with_packed_weights():
    packed = mt.pack_gate(torch.randn(16, 32), torch.randn(10, 32), torch.randn(1, 32))

    def block(x):
        gate = mt.gate_gemm(x, packed)
        return mt.silu_and_mul(gate.gate_up), mt.topk_softmax(gate.router_logits, 4), gate.shared_gate

    x = torch.randn(5, 32)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, block(x))


def test_refusals_keep_their_sentence(tensors):
    x, residual, weight = tensors("add_rms_norm")
    call = torch.compile(lambda *xs: mt.add_rms_norm(*xs), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"residual has shape \[2, 24\]") as refused:
        call(x, residual[:2], weight)
    assert isinstance(refused.value, ShapeError | RuntimeError | torch._dynamo.exc.TorchDynamoException)
    with pytest.raises(Exception, match="the device decides; leave out implementation="):
        torch.compile(lambda *xs: mt.add_rms_norm(*xs, implementation="triton"), fullgraph=True, backend="eager")(
            x, residual, weight
        )


def test_tracing_and_exporting_see_operators(tensors):
    """make_fx on real tensors (a dispatch mode is active, the tensors are plain) and torch.export."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, residual, weight = tensors("add_rms_norm")
    traced = make_fx(lambda *xs: mt.add_rms_norm(*xs)[0])(x, residual, weight)
    assert next(n.target for n in traced.graph.nodes if n.op == "call_function") is torch.ops.moekit.add_rms_norm.default

    class Norm(torch.nn.Module):
        def forward(self, x, residual, weight):
            return mt.add_rms_norm(x, residual, weight)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    shapes = ({0: tokens}, {0: tokens}, None)
    exported = torch.export.export(Norm(), (x, residual, weight), dynamic_shapes=shapes)
    assert "moekit.add_rms_norm.default" in exported.graph_module.code
    more = torch.randn(9, 24), torch.randn(9, 24), weight
    torch.testing.assert_close(exported.module()(*more), mt.add_rms_norm(*more))
