"""Programs that use the library: `python -m experiments.<name>`."""
