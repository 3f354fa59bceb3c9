"""Reads rows written before methods, budgets and trials got their present names.

Those rows hold an "arm", "horizons" such as "tokens 0.4", and results keyed by those
strings. `upgrade` returns what `rows.to_dict` would have written. `config.from_dict`
upgrades the experiment itself.
"""

from collections.abc import Mapping
from typing import Any

# Words of method names, before and now.
_WORDS = {
    "(lossless)": "(svd retraction)",
    "svd gauge": "svd coordinates",
    "lossless": "svd retraction",
}


def is_legacy(values: Mapping[str, Any]) -> bool:
    """Returns whether a row needs `upgrade`."""
    return "arm" in values


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row in the present format."""
    old = values["definition"]
    experiment = old["experiment"] | {"optimizer": _optimizer(old["experiment"])}
    branches = [budget(name) | {"steps": steps} for name, steps in old["horizons"]]
    name, variation_of = method(values["arm"], of_size=branches[0]["kind"])
    return {
        "environment": values.get("environment", {}),
        "trial": {
            "method": name,
            "variation_of": variation_of,
            "experiment": experiment,
            "branches": branches,
            "forward": old.get("method", "plain"),
            "non_matrix_lr": old.get("adam_rate"),
        },
        "results": [
            budget(name)
            | {
                "layer_flops" if field == "block_flops" else field: value
                for field, value in result.items()
            }
            for name, result in values["results"].items()
        ],
        **{field: values[field] for field in _UNCHANGED if field in values},
    }


def budget(horizon: str) -> dict[str, Any]:
    """Returns kind and amount of a horizon, "tokens 0.4" for one."""
    kind, _, amount = horizon.partition(" ")
    return {
        "kind": "total_flops" if kind == "budget" else kind,
        "amount": float(amount),
    }


def method(arm: str, *, of_size: str = "") -> tuple[str, str | None]:
    """Returns the name of an arm's method, and of the method that it varies.

    Args:
      arm: "dense Muon: decay .9" is a variation of dense Muon.
      of_size: "total_flops" for an arm of a scaling study, "dense Muon, d 56".
    """
    if of_size == "total_flops":
        arm = arm.rpartition(", d ")[0]
    for before, now in _WORDS.items():
        arm = arm.replace(before, now)
    plain, colon, _ = arm.partition(":")
    return arm, plain if colon else None


_UNCHANGED = (
    "corpus",
    "parameters",
    "train_bytes",
    "wall_seconds",
    "spikes",
    "train_loss",
    "update_norms",
    "effective_ranks",
    "spectra",
    "ranks",
)


def _optimizer(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The chain sct without a retraction, once spelled as tsvd with a rare one.

    Both have the same update, up to rounding.
    """
    fields = dict(experiment["optimizer"])
    never = fields.get("retraction_every", 1) >= 10**9
    lazy = fields.get("retraction_tolerance") is not None
    if fields["name"] == "tsvd" and never and not lazy:
        fields |= {"name": "sct", "retraction": "none", "retraction_every": 1}
    return fields
