"""Benchmarks of the optimizer chains, and the timer that they share."""
