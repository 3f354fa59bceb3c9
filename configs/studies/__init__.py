"""Configurations of comparisons, for `experiments.studies`."""
