"""Writes the tables of READMEs from committed rows: no number is copied by hand.

python -m experiments.studies.tables           rewrites them
python -m experiments.studies.tables --check   exits with code 1 if one is stale

A README holds a table between the lines `<!-- table: NAME -->` and `<!-- end -->`, with
a name of `TABLES`. Its prose may quote losses with an error, such as 4.179 ± 0.035,
that some table contains; `--check` finds those that none contains.
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from experiments.studies import page, summary
from experiments.studies import rows as rows_lib
from experiments.studies import trial as trial_lib
from sct_jax import errors, files
from sct_jax.training import overrides

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/studies/results"
READMES = (
    "README.md",
    "experiments/README.md",
    "experiments/studies/results/README.md",
)

Methods = dict[str, summary.MethodSummary]

_WITH_ERROR = re.compile(r"\d\.\d{3} ± \d\.\d{3}")
_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def tokens(amount: float) -> trial_lib.Budget:
    """Returns the budget of equal tokens at a length."""
    return trial_lib.Budget("tokens", amount)


def flops(amount: float) -> trial_lib.Budget:
    """Returns the budget of equal FLOPs at a length."""
    return trial_lib.Budget("flops", amount)


@functools.cache
def methods_of(study: str) -> Methods:
    """Returns the methods of a study by name."""
    return {m.name: m for m in summary.summarize(rows_lib.read(RESULTS / study))}


def results() -> str:
    """Returns losses at d 256 after 0.4 tokens per parameter, and at d 64 after 10."""
    short, long = (
        methods_of("compare_methods-short"),
        methods_of("compare_methods-long"),
    )
    columns = (
        ("d 256, equal tokens", short, tokens(0.4)),
        ("equal FLOPs", short, flops(0.4)),
        ("d 64, equal tokens", long, tokens(10)),
        ("equal FLOPs", long, flops(10)),
    )
    body = [
        [m.name, *(study[m.name].with_error(budget) for _, study, budget in columns)]
        for m in summary.ranked(short.values(), tokens(0.4))
        if m.name in long
    ]
    return page.markdown_table(["method", *(title for title, *_ in columns)], body)


def gaps() -> str:
    """Returns losses at equal FLOPs minus that of dense Muon, over the length."""
    long, lengths = methods_of("compare_methods-long"), (0.4, 2, 10)
    muon = long["dense Muon"]
    body = [
        [m.name, *(summary.gap_text(m, muon, flops(length)) for length in lengths)]
        for m in long.values()
        if m is not muon
    ]
    return page.markdown_table(["tokens per parameter", *map(str, lengths)], body)


def small() -> str:
    """Returns the losses of all methods that were trained with several seeds."""
    methods = methods_of("compare_methods-small")
    body = [
        [
            m.name,
            f"{m.rows(tokens(0.4))[0].parameters:,}",
            m.with_error(tokens(0.4)),
            m.with_error(flops(0.4)),
        ]
        for m in summary.ranked(methods.values(), tokens(0.4))
        if m.num_seeds(flops(0.4)) > 1
    ]
    return page.markdown_table(
        ["method", "parameters", "equal tokens", "equal FLOPs"], body
    )


def gaps_to(
    study: str,
    names: Sequence[str],
    references: Sequence[str],
    *budgets: trial_lib.Budget,
) -> str:
    """Returns losses minus those of several methods, a column per method and budget."""
    methods = methods_of(study)
    header = ["method"]
    for budget in budgets:
        phrase = trial_lib.EQUAL[budget.kind]
        header += [f"minus {reference}, {phrase}" for reference in references]
    body = [
        [
            name,
            *(
                summary.gap_text(methods[name], methods[reference], budget)
                for budget in budgets
                for reference in references
            ),
        ]
        for name in names
    ]
    return page.markdown_table(header, body)


def losses_of(study: str, names: Sequence[str], *budgets: trial_lib.Budget) -> str:
    """Returns the losses of some methods, a column per budget."""
    methods = methods_of(study)
    body = [[n, *(methods[n].with_error(b) for b in budgets)] for n in names]
    header = ["method", *(trial_lib.EQUAL[budget.kind] for budget in budgets)]
    return page.markdown_table(header, body)


def variations(study: str, budget: trial_lib.Budget) -> str:
    """Returns the losses of variations minus those of the methods that they vary."""
    methods = methods_of(study)
    body = [
        [m.name, summary.gap_text(m, methods[m.variation_of], budget)]
        for m in methods.values()
        if m.variation_of in methods and m.num_seeds(budget) > 1
    ]
    return page.markdown_table(["variation", "change of the loss"], body)


def decay() -> str:
    """Returns what a decay over nine tenths of the run changes, at equal FLOPs."""
    budget, plain = flops(10), methods_of("compare_methods-long")
    decayed = methods_of("compare_methods-long_decay").values()
    (ours,) = (m for m in decayed if m.variation_of == "Stiefel Muon")
    body = []
    for method in summary.ranked(decayed, budget):
        before = plain[method.variation_of or ""]
        versus = (
            ["", ""]
            if method is ours
            else [summary.gap_text(ours, other, budget) for other in (method, before)]
        )
        change = summary.gap_text(method, before, budget)
        body.append([before.name, method.with_error(budget), change, *versus])
    header = ["method", "loss with the long decay", "minus the short decay"]
    header += ["Stiefel Muon minus it", "Stiefel Muon minus it with the short decay"]
    return page.markdown_table(header, body)


def width() -> str:
    """Returns the best learning rate and the loss of two chains at three widths."""
    methods, widths = methods_of("compare_methods-width"), (64, 128, 256)
    body = []
    for name in ("Stiefel Muon", "SCT", "SCT with base_width"):
        own = [methods[f"{name} at d {d_model}"] for d_model in widths]
        cells = [
            f"{m.setting(tokens(0.4)).learning_rate:g}: {m.with_error(tokens(0.4))}"
            for m in own
        ]
        body.append([name, *cells])
    return page.markdown_table(["method", *(f"d {d}" for d in widths)], body)


def scaling() -> str:
    """Returns the best sizes of the scaling study and the exponents of its laws."""
    found = json.loads((RESULTS / "scaling_laws/laws.json").read_text())["laws"]
    budgets = [f"{optimum['flops']:.0e}" for optimum in found["dense Muon"]["optima"]]
    body = [
        [
            kind,
            *(f"{o['parameters']:,.0f}: {o['loss']:.3f}" for o in law["optima"]),
            f"{law['N ~ C^a']:.3f} [{law['a, 90 %'][0]:.3f}, {law['a, 90 %'][1]:.3f}]",
        ]
        for kind, law in found.items()
    ]
    return page.markdown_table(["kind", *budgets, "a of N ~ C^a"], body)


_LOW_RANK = ("Stiefel Muon", "Spectron (code)", "SCT (s = 1)")
_DENSE = ("dense AdamW", "dense Muon", "dense Muon (narrow)")
_BEST = "momentum .9 + normalised q and k"

TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "gaps": gaps,
    "small": small,
    "small_gaps": lambda: gaps_to(
        "compare_methods-small", _LOW_RANK, _DENSE[1:], tokens(0.4), flops(0.4)
    ),
    "short": lambda: losses_of(
        "compare_methods-short",
        [*_LOW_RANK, *_DENSE],
        tokens(0.4),
        flops(0.4),
        trial_lib.Budget("seconds", 0.4),
    ),
    "short_gaps": lambda: gaps_to(
        "compare_methods-short", _LOW_RANK, _DENSE, tokens(0.4)
    ),
    "long": lambda: gaps_to(
        "compare_methods-long", _LOW_RANK, _DENSE[1:], tokens(10), flops(10)
    ),
    "recipe": lambda: losses_of(
        "compare_methods-recipe",
        (
            "Stiefel Muon",
            f"Stiefel Muon: {_BEST}",
            "Stiefel Muon: R = d/2",
            "dense Muon",
            f"dense Muon: {_BEST}",
            f"dense Muon: {_BEST} (narrow)",
            "SCT (dense spectrum)",
            "SCT (dense spectrum): bfloat16 moments",
        ),
        tokens(0.4),
        flops(0.4),
    ),
    "recipe_long": lambda: variations("compare_methods-recipe_long", tokens(10)),
    "decay": decay,
    "width": width,
    "rank_sweep": lambda: gaps_to(
        "rank_sweep",
        [m.name for m in methods_of("rank_sweep").values() if not m.is_dense],
        ("dense AdamW",),
        tokens(0.4),
        flops(0.4),
    ),
    "ablation_retraction": lambda: losses_of(
        "ablation_retraction", list(methods_of("ablation_retraction")), tokens(1)
    ),
    "scaling_laws": scaling,
}


def rewritten(text: str) -> str:
    """Returns the text of a README with its tables as the rows have them.

    Raises:
      UserError: for an unknown table.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        errors.check_choice("table", name, tuple(TABLES))
        return f"{begin}{TABLES[name]()}\n{end}"

    return _BLOCK.sub(table, text)


def unfounded(text: str) -> list[str]:
    """Returns the losses with an error in the prose of a README that no table has."""
    quoted = _WITH_ERROR.findall(_BLOCK.sub("", text))
    if not quoted:
        return []
    known = {found for t in TABLES.values() for found in _WITH_ERROR.findall(t())}
    return [number for number in quoted if number not in known]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a stale table, 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    stale: list[str] = []
    for path in (ROOT / name for name in READMES):
        old = path.read_text() if path.exists() else ""
        try:
            new = rewritten(old)
        except errors.UserError as error:
            overrides.fail(f"{path}: {error}")
        pairs = zip(_BLOCK.finditer(old), _BLOCK.finditer(new), strict=True)
        stale += [f"{path}: {a[2]}" for a, b in pairs if a[3] != b[3]]
        if new != old and not flags.check:
            files.replace_text(path, new)
        if flags.check:
            stale += [f"{path}: {n} is in no table" for n in unfounded(old)]
    for name in stale:
        print(f"{'stale' if flags.check else 'rewritten'}: {name}")
    if flags.check and stale:
        print("python -m experiments.studies.tables rewrites tables, not prose")
    return int(flags.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
