"""The `moekit` command. `main` is its entry point; nothing heavy is imported before a command needs it."""

import sys

from moekit.cli.interrupt import held

EXTRA = ("click", "rich")


def main() -> None:
    """Run the command line; one clear line where the `cli` extra is not installed."""
    try:
        with held() as pressed:
            from moekit.cli.app import cli
            from moekit.cli.output import spell_out
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        print(f"moekit: the command needs {missing}; install moekit[cli]", file=sys.stderr)
        sys.exit(3)
    spell_out()
    cli(prog_name="moekit", obj=pressed)
