"""The options that say what becomes of a checkpoint's FP8 weights, and of what is multiplied by them."""

import click

kept_weights = click.option(
    "--weights",
    type=click.Choice(["auto", "float8_e4m3fn"]),
    help="Keep experts and projections as an FP8 checkpoint has them: auto, if it is one (default: all in --dtype).",
)

float8_activations = click.option(
    "--activations",
    type=click.Choice(["float8_e4m3fn"]),
    help="Of what many tokens' routed experts in float8 multiply: some percent off, in less time (default: of --dtype).",
)
