"""The group of commands, and how an error becomes one sentence and an exit code."""

from typing import Any

import click

from moekit import __version__
from moekit.cli.decode import decode
from moekit.cli.doctor import doctor
from moekit.cli.evaluate import evaluate
from moekit.cli.export import export
from moekit.cli.fusions import list_fusions
from moekit.cli.fuzz import fuzz
from moekit.cli.generate import generate
from moekit.cli.inspect import inspect
from moekit.cli.mutants import mutants
from moekit.cli.quantize import quantize
from moekit.cli.show import show
from moekit.cli.tune import tune
from moekit.errors import ArgumentError, DtypeError, MoekitError, ScheduleError, ShapeError, UnavailableError

FAILED, USAGE, UNAVAILABLE = 1, 2, 3


def exit_code(error: MoekitError) -> int:
    """1 for a failure, 2 for what was asked wrongly, 3 for an implementation that cannot serve here."""
    if isinstance(error, UnavailableError):
        return UNAVAILABLE
    return USAGE if isinstance(error, (ShapeError, DtypeError, ArgumentError, ScheduleError)) else FAILED


class Commands(click.Group):
    """A group whose commands may raise MoekitError, and OSError."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; one of moekit's own errors, or the system's, becomes a sentence on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except MoekitError as error:
            click.ClickException(str(error)).show()
            ctx.exit(exit_code(error))
        except BrokenPipeError:
            raise  # whoever reads has seen enough: click ends quietly
        except OSError as error:  # of a file that no option named: Triton's cache, say
            named = f"{error.filename}: " if error.filename else ""
            click.ClickException(f"{named}{error.strerror or error}").show()
            ctx.exit(FAILED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moekit")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Mixture-of-Experts fusions, declared once and run everywhere.

    Exit codes: 0 done, 1 failed, 2 asked wrongly, 3 not available here.
    """
    if ctx.obj and ctx.invoked_subcommand != fuzz.name:  # Ctrl-C while this was imported, to which fuzz has its own answer
        raise KeyboardInterrupt


for _command in (decode, generate, evaluate, inspect, quantize, list_fusions, show, export, doctor, tune, fuzz, mutants):
    cli.add_command(_command)
