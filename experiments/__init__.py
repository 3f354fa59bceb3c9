"""Programs built on the library: `python -m experiments.<name>`."""
