"""Run configurations: each file has a `get_config(variant=...)`."""
