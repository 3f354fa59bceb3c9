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
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

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

Column = tuple[str, Callable[[summary.MethodSummary], str]]  # title and cells

TOKENS, FLOPS = (functools.partial(trial_lib.Budget, k) for k in ("tokens", "flops"))
LOW_RANK = ("Stiefel Muon", "Spectron (code)", "SCT (s = 1)")
DENSE = ("dense AdamW", "dense Muon", "dense Muon (narrow)")

_WITH_ERROR = re.compile(r"\d\.\d{3} ± \d\.\d{3}")
_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@functools.cache
def methods_of(study: str) -> dict[str, summary.MethodSummary]:
    """Returns the methods of a study by name."""
    return {m.name: m for m in summary.summarize(rows_lib.read(RESULTS / study))}


def table(
    methods: Iterable[summary.MethodSummary],
    columns: Sequence[Column],
    *,
    title: str = "method",
) -> str:
    """Returns a table with a line per method."""
    body = [[method.name, *(cell(method) for _, cell in columns)] for method in methods]
    return page.markdown_table([title, *(name for name, _ in columns)], body)


def loss(*budgets: trial_lib.Budget) -> list[Column]:
    """Returns columns of the losses at some budgets."""
    return [
        (trial_lib.EQUAL[budget.kind], lambda m, budget=budget: m.with_error(budget))
        for budget in budgets
    ]


def minus(study: str, names: Sequence[str], *budgets: trial_lib.Budget) -> list[Column]:
    """Returns columns of the losses minus some methods of a study."""

    def gap(name, budget, method):
        if method.name == name:
            return ""
        return summary.gap_text(method, methods_of(study)[name], budget)

    return [
        (
            f"minus {name}, {trial_lib.EQUAL[budget.kind]}",
            functools.partial(gap, name, budget),
        )
        for budget in budgets
        for name in names
    ]


def results() -> str:
    """Returns losses at d 256 after 0.4 tokens per parameter, and at d 64 after 10."""
    short, long = (
        methods_of("compare_methods-short"),
        methods_of("compare_methods-long"),
    )
    at_256, at_64 = loss(TOKENS(0.4), FLOPS(0.4)), loss(TOKENS(10), FLOPS(10))
    columns = [
        *((f"d 256, {title}", cell) for title, cell in at_256),
        *(
            (f"d 64, {title}", lambda m, cell=cell: cell(long[m.name]))
            for title, cell in at_64
        ),
    ]
    ranked = summary.ranked(short.values(), TOKENS(0.4))
    return table([m for m in ranked if m.name in long], columns)


def gaps() -> str:
    """Returns losses at equal FLOPs minus dense Muon, over the length."""
    study, lengths = "compare_methods-long", (0.4, 2, 10)
    cells = [minus(study, ["dense Muon"], FLOPS(length))[0][1] for length in lengths]
    others = [m for m in methods_of(study).values() if m.name != "dense Muon"]
    columns = list(zip(map(str, lengths), cells, strict=True))
    return table(others, columns, title="tokens per parameter")


def small() -> str:
    """Returns the losses of all methods that were trained with several seeds."""
    ranked = summary.ranked(methods_of("compare_methods-small").values(), TOKENS(0.4))
    parameters = lambda m: f"{m.rows(TOKENS(0.4))[0].parameters:,}"
    columns = [("parameters", parameters), *loss(TOKENS(0.4), FLOPS(0.4))]
    return table([m for m in ranked if m.num_seeds(FLOPS(0.4)) > 1], columns)


def recipe() -> str:
    """Returns the losses of those variations that were trained with all seeds."""
    methods = list(methods_of("compare_methods-recipe").values())
    with_all_seeds = summary.with_most_seeds(methods, TOKENS(0.4))
    return table(with_all_seeds, loss(TOKENS(0.4), FLOPS(0.4)))


def recipe_long() -> str:
    """Returns the losses of variations minus the methods that they vary."""
    methods = methods_of("compare_methods-recipe_long")
    varied = [m for m in methods.values() if m.variation_of]
    change = lambda m: summary.gap_text(m, methods[m.variation_of], TOKENS(10))
    return table(varied, [("change of the loss", change)], title="variation")


def decay() -> str:
    """Returns what a decay over nine tenths of the run changes, at equal FLOPs."""
    budget, plain = FLOPS(10), methods_of("compare_methods-long")
    decayed = methods_of("compare_methods-long_decay").values()
    (ours,) = (m for m in decayed if m.variation_of == "Stiefel Muon")
    gap = lambda m, other: summary.gap_text(m, other, budget)
    before = lambda m: plain[m.variation_of]
    columns = [
        ("equal FLOPs", lambda m: m.with_error(budget)),
        ("minus the short decay", lambda m: gap(m, before(m))),
        ("Stiefel Muon minus this method", lambda m: "" if m is ours else gap(ours, m)),
        (
            "Stiefel Muon minus this method with the short decay",
            lambda m: "" if m is ours else gap(ours, before(m)),
        ),
    ]
    return table(summary.ranked(decayed, budget), columns)


def width() -> str:
    """Returns the best learning rate and the loss of two chains at three widths."""
    budget = TOKENS(0.4)
    best = lambda m: f"{m.setting(budget).learning_rate:g}"
    columns = [("best learning rate", best), *loss(budget)]
    d_model = lambda m: m.all_rows[0].trial.experiment.model.d_model
    methods = sorted(methods_of("compare_methods-width").values(), key=d_model)
    return table(methods, columns)


def scaling_laws() -> str:
    """Returns parameters and loss of the best sizes, and the exponents of the laws."""
    laws = json.loads((RESULTS / "scaling_laws/laws.json").read_text())["laws"]
    budgets = [f"{best['flops']:.0e} FLOPs" for best in laws["dense Muon"]["optima"]]
    body = [
        [
            kind,
            *(f"{o['parameters']:,.0f}: {o['loss']:.3f}" for o in law["optima"]),
            "{:.3f} [{:.3f}, {:.3f}]".format(law["N ~ C^a"], *law["a, 90 %"]),
        ]
        for kind, law in laws.items()
    ]
    return page.markdown_table(["kind", *budgets, "a of N ~ C^a"], body)


def start() -> str:
    """Returns losses over the length, and differences at 10 tokens per parameter."""
    study, lengths = "start-d64", ("0.4", "2", "10")
    cells = [cell for _, cell in loss(*(FLOPS(float(x)) for x in lengths))]
    columns = list(zip(lengths, cells, strict=True))
    narrow = best_narrow(study, FLOPS(10))
    for title, name in (("low rank", "low rank: decay .9"), ("narrow", narrow)):
        ((_, cell),) = minus(study, [name], FLOPS(10))
        columns.append((f"10, minus {title}", cell))
    columns.append(("MB", lambda m: summary.megabytes(m.rows(FLOPS(10))[0])))
    return table(summary.ranked(methods_of(study).values(), FLOPS(10)), columns)


def best_narrow(study: str, budget: trial_lib.Budget) -> str:
    """Returns the name of the narrow dense model with the lowest loss."""
    narrow = [m for m in methods_of(study).values() if m.name.startswith(DENSE[-1])]
    return summary.ranked(narrow, budget)[0].name


def start_wider() -> str:
    """Returns losses of wider models, and minus the best narrow one of each study."""
    columns: list[Column] = []
    for title, study, length in (
        ("d 128, 0.4", "start-d128", 0.4),
        ("d 128, 2", "start-d128_longer", 2),
        ("d 256, 0.4", "start-d256", 0.4),
    ):
        known, budget = methods_of(study), FLOPS(length)
        ((_, gap),) = minus(study, [best_narrow(study, budget)], budget)
        for column, cell in (
            (title, lambda m, budget=budget: m.with_error(budget)),
            ("minus narrow", gap),
        ):
            of_name = lambda m, known=known, cell=cell: (
                cell(known[m.name]) if m.name in known else ""
            )
            columns.append((column, of_name))
    methods = methods_of("start-d128_longer").values()
    return table(summary.ranked(methods, FLOPS(2)), columns)


def healing() -> str:
    """Returns losses of trained models after truncation and healing.

    The last row is a narrow model trained from scratch on the FLOPs of the healing.
    """
    extra = (0.5, 1, 2)  # tokens per dense parameter
    body = []
    for method in methods_of("start-healing").values():
        cuts = [row.switches[0] for row in method.rows(TOKENS(11))]
        around = [[c.before for c in cuts], [c.after for c in cuts]]
        healed = [method.with_error(TOKENS(10 + tokens)) for tokens in extra]
        body.append([method.name, *map(spread, around), *healed])
    for method in methods_of("start-extra").values():
        alone = [method.with_error(TOKENS(tokens)) for tokens in extra]
        body.append([f"{method.name} from scratch", "", "", *alone])
    titles = ["trained", "truncated", *(f"{10 * x:g} % more tokens" for x in extra)]
    return page.markdown_table(["method", *titles], body)


def spread(losses: Sequence[float]) -> str:
    """Returns "mean ± deviation" of losses over seeds."""
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def minus_dense(
    study: str, names: Sequence[str], *budgets: trial_lib.Budget
) -> Callable[[], str]:
    """Returns a table of the low-rank methods of a study minus some dense ones."""

    def made() -> str:
        methods = methods_of(study)
        own = [methods[name] for name in LOW_RANK if name in methods]
        own = own or [m for m in methods.values() if not m.is_dense]
        return table(own, minus(study, names, *budgets))

    return made


def losses(study: str, *budgets: trial_lib.Budget) -> Callable[[], str]:
    """Returns a table of the losses of all methods of a study."""
    return lambda: table(methods_of(study).values(), loss(*budgets))


TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "gaps": gaps,
    "small": small,
    "small_gaps": minus_dense(
        "compare_methods-small", DENSE[1:], TOKENS(0.4), FLOPS(0.4)
    ),
    "short": losses(
        "compare_methods-short",
        TOKENS(0.4),
        FLOPS(0.4),
        trial_lib.Budget("seconds", 0.4),
    ),
    "short_gaps": minus_dense("compare_methods-short", DENSE, TOKENS(0.4)),
    "long": minus_dense("compare_methods-long", DENSE[1:], TOKENS(10), FLOPS(10)),
    "recipe": recipe,
    "recipe_long": recipe_long,
    "decay": decay,
    "width": width,
    "rank_sweep": minus_dense("rank_sweep", DENSE[:1], TOKENS(0.4), FLOPS(0.4)),
    "ablation_retraction": losses("ablation_retraction", TOKENS(1)),
    "scaling_laws": scaling_laws,
    "start": start,
    "start_wider": start_wider,
    "healing": healing,
}


def rewritten(text: str) -> str:
    """Returns the text of a README with its tables as the rows have them.

    Raises:
      UserError: for an unknown table.
    """

    def block(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        errors.check_choice("table", name, tuple(TABLES))
        return f"{begin}{TABLES[name]()}\n{end}"

    return _BLOCK.sub(block, text)


def unfounded(text: str) -> list[str]:
    """Returns the losses with an error in the prose of a README that no table has."""
    quoted = _WITH_ERROR.findall(_BLOCK.sub("", text))
    if not quoted:
        return []
    known = {found for made in TABLES.values() for found in _WITH_ERROR.findall(made())}
    return [number for number in quoted if number not in known]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a stale table, 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_flags(sys.argv[1:] if argv is None else argv).check
    stale: list[str] = []
    for path in (ROOT / name for name in READMES):
        old = path.read_text() if path.exists() else ""
        try:
            new = rewritten(old)
        except errors.UserError as error:
            overrides.fail(f"{path}: {error}")
        pairs = zip(_BLOCK.finditer(old), _BLOCK.finditer(new), strict=True)
        stale += [f"{path}: {a[2]}" for a, b in pairs if a[3] != b[3]]
        if check:
            stale += [f"{path}: {n} is in no table" for n in unfounded(old)]
        elif new != old:
            files.replace_text(path, new)
    for name in stale:
        print(f"{'stale' if check else 'rewritten'}: {name}")
    if check and stale:
        print("python -m experiments.studies.tables rewrites tables, not prose")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
