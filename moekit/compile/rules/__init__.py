"""Rules: what chooses directives for a graph. One file per kind of graph; cost.py says what a schedule costs."""

from moekit.compile.rules.choose import class_axis, heuristic, row_classes, spread

__all__ = ["class_axis", "heuristic", "row_classes", "spread"]
