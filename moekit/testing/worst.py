"""The worst error ratios that campaigns have seen, by fusion: what the constants of the numerics contract are held to."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.files import read_json, write_text
from moekit.testing.campaign import Plan
from moekit.testing.coverage import Coverage

FILE = Path(__file__).parent / "worst.json"


def worst_seen(path: Path = FILE) -> dict[str, dict[str, Any]]:
    """For every fusion the worst ratio, and the implementation, device and command that gave it."""
    return read_json(path) if path.exists() else {}


def record_worst(path: Path, coverage: Mapping[str, Coverage], plan: Plan) -> None:
    """Take the ratios of a campaign into the file where they are worse than what it has."""
    kept = worst_seen(path)
    for implementation, seen in coverage.items():
        where = _device() if implementation in plan.accelerated else "CPU"
        for fusion, ratio in seen.worst.items():
            if ratio > kept.get(fusion, {"ratio": 0.0})["ratio"]:
                kept[fusion] = {"ratio": round(ratio, 4), "implementation": implementation, "device": where,
                                "command": " ".join(["moekit", *sys.argv[1:]])}  # fmt: skip
    write_text(path, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def _device() -> str:
    from moekit.cli.platform import gpus

    found = gpus()
    return found[0].name if found else "GPU"
