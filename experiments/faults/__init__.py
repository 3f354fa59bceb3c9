"""Faults on purpose: what a run must survive or refuse."""
