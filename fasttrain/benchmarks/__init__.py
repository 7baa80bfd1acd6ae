"""Measurements: contestants that do the same work, timed alternately in one run."""
