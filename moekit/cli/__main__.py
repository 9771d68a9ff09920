"""`python -m moekit.cli` is `moekit`."""

from moekit.cli import main

main()
