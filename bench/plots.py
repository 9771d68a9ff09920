"""Plots of result files, as SVG."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.parts import EXPERTS, PARTS, least, spent
from bench.targets import OURS

# Okabe and Ito's colours, which can be told apart by everyone. A part keeps its colour in every bar.
COLOURS = dict(zip(PARTS, ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7"), strict=True))
LINES = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C564B", "#9467BD", "#BCBD22", "#17BECF",
         "#1B7837", "#B2182B", "#999999", "#5E3C99")  # fmt: skip
DASHES = dict(zip(OURS, ("-", "--"), strict=True))  # moekit is black, in all its forms


def times(result: dict, path: Path, cases: tuple[str, ...] = (), relative: bool = False) -> None:
    """Time against T, log-log: one panel per case, one line per side, a side in the same colour in every panel.

    relative: not µs, but every time over that of the fastest of moekit's forms at the same T.
    """
    rows = [r for r in result["rows"] if "us" in r]
    names = [c for c in dict.fromkeys(r["case"] for r in rows) if not cases or c in cases]
    if not names:
        return
    plt = _pyplot()
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines + 0.8), squeeze=False)
    sides = dict.fromkeys(r["side"] for r in rows if r["case"] in names)
    colours = dict(zip((s for s in sides if s not in OURS), cycle(LINES)))
    drawn = {}
    for panel, name in zip(panels.flat, names, strict=False):
        here = [r for r in rows if r["case"] == name]
        units = {t: _unit(here, t) if relative else 1.0 for t in {r["T"] for r in here}}
        for side in dict.fromkeys(r["side"] for r in here):
            points = sorted((r["T"], r["us"] / units[r["T"]]) for r in here if r["side"] == side)
            ours = side in OURS
            (drawn[side],) = panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=2.2 if ours else 1.2,
                color=colours.get(side, "black"), linestyle=DASHES.get(side, "-"), zorder=3 if ours else 2)  # fmt: skip
        label = "time over moekit's fastest" if relative else "µs"
        panel.set(xscale="log", yscale="log", title=name, xlabel="tokens", ylabel=label)
        _plain(panel, sorted(units), [r["us"] / units[r["T"]] for r in here])
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    figure.suptitle(f"{result['device']}, {_versions(result, ('moekit', 'torch', 'triton'))}", fontsize=10)
    handles = [drawn[side] for side in sorted(drawn, key=lambda side: side not in OURS)]
    labels = sorted(drawn, key=lambda side: side not in OURS)
    figure.legend(handles, labels, loc="lower center", ncols=2 * columns - 1, fontsize=8, frameon=False)
    _save(figure, path, room=0.8 / (3.6 * lines + 0.8))


def _unit(rows: Sequence[dict], tokens: int) -> float:
    """The time of the fastest of moekit's forms at T; where there is none, of the fastest side."""
    here = [r for r in rows if r["T"] == tokens]
    return min(r["us"] for r in [r for r in here if r["side"] in OURS] or here)


def steps(result: dict, path: Path) -> None:
    """Where a step goes: a panel per number of sequences; a bar per kind of kernels and one of the floor, cut into parts.

    A dash above a bar is what the step takes in a stream, by the host's clock: what is between them is no kernel's.
    """
    rows = [r for r in result["rows"] if "ms" in r and "by name" in r and "without" not in r["side"]]
    batches = sorted({r["T"] for r in rows})
    if not batches:
        return
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(batches), figsize=(max(6.5, 3.4 * len(batches)), 5.8), squeeze=False)
    for panel, batch in zip(panels.flat, batches, strict=True):
        _bars(panel, batch, [r for r in rows if batch == r["T"]])
    devices = rows[0].get("tp", 1)
    device = f"{devices} × {result['device']}" if devices > 1 else result["device"]
    title = f"Qwen3-Next-80B, {rows[0]['case']}, {device}\n{_versions(result, ('moekit', 'jax'))}"
    figure.suptitle(title, fontsize=11)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in PARTS)
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="lower center", bbox_to_anchor=(0.5, 0.04),
                  ncols=min(3, max(2, len(batches))), fontsize=8.5, frameon=False)  # fmt: skip
    if any(not spent(r)[EXPERTS] for r in rows):
        figure.text(0.5, 0.02, "* without kernels of their own, the routed experts are among XLA's", ha="center", fontsize=8.5)
    _save(figure, path, room=0.2)


def _bars(panel: Any, batch: int, rows: Sequence[dict]) -> None:
    """One panel of `steps`: under each bar its sum, above it the step's time in a stream."""
    bars = {r["side"]: spent(r) for r in rows} | {"floor": least(rows[0])}
    places, below = range(len(bars)), [0.0] * len(bars)
    for name in PARTS:
        heights = [bar[name] for bar in bars.values()]
        panel.bar(places, heights, 0.62, bottom=below, label=name, color=COLOURS[name], edgecolor="white", linewidth=0.6)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    streams = [r["ms"] for r in rows]
    ends = [[place + half for place in range(len(rows))] for half in (-0.38, 0.38)]
    panel.hlines(streams, *ends, color="black", linewidth=1.6, label="the step in a stream, host's clock")
    for place, ms in enumerate(streams):
        where = ms, max(ms, below[place])
        panel.annotate(f"{where[0]:.2f}", (place, where[1]), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    marks = ["" if bar[EXPERTS] else "*" for bar in bars.values()]
    panel.set_xticks(places, [f"{n}{m}\n{ms:.2f}" for n, m, ms in zip(bars, marks, below, strict=True)])
    top = max(below + streams)
    panel.set(ylabel="ms a step", title=f"{batch} sequence{'s' * (batch > 1)}", ylim=(0, 1.1 * top))
    panel.ticklabel_format(axis="y", style="plain", useOffset=False)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def _plain(panel: Any, tokens: Sequence[int], values: Sequence[float]) -> None:
    """Numbers as one writes them on both axes: the tokens that were measured, and a few values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panel.xaxis.set_major_locator(FixedLocator(tokens))
    each = (1, 2, 5) if max(values) > 20 * min(values) else (1, 1.5, 2, 3, 5, 7)
    panel.yaxis.set_major_locator(FixedLocator([n * 10**e for e in range(-1, 6) for n in each]))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e5 else f"{x:.0f}"))
    panel.tick_params(axis="x", labelrotation=30 if len(tokens) > 6 else 0)
    panel.set_ylim(min(values) / 1.3, max(values) * 1.3)


def _versions(result: dict, packages: Sequence[str]) -> str:
    return ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moekit"  # the same plot is the same file
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path, room: float = 0.0) -> None:
    """Write a figure and let go of it; `room`: the share of its height that is kept for a legend below."""
    import matplotlib.pyplot as plt

    figure.tight_layout(rect=(0, room, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
