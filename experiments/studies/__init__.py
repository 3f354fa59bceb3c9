"""Comparisons of training methods: what is trained, stored, summarised and drawn."""
