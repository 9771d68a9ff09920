"""The option that says what becomes of a checkpoint's FP8 weights."""

import click

kept_weights = click.option(
    "--weights",
    type=click.Choice(["auto", "float8_e4m3fn"]),
    help="Keep experts and projections as an FP8 checkpoint has them: auto, if it is one (default: all in --dtype).",
)
