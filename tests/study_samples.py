"""Rows of studies that were never trained."""

from experiments.studies import rows


def row_of(trial, loss, **fields):
    """A finished trial; `loss` is one for all budgets, or one by kind of budget."""
    results = {}
    for budget, steps in trial.branches:
        results[budget] = rows.Result(
            steps=steps,
            tokens=steps * trial.experiment.data.tokens_per_step,
            flops=trial.flops(steps),
            layer_flops=trial.flops(steps, layers_only=True),
            loss=loss[budget.kind] if isinstance(loss, dict) else loss,
            bits_per_byte=1.0,
        )
    fields = {"parameters": 100, "wall_seconds": 1.0} | fields
    return rows.Row(trial=trial, results=results, **fields)
