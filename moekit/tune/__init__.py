"""Timing and tuning of schedules on a GPU."""
