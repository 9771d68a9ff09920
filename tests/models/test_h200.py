"""The decode step compiled for eight virtual H200s: what stands between the kernels in the optimised program."""

import json
import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.model_jax import FLOAT8, WIDTHS
from moekit.compat import release
from moekit.jax import Link, View
from moekit.jax.doors import DOORS
from moekit.models.qwen3next import abstract_model, cache_shapes, greedy_step, moe, prefill
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.kernels import FUSIONS, named

DATA = Path(__file__).parents[1] / "data"
H200 = (DATA / "h200.textproto").read_text()
LIMITS = json.loads((DATA / "limits.json").read_text())["jax, eight h200"]
BATCH, ROOM, TP = 4, 1024, 8
REDUCE = "kCollectiveKernel"  # an all-reduce among what is launched
REDUCES_IN_BUFFERS = release(jax.__version__) >= (0, 12)
CONFIG = replace(WIDTHS, vocab_size=151936, layer_types=(GDN, ATTENTION))  # two layers of Qwen3-Next-80B-A3B
CHANNELS, HEADS = 1024, 4  # of one rank: convolution channels, value heads
WIDTH = CHANNELS + 128 * HEADS + 128  # q | k | v | z | b | a, which is of whole heads
COLUMNS = 256 * (2 * 2 + 2)  # q and gate of two heads, k, v


@dataclass(frozen=True)
class Instruction:
    """One line of an HLO computation; `at` is its place in the schedule."""

    at: int
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def fusion(self) -> str | None:
        """The moekit fusion that this kernel call serves."""
        if self.opcode != "custom-call" or "triton" not in self.text:
            return None
        name = re.search(r'op_name="[^"]*?/(\w+)/(?:pallas|triton)_call', self.text).group(1)
        return max((fusion for fusion in FUSIONS if name.startswith(fusion)), key=len)  # it may be one of several launches


class Program:
    """The entry computation of a compiled module, in scheduled order, and the bodies of the others.

    `buffers`: what each command buffer launches, by name; `outside`: what is launched in none; `blocks`: what is launched in
    buffers between two all-reduces, wherever these are.
    """

    def __init__(self, lowered):
        with tempfile.TemporaryDirectory() as folder:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
            (thunks,) = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
            self.buffers, self.outside = launched(thunks.read_text())
        self.blocks = [block for buffer in self.buffers for block in between(buffer, REDUCE)]
        self.text = compiled.as_text()
        assert "is_scheduled=true" in self.text.splitlines()[0]
        self.bodies = dict(re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}", self.text, re.M | re.S))
        entry = re.search(r"^ENTRY %([\w.\-]+)", self.text, re.M).group(1)
        self.entry = {}
        for at, line in enumerate(self.bodies[entry].splitlines()):
            found = instruction(at, line)
            self.entry[found.name] = found

    def kernels(self, fusion):
        """The kernel calls that write a fusion's outputs, not those that leave partial results to a second launch."""
        calls = [i for i in self.entry.values() if i.fusion == fusion]
        read = {self.producer(operand).name for call in calls for operand in call.operands}
        return [call for call in calls if call.name not in read]

    def producer(self, name):
        """The instruction that computes an operand; a bitcast only renames its shape."""
        found = self.entry[name]
        while found.opcode in ("bitcast", "get-tuple-element"):
            found = self.entry[found.operands[0]]
        return found

    def moves(self, found):
        """Whether an instruction does nothing but move data: a slice, a copy, or a fusion of such."""
        moving = {"slice", "copy", "dynamic-slice", "transpose", "concatenate", "pad", "copy-done", "slice-done"}
        if found.opcode != "fusion":
            return found.opcode in moving
        called = self.bodies[re.search(r"calls=%([\w.\-]+)", found.text).group(1)]
        opcodes = {instruction(0, line).opcode for line in called.splitlines()}
        return bool(opcodes & moving) and opcodes <= moving | {"parameter", "bitcast", "tuple"}

    def users(self, name):
        """Whatever reads an instruction's value, through bitcasts and tuples as well."""
        for found in self.entry.values():
            if name in found.operands:
                yield found
                if found.opcode in ("bitcast", "get-tuple-element", "tuple", "opt-barrier"):
                    yield from self.users(found.name)


def launched(thunks):
    """The launches of each command buffer and of none, from XLA's list of what the host does; waiting is no launch."""
    buffers, outside, current = [], [], []
    for indent, kind, name in re.findall(r"^( *)\d+: (k\w+) +\[[^\]]*\] *(\S*)", thunks, re.M):
        if not indent:
            current = [] if kind == "kCommandBuffer" else outside
            buffers += [current] if kind == "kCommandBuffer" else []
        if kind not in ("kCommandBuffer", "kAsyncStart", "kAsyncDone"):
            current.append(name)
    return buffers, outside


def between(launches, name):
    """The launches before, between and after those of a name."""
    found = [[]]
    for one in launches:
        if one == name:
            found.append([])
        else:
            found[-1].append(one)
    return found


def instruction(at, line):
    found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
    name, shape, opcode, rest = found.groups()
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
    return Instruction(at, name, re.sub(r"/\*.*?\*/|\{[^}]*\}", "", shape), opcode, operands, line)


def arguments(layer_types=CONFIG.layer_types):
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x8").devices
    mesh = Mesh(np.array(devices).reshape(TP), ("tp",))
    config = replace(CONFIG, layer_types=layer_types)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=NamedSharding(mesh, P()))
    return mesh, abstract_model(config, mesh, "bfloat16"), tokens


@cache
def compiled_step(kernels, layer_types=CONFIG.layer_types):
    mesh, model, tokens = arguments(layer_types)
    with jax.set_mesh(mesh):
        cache = cache_shapes(model.config, mesh, BATCH, ROOM, jnp.bfloat16)
        return Program(greedy_step.lower(model, tokens, cache, kernels=kernels))


@pytest.fixture(scope="module", params=DOORS)
def program(request):
    """The step with moekit's kernels."""
    return compiled_step(request.param)


# fusion -> the operands that are Views, and for each the shape in which its base was produced
VIEWED = {
    "causal_conv1d_step": {0: f"bf16[{BATCH},{WIDTH}]"},
    "delta_rule_step": {0: f"(bf16[1,{BATCH},3,{CHANNELS}], bf16[{BATCH},{CHANNELS}])", 1: f"bf16[{BATCH},{WIDTH}]"},
    "qkv_norm_rope": {0: f"bf16[{BATCH},{COLUMNS}]"},
    "gated_rms_norm": {1: f"bf16[{BATCH},{WIDTH}]"},
}


def wrong_operands(program):
    """Each operand of a kernel that was moved on its way there, or a View that is not its whole base."""
    wrong = []
    for found in program.entry.values():
        if found.fusion is None:
            continue
        for i, operand in enumerate(found.operands):
            source = program.producer(operand)
            if program.moves(source):
                wrong.append(f"{found.fusion}: operand {i} is {source.opcode} {source.name}")
        for i, shape in VIEWED.get(found.fusion, {}).items():
            source = program.producer(found.operands[i])
            if source.shape != shape:
                wrong.append(f"{found.fusion}: operand {i} was produced as {source.shape}, not {shape}")
    return wrong


def test_the_launches_of_each_block(program):
    """A block is what stands between two all-reduces: moekit's kernels as listed, no more launches than stated."""
    mixers = {GDN: "gated delta net", ATTENTION: "attention"}
    blocks = [name for layer in CONFIG.layer_types for name in (mixers[layer], "moe")] + ["head"]
    assert len(program.buffers) == (1 if REDUCES_IN_BUFFERS else len(blocks))
    for name, launches in zip(blocks, program.blocks, strict=True):
        limit = LIMITS[name]
        named = (re.sub(r"__\d+$", "", n) for n in launches if n.startswith(FUSIONS))  # norms read other rows: XLA numbers them
        assert sorted(named) == sorted(limit["moekit"]), name
        assert len(launches) <= limit["launches"], f"{name}: {launches}"


def test_everything_else_is_inside_command_buffers(program):
    """Outside are the gather of the best tokens and what little follows it, and to jax 0.11 an all-reduce after each block."""
    outside = Counter("kernel" if not name.startswith("k") else name for name in program.outside)
    assert outside.pop(REDUCE, 0) == (0 if REDUCES_IN_BUFFERS else 2 * CONFIG.num_layers)
    assert sum(buffer.count(REDUCE) for buffer in program.buffers) == (2 * CONFIG.num_layers if REDUCES_IN_BUFFERS else 0)
    assert outside.pop("kAllGather") == 1
    assert outside.pop("kernel") <= LIMITS["kernels outside"]["launches"]
    assert not outside


def test_the_launches_are_counted_by_kind():
    thunks = """000: kCommandBuffer [source        | next=013 (1)]
    001: kCustomKernel [source       | next=003 (2)] gate_projections_partial grid: [64, 1, 1]
    002: kCopy         [source       | next=006 (1)] kCopy
003: kAsyncStart    [prev=000 (1)  | next=000 (2)] stream=computation_stream[0], async_id=13
    004: kCollectiveKernel [source | sink] kCollectiveKernel
005: kAsyncDone     [source        | sink        ] async_id=13
006: kCustomKernel  [prev=069 (1)  | next=071 (1)] loop_reduce_fusion grid: [1, 1, 1]
"""
    assert launched(thunks) == ([["gate_projections_partial", "kCopy"]], ["kCollectiveKernel", "loop_reduce_fusion"])
    assert between("abcbb", "b") == [["a"], ["c"], [], []]


def test_every_view_is_the_producing_instruction_itself(program):
    assert wrong_operands(program) == []
    gates = {i.name for i in program.kernels("gate_topk")}
    launches = [i for i in program.entry.values() if i.fusion == "expert_down_shared"]
    assert launches
    for first, last in zip(launches[::2], launches[1::2], strict=True):
        assert {program.producer(first.operands[0]).name, program.producer(last.operands[3]).name} <= gates  # activated, share
        assert program.producer(first.operands[2]).fusion == "expert_gate_up"


@pytest.mark.parametrize("fusion", ["gate_topk", "delta_rule_step"])
def test_one_slice_more_is_noticed(fusion):
    """The same step, but one kernel is given a slice of the base as an array of its own."""
    kernels = named("pallas")

    def sliced(*operands, **options):
        arrays = [x.array() if isinstance(x, View) else x for x in operands]
        return getattr(kernels, fusion)(*arrays, **options)

    worse = compiled_step(replace(kernels, **{fusion: sliced}), CONFIG.layer_types[:1])
    found = wrong_operands(worse)
    assert found
    assert all(line.startswith(f"{fusion}: operand ") for line in found)
    counts = zip(("gated delta net", "moe", "head"), worse.blocks, strict=True)
    assert any(len(launches) > LIMITS[name]["launches"] for name, launches in counts)


def test_no_logits_are_written_where_few_tokens_are_routed(program):
    """Of what the router's last launch writes nothing is as wide as there are experts, and it is done before they run."""
    runs = sorted(i.at for i in program.kernels("expert_gate_up"))
    routers = sorted(program.kernels("gate_topk"), key=lambda i: i.at)
    assert len(routers) == len(runs) == CONFIG.num_layers
    for router, run in zip(routers, runs, strict=True):
        assert str(CONFIG.num_experts) not in router.shape
        assert router.at < run


def test_one_all_reduce_after_each_block_and_one_small_gather(program):
    counts = Counter(re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\(", program.text))
    assert counts == {"all-reduce": 2 * CONFIG.num_layers, "all-gather": 1}
    reduced = re.findall(r"= (\S+?)(?:\{[^}]*\})? all-reduce\(", program.text)
    assert set(reduced) == {f"bf16[{BATCH},2048]"}
    assert re.findall(r"= (\S+?)(?:\{[^}]*\})? all-gather\(", program.text) == [f"f32[{TP},2,{BATCH}]"]


def test_the_recurrent_state_and_the_keys_and_values_stay_where_they_are(program):
    """The donated cache is the new cache, and no state, weight or cache is copied whole."""
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", program.text).group(1)
    assert aliases.count("may-alias") == 5  # convolution, recurrent state, keys, values, lengths
    sizes = {"copy": 0, "fusion": 0}
    for found in program.entry.values():
        if found.opcode in sizes and program.moves(found):
            dims = re.search(r"\[([\d,]*)\]", found.shape).group(1)
            sizes[found.opcode] = max(sizes[found.opcode], int(np.prod([int(d) for d in dims.split(",") if d])))
    assert max(sizes.values()) <= BATCH * CHANNELS * 3  # the window of the convolution, at most


def test_layers_share_their_kernels_and_few_arrays_are_handed_over():
    """Eight layers: two arrays of weights each, the rest stacked, as states are, and no kernel more than two layers have.

    No weight, state or key is sliced or copied on its way to a product or a kernel.
    """
    found, few = compiled_step("pallas", CONFIG.layer_types * 4), compiled_step("pallas")
    arrays = len([i for i in found.entry.values() if i.opcode == "parameter"])
    assert arrays == LIMITS["arrays"]["a layer"] * 8 + LIMITS["arrays"]["keys and values"] * 4 + LIMITS["arrays"]["others"]
    distinct = [Counter(fusion for fusion, _ in set(kernel_bodies(p))) for p in (found, few)]
    assert distinct[0] == distinct[1]
    assert distinct[0].pop("add_rms_norm") == 3  # before a mixer, before the experts, at the end
    assert set(distinct[0].values()) == {1, 2}  # two where a fusion has two launches
    assert not [i for i in found.entry.values() if i.opcode in ("copy", "slice", "dynamic-slice", "fusion") and found.moves(i)]


def kernel_bodies(program):
    """The compiled text of each of moekit's kernels: those that are one to the compiler."""
    for found in program.entry.values():
        if found.fusion is not None:
            yield found.fusion, re.search(r"backend_config=(.*)", found.text).group(1)


def test_a_prompt_reads_no_expert_that_was_not_chosen():
    """Experts are read by kernels alone, in place, and of each token no more is ever held than the experts that it chose."""
    mesh, model, lengths = arguments()
    tokens = jax.ShapeDtypeStruct((BATCH, 512), jnp.int32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        filled = Program(prefill.lower(model, tokens, lengths, cache_length=ROOM, kernels="pallas"))
    of_steps = {"causal_conv1d_step", "delta_rule_step", "qkv_norm_rope", "gated_attention_decode"}
    of_steps |= {"gate_topk", "conv_projections", "expert_gate_up", "expert_down_shared"}
    of_steps |= {"row_product", "add_norm_gate_projections"}
    assert "triangular" not in filled.text  # the delta rule solves nothing row by row
    products = re.findall(r" dot\(.*?algorithm=(\w+)", filled.text)
    assert products
    assert set(products) == {"dot_bf16_bf16_f32_x3"}  # none of float32 by the vector unit
    others = {name for name in FUSIONS if name.startswith(("scaled_", "quantised"))}  # of float8
    assert set(FUSIONS) - {i.fusion for i in filled.entry.values()} == of_steps | others
    assert len(re.findall(r" all-reduce(?:-start)?\(", filled.text)) == 2 * CONFIG.num_layers
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?!parameter|bitcast|get-tuple-element)", filled.text)
    most = max(int(np.prod([int(d) for d in dims.split(",")])) for dims in made)
    assert most <= BATCH * 512 * CONFIG.num_experts_per_tok * CONFIG.hidden_size
    assert most < math.prod(model.params["layers"].down[0].shape) // TP


@pytest.mark.parametrize("tokens", [1, 4, 16, 51])
@pytest.mark.parametrize("width", [512, 64])
def test_experts_are_multiplied_while_they_are_gathered(tokens, width):
    """Few tokens, all of an expert and one of 8 ranks' share: XLA, too, stores much less than the weights that it reads."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    mesh = Mesh(np.array(devices).reshape(1), ("tp",))
    config = replace(CONFIG, moe_intermediate_size=width)
    shapes, kinds = ((tokens, 2048), (tokens, 10), (tokens, 10)), (jnp.bfloat16, jnp.float32, jnp.int32)
    given = [jax.ShapeDtypeStruct(s, k, sharding=NamedSharding(mesh, P())) for s, k in zip(shapes, kinds, strict=True)]
    layers = abstract_model(config, mesh, "bfloat16").params["layers"]

    def first(x, chosen, ids, layers):
        return moe.experts(x, chosen, ids, layers[0], named("xla"))

    with jax.set_mesh(mesh):
        text = jax.jit(first).lower(*given, layers).compile().as_text()
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?!parameter)", text[text.index("ENTRY") :])
    assert max(int(np.prod([int(d) for d in dims.split(",")])) for dims in made) <= tokens * 10 * 2048


def test_a_step_whose_ranks_send_packets_adds_up_nowhere_else(monkeypatch):
    """With a link each all-reduce is one kernel with the norm behind it, and the ranks' best tokens come by one, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # which it is not where this is lowered
    mesh, model, tokens = arguments(CONFIG.layer_types[:1])
    spread = NamedSharding(mesh, P("tp"))
    table, epochs = (jax.ShapeDtypeStruct((TP * n,), jnp.int32, sharding=spread) for n in (4 * TP + 4, 16))
    link = Link(table, epochs, "tp", TP, 16, 2048, 132)
    with jax.set_mesh(mesh):
        cache = cache_shapes(model.config, mesh, BATCH, ROOM, jnp.bfloat16)
        text = greedy_step.lower(model, tokens, cache, kernels="pallas", link=link).as_text()
    assert not re.findall(r"stablehlo\.(all_reduce|all_gather|reduce_scatter|collective_\w+)", text)
    assert len(re.findall(r"call @added\w*\(|name = \"added\"", text)) == 1
    assert len(re.findall(r"call @all_reduce_add_rms_norm\w*\(|name = \"all_reduce_add_rms_norm\"", text)) >= 2


def test_a_step_of_float8_weights_reads_them_in_place():
    """Experts, projections and scales go to kernels as they lie: nothing is moved."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x8").devices
    mesh, config = Mesh(np.array(devices).reshape(TP), ("tp",)), replace(CONFIG, float8=FLOAT8)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        cache = cache_shapes(config, mesh, BATCH, ROOM, jnp.bfloat16)
        found = Program(greedy_step.lower(abstract_model(config, mesh, "bfloat16"), tokens, cache, kernels="pallas"))
    called = Counter(i.fusion for i in found.entry.values() if i.fusion)
    assert called["scaled_expert_gate_up"] == config.num_layers
    assert called["scaled_expert_down_shared"] == 2 * config.num_layers  # launches
    assert len(found.kernels("scaled_product")) == 2 * config.num_layers - 1
    assert len(found.kernels("scaled_conv_projections")) == 1  # a delta net's projections and its convolution
    assert called["scaled_gate_topk"] == 2 * config.num_layers  # launches
    assert not {"gate_topk", "down_combine", "scaled_down_combine", "causal_conv1d_step"} & {*called}
    assert not [i for i in found.entry.values() if i.opcode in ("copy", "slice", "dynamic-slice", "fusion") and found.moves(i)]
