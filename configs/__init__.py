"""Configurations of runs: files with `get_config(variant=...)`."""
