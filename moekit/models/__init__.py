"""Models built on moekit's fusions."""
