"""The `moekit` command. `main` is its entry point; nothing heavy is imported before a command needs it."""

import sys

EXTRA = ("click", "rich", "platformdirs")


def main() -> None:
    """Run the command line; one clear line where the `cli` extra is not installed."""
    try:
        from moekit.cli.app import cli
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(f"moekit: the command needs {error.name}; install moekit[cli]", file=sys.stderr)
        sys.exit(3)
    cli(prog_name="moekit")
