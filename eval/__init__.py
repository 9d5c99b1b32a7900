"""Measures: features, distances, speed, and the report."""
