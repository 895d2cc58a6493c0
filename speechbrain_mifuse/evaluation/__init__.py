"""Metrics, intervals and results."""
