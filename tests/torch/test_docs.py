"""The Python of docs/torch.md runs, and its table names what there is."""

import re
from pathlib import Path

import moekit.torch as mt
from moekit.fusions import FUSIONS

TEXT = (Path(__file__).parents[2] / "docs" / "torch.md").read_text()


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(snippets) == 4
    names: dict = {}  # a later one may use what an earlier one made
    for snippet in snippets[:3]:
        exec(snippet.replace('{"H": 2048, "I": 512}', '{"T": 1, "H": 64, "I": 32}'), names)


def test_every_fusion_is_in_the_table():
    for name, fusion in FUSIONS.items():
        assert f"| `{name}({', '.join(fusion.signature.parameters)})" in TEXT
        if f"{name}_" in mt.__all__:
            assert f"`{name}_`" in TEXT
