"""Every rule of the tile IR refuses the programs that break it, and no good program."""

import break_loops  # noqa: F401  (each notes its programs)
import break_memory  # noqa: F401
import break_packets  # noqa: F401
import break_values  # noqa: F401
import breakers
import programs as good
import pytest

from moekit.compile.tile.verify import RULES, check, facts_of, verify
from moekit.errors import VerifyError

CASES = [pytest.param(rule, make, id=f"{rule}-{name}") for rule, items in breakers.BREAKERS.items() for name, make in items]


@pytest.mark.parametrize(("rule", "make"), CASES)
def test_broken_program_is_refused_by_its_rule(rule, make):
    """`verify` names the rule that was broken, and no rule before it in the table sees anything."""
    program = make()
    with pytest.raises(VerifyError) as error:
        verify(program)
    message = str(error.value)
    assert message.startswith(f"{program.name}: {rule.replace('_', ' ')}: ")
    assert "\n" not in message
    with pytest.raises(VerifyError):
        check(facts_of(program), rule)


def test_every_rule_has_a_program_that_breaks_it():
    """A rule nobody can break is no rule."""
    assert set(breakers.BREAKERS) == set(RULES)


@pytest.mark.parametrize(
    "make",
    [
        good.norm_program,
        good.looped_program,
        good.gemm_program,
        good.tall_program,
        good.ahead_program,
        good.lookup_program,
        good.accumulate_program,
        good.window_program,
        good.exchange_program,
    ],
    ids=lambda make: make.__name__,
)
def test_good_programs_pass(make):
    """What the breakers start from is right."""
    verify(make())


def test_split_programs_pass():
    """Both launches of a split plan are right."""
    for program in good.split_programs():
        verify(program)
