"""Plots of result files, as SVG."""

from __future__ import annotations

from pathlib import Path

from bench.targets import OURS


def times(result: dict, path: Path, cases: tuple[str, ...] = ()) -> None:
    """Time against T, log-log: one panel per case, one line per side."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moekit"
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if "us" in r]
    names = [c for c in dict.fromkeys(r["case"] for r in rows) if not cases or c in cases]
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        here = [r for r in rows if r["case"] == name]
        for side in dict.fromkeys(r["side"] for r in here):
            points = sorted((r["T"], r["us"]) for r in here if r["side"] == side)
            ours = side in OURS
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=side, linewidth=2.4 if ours else 1,
                       color="black" if side == OURS[0] else None, zorder=3 if ours else 2)  # fmt: skip
        panel.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel="µs")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"{result['device']}, torch {result['versions'].get('torch', '')}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
