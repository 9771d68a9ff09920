"""What the sides of packages that are not installed ask of them: stand-ins compute what the packages document, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import attention, attention_peers, experts, experts_peers
from bench.cases import CASES
from bench.correctness import Checker
from bench.sides import sides
from moekit.errors import UnavailableError
from moekit.testing import others

HIDDEN, EXPERTS, WIDTH, TOP_K = 256, 6, 128, 2


@pytest.fixture
def stand_in(monkeypatch):
    """Modules of these names, with what is given."""

    def put(**modules):
        known = {name.replace("__", "."): SimpleNamespace(**given) for name, given in modules.items()}
        monkeypatch.setattr(others, "module", known.__getitem__)

    return put


def layer():
    """Weights as experts.py draws them."""
    torch.manual_seed(1)
    gate_up, down = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / 16, torch.randn(EXPERTS, WIDTH, HIDDEN) / 16
    return experts.Layer(gate_up.bfloat16(), down.bfloat16())


def call(tokens=3):
    """Some rows and their experts."""
    torch.manual_seed(2)
    return experts.drawn(tokens, HIDDEN, EXPERTS, TOP_K, torch.bfloat16)


def wide(matrices, scale, block):
    """Codes times scales."""
    if scale is None:
        return matrices.double()
    spread = scale.double().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    return matrices.double() * spread[:, : matrices.shape[1], : matrices.shape[2]]


def fused(x, w1, w2, weights, ids, scales=(None, None), block=None):
    """The routed experts of w1 [E, 2I, H] and w2 [E, H, I]."""
    first, second = wide(w1, scales[0], block), wide(w2, scales[1], block)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for e, share in zip(ids[t].tolist(), weights[t].double(), strict=True):
            gate, up = (first[e] @ row).chunk(2)
            out[t] += share * (second[e] @ (torch.nn.functional.silu(gate) * up))
    return out.to(x.dtype)


def vllm_modules():
    """vLLM's two."""

    def fused_experts(x, w1, w2, weights, ids, quant_config=None):
        kind = quant_config or {"w1_scale": None, "w2_scale": None, "block_shape": None}
        return fused(x, w1, w2, weights, ids, (kind["w1_scale"], kind["w2_scale"]), kind["block_shape"])

    name = experts_peers.VLLM.replace(".", "__")
    config = {"fp8_w8a8_moe_quant_config": lambda **given: given}
    return {f"{name}__fused_moe": {"fused_experts": fused_experts}, f"{name}__config": config}


def sglang_modules():
    """SGLang's three; its settings must be there before its experts are called."""
    settings = []
    context = SimpleNamespace(override_server_args=lambda: SimpleNamespace(install=lambda: settings.append("installed")))

    def fused_experts(x, w1, w2, routed, config, use_fp8_w8a8=False, w1_scale=None, w2_scale=None, block_shape=None):
        assert settings == ["installed"]
        assert not config.inplace
        assert config.num_experts == config.num_local_experts == EXPERTS
        assert use_fp8_w8a8 == (w1_scale is not None)
        weights, ids, _ = routed
        return fused(x, w1.contiguous(), w2, weights, ids, (w1_scale, w2_scale), block_shape)

    name = experts_peers.SGLANG.replace(".", "__")
    return {
        f"{name}__triton_utils__fused_moe": {"fused_experts": fused_experts},
        "sglang__srt__runtime_context": {"get_context": lambda: context},
        name: {"MoeRunnerConfig": lambda **given: SimpleNamespace(**given)},
    }


def triton_kernels_modules():
    """vLLM's adapter: pairs in the order of their experts, columns of gate and up in turn, weights [E, K, N]."""

    def routing(ids, weights, count):
        order = torch.argsort(ids.flatten(), stable=True)
        routed = SimpleNamespace(experts=ids.flatten()[order], gate_scal=weights.flatten()[order], top_k=ids.shape[1])
        assert int(ids.max()) < count
        return routed, order, order

    def matmul_ogs(x, w, bias, routed, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None):
        rows = x.double() if gather_indx is None else x.double()[gather_indx // routed.top_k]
        each = torch.einsum("pk,pkn->pn", rows, w.double()[routed.experts.long()])
        if fused_activation is not None:
            specs, _, columns = fused_activation
            assert specs[0] == "silu_and_mul"
            assert columns == 2
            gate, up = each.view(len(each), -1, 2).unbind(-1)
            each = torch.nn.functional.silu(gate) * up
        if gammas is not None:
            each *= gammas[:, None]
        if scatter_indx is None:
            return each.to(x.dtype)
        return torch.zeros_like(each).index_copy_(0, scatter_indx, each).view(-1, routed.top_k, w.shape[2]).sum(1).to(x.dtype)

    own = {"matmul_ogs": matmul_ogs, "make_routing_data": routing}
    own |= {"FnSpecs": lambda *given: given, "FusedActivation": lambda *given: given}
    return {f"{experts_peers.VLLM.replace('.', '__')}__experts__gpt_oss_triton_kernels_moe": own}


MODULES = {"vllm": vllm_modules, "sglang": sglang_modules, "triton_kernels": triton_kernels_modules}


@pytest.fixture(autouse=True)
def anew():
    """What is kept of a package once it is loaded is forgotten."""
    yield
    experts_peers._sglang.cache_clear()
    attention_peers._planned.cache_clear()
    attention_peers._workspace.cache_clear()


@pytest.mark.parametrize("name", experts_peers.DENSE)
def test_experts_get_weights_in_their_own_order(name, stand_in):
    stand_in(**MODULES[name]())
    given = layer()
    assert experts.relative(given, call(), experts_peers.DENSE[name](given)(call())) < 0.01


@pytest.mark.parametrize("name", experts_peers.FLOAT8)
def test_float8_experts_get_the_scales(name, stand_in):
    stand_in(**MODULES[name]())
    torch.manual_seed(3)
    given = experts.Scaled.drawn(EXPERTS, WIDTH, HIDDEN)
    assert experts.relative(given, call(), experts_peers.FLOAT8[name](given)(call())) < 0.01


@pytest.mark.parametrize("name", experts_peers.FLOAT8)
def test_halves_that_fill_no_block_are_refused(name, stand_in):
    """Where I = 64 gate and up have scales of their own, and a package would have one for both."""
    stand_in(**MODULES[name]())
    with pytest.raises(UnavailableError, match="64 of gate and 64 of up do not fill"):
        experts_peers.FLOAT8[name](experts.Scaled.drawn(2, 64, HIDDEN))


def test_three_products_are_the_two():
    """Gate and up apart."""
    given = layer()
    halves = [half.contiguous() for half in given.gate_up.chunk(2, 1)]
    out = experts.grouped(halves, given.down, call())
    assert experts.relative(given, call(), out) < 0.01


def test_what_is_not_installed_is_a_row_that_says_so():
    """In every bench that has such a side."""
    found = experts.measure(16, 2, "float32", (16,), 1, small=True)
    said = {r["side"]: r["problem"] for r in found if "problem" in r}
    missing = {side for side in experts_peers.DENSE if not others.installed("vllm" if side == "triton_kernels" else side)}
    assert {side for side, problem in said.items() if "is not installed" in problem} == missing
    assert {r["side"] for r in found} >= set(experts_peers.DENSE)
    if not others.installed("flashinfer"):
        rows = attention.measure(1, 1, 20, 20, "float32", 1)
        said = {r["side"]: r["problem"] for r in rows if "problem" in r}
        assert said == dict.fromkeys(attention_peers.SIDES, "UnavailableError: flashinfer is not installed")


@pytest.mark.parametrize(("length", "page"), [(32, 16), (33, 16), (5, 16), (100, 64)])
def test_pages_hold_the_cache_in_order(length, page):
    cache = torch.randn(3, 2, 128, 4)
    pages, count = attention_peers._pages(cache, length, page), -(-length // page)
    assert pages.shape == (3 * count, 2, page, 4)
    assert pages.is_contiguous()
    for b, t in np.ndindex(3, count * page):
        want = cache[b, :, t] if t < length else torch.zeros(2, 4)
        assert torch.equal(pages[b * count + t // page, :, t % page], want)


def unpaged(pages, tables, length):
    """Pages [P, heads, page, D] as [T, heads, length, D]."""
    return pages[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :length]


def attended(q, keys, values, scale):
    """q [T, heads·group, D] over [T, heads, L, D], heads next to each other that share a key."""
    shape = keys.shape[0], keys.shape[1], -1, keys.shape[3]
    scores = q.double().view(shape) @ keys.double().transpose(2, 3) * scale
    return (scores.softmax(-1) @ values.double()).flatten(1, 2).to(q.dtype)


class Wrapper:
    """`BatchDecodeWithPagedKVCacheWrapper`."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "HND"
        assert workspace.dtype == torch.uint8

    def plan(self, first, numbers, last, query_heads, heads, depth, page, sm_scale, q_data_type, kv_data_type):
        counts = first.diff()
        assert len(set(counts.tolist())) == 1
        assert query_heads == 8 * heads
        assert len(numbers) == first[-1]
        assert first.device.type == last.device.type == "cpu"
        self.tables, self.scale = numbers.view(len(counts), -1), sm_scale
        self.length = int((counts[0] - 1) * page + last[0])

    def run(self, q, cache, out):
        keys, values = (unpaged(pages, self.tables, self.length) for pages in cache)
        return out.copy_(attended(q, keys, values, self.scale))


def trtllm(q, cache, workspace, tables, lengths, most, bmm1_scale, out, backend):
    """`trtllm_batch_decode_with_kv_cache`."""
    assert backend == "xqa"
    assert not workspace.any()
    assert lengths.tolist() == [most] * len(q)
    keys, values = (unpaged(pages, tables, most) for pages in cache)
    return out.copy_(attended(q, keys, values, bmm1_scale))


@pytest.mark.parametrize("side", attention_peers.SIDES)
@pytest.mark.parametrize("length", [16, 70])
def test_attention_gets_pages_and_a_plan(side, length, stand_in):
    wrapper = {"BatchDecodeWithPagedKVCacheWrapper": Wrapper, "trtllm_batch_decode_with_kv_cache": trtllm}
    stand_in(flashinfer__decode=wrapper)
    torch.manual_seed(4)
    given = attention.drawn(3, 2, length, 80, torch.bfloat16)
    assert attention.relative(given, length, attention.SIDES[side](given, length)()) < 0.01


def delta(q, k, v, state, A_log, a, dt_bias, b, scale, out, use_qk_l2norm):
    """`gated_delta_rule_decode_pretranspose`: tensors [T, 1, …] and a state [T, V, Dv, Dk], in place."""
    assert use_qk_l2norm
    assert state.is_contiguous()
    share = v.shape[2] // q.shape[2]
    wide_q, wide_k = (x[:, 0].double().repeat_interleave(share, 1) for x in (q, k))
    wide_q, wide_k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (wide_q, wide_k))
    decay = (-A_log.double().exp() * torch.nn.functional.softplus(a[:, 0].double() + dt_bias.double())).exp()
    held = state.double() * decay[..., None, None]
    new = (v[:, 0].double() - torch.einsum("tvek,tvk->tve", held, wide_k)) * b[:, 0].double().sigmoid()[..., None]
    held += torch.einsum("tve,tvk->tvek", new, wide_k)
    state.copy_(held)
    out[:, 0] = torch.einsum("tvek,tvk->tve", held, wide_q) * scale


@pytest.mark.parametrize("side", ["flashinfer", "flashinfer, bfloat16 state"])
def test_the_delta_rule_gets_its_own_state(side, stand_in):
    """In bfloat16 the state is rounded, and so is what is read from it."""
    stand_in(flashinfer__gdn_decode={"gated_delta_rule_decode_pretranspose": delta})
    torch.manual_seed(5)
    case = CASES["delta_rule_step 2/4"]
    found = Checker(case, case.make(3, torch.bfloat16))(lambda o: sides(case, compiled=False)[side](o)())
    assert found["relative"] < 0.005
    assert (found["error"] <= 1) == (side == "flashinfer")
