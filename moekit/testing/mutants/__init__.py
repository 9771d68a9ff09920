"""Mutation testing of the compiler: faults planted in the lowering and both emitters, which numerical properties must find.

`TABLE` lists them, `EQUIVALENT` those that change no result, with the proof; `score` runs them, and `moekit mutants` prints the
kill rate.
"""

from moekit.testing.mutants.score import Outcome, mutate, score_all, try_mutant
from moekit.testing.mutants.table import EQUIVALENT, HISTORICAL, TABLE, Mutant

__all__ = ["EQUIVALENT", "HISTORICAL", "TABLE", "Mutant", "Outcome", "mutate", "score_all", "try_mutant"]
