"""Benchmarks, and the timer that they share."""
