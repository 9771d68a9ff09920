"""Mutation testing of the compiler: faults planted in the lowering and both emitters, which numerical properties must find.

`TABLE` lists them, `EQUIVALENT` those that change no result, with the proof; `score` runs them, and `moekit mutants` prints the
kill rate.
"""

from moekit.testing.mutants.score import Outcome, hunt, mutate, score_all
from moekit.testing.mutants.table import EQUIVALENT, HISTORICAL, TABLE, Mutant

__all__ = ["EQUIVALENT", "HISTORICAL", "TABLE", "Mutant", "Outcome", "hunt", "mutate", "score_all"]
