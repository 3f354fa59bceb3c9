r"""Compares training methods: all tuned alike, with seeds, on held-out text.

python -m experiments.studies.compare --config=configs/studies/compare_methods.py
python -m experiments.studies.compare --config=configs/studies/rank_sweep.py \
  --methods='R 2,R 4'

Trains the missing trials of a results folder, one row per finished trial in runs.jsonl.
The same command resumes an interrupted study, and several at once share the work.
`python -m experiments.studies.report FOLDER` draws the results.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sct_jax.training import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

from experiments.studies import grid, search, store, train
from sct_jax import data, errors, files
from sct_jax.training import overrides

RESULTS = "experiments/studies/results"
INTERRUPTED = "interrupted: finished trials are saved; the same command resumes"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 nothing is missing, 2 bad input, 130 interrupted."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--config", required=True, help="config file, with :variant if it has several"
    )
    parser.add_argument(
        "--results", help=f"folder (default: {RESULTS}/<file>-<variant>)"
    )
    parser.add_argument("--methods", help="only these methods, separated by commas")
    parser.add_argument(
        "--reuse", help="results folder whose rows of the same trials are copied"
    )
    flags, pairs = parser.parse(sys.argv[1:] if argv is None else argv)
    try:
        with overrides.notes_on_renames():
            comparison = overrides.load_as(grid.Comparison, flags.config, pairs)
        run(
            comparison,
            results_folder(flags.config, flags.results),
            methods=choose(comparison, flags.methods),
            reuse=flags.reuse,
        )
    except errors.UserError as error:
        overrides.fail(str(error))
    except KeyboardInterrupt:
        print(INTERRUPTED)
        return 130
    return 0


def results_folder(spec: str, given: str | None) -> str:
    """Returns the folder of a study: as given, or named after its config file."""
    if given:
        return given
    return os.path.join(RESULTS, pathlib.Path(overrides.default_workdir(spec)).name)


def choose(comparison: grid.Comparison, names: str | None) -> tuple[grid.Method, ...]:
    """Returns the methods with these names, separated by commas; all for None.

    Raises:
      UserError: for an unknown method.
    """
    if names is None:
        return comparison.methods
    known = [method.name for method in comparison.methods]
    for name in names.split(","):
        errors.check_choice("--methods", name, known)
    return tuple(m for m in comparison.methods if m.name in names.split(","))


def run(
    comparison: grid.Comparison,
    folder: str | os.PathLike[str],
    *,
    methods: tuple[grid.Method, ...],
    reuse: str | None = None,
) -> None:
    """Trains every missing trial of these methods into the folder."""
    corpus = data.prepare(
        comparison.base.data, vocab_size=comparison.base.model.vocab_size
    )
    results = store.Store(folder, reuse=reuse)
    results.check_text(corpus)
    results.share_programs()
    seconds = time_steps(comparison, methods, results, corpus)
    search.check_same(comparison, results.rows(), seconds=seconds)
    longest = search.most_tokens(comparison, methods, seconds=seconds)
    if longest > len(corpus.train):
        print(
            f"note: the longest trial needs {longest:,} tokens and the training text "
            f"has {len(corpus.train):,}, so some text repeats"
        )
    store.fill(
        results,
        lambda rows: search.missing(comparison, rows, methods=methods, seconds=seconds),
        lambda trial: train.run(trial, corpus),
    )


def time_steps(
    comparison: grid.Comparison,
    methods: tuple[grid.Method, ...],
    results: store.Store,
    corpus: data.Corpus,
) -> dict[str, list[float]] | None:
    """Returns seconds per step of these methods, measured once per results folder.

    None where no budget needs them.

    Raises:
      UserError: the times of trained methods are lost.
    """
    if "seconds" not in comparison.budgets:
        return None
    path, reference = results.folder / "seconds.json", comparison.reference
    with results.hold("seconds"):
        known = read_seconds(results.folder)
        names = {method.name for method in comparison.methods}
        trained = sorted({trial.method for trial in results.rows()} & names)
        errors.check(
            "--results",
            set(trained) <= set(known),
            f"{path} is missing or lacks one of {', '.join(trained)}. The lengths of "
            "their runs depend on it; restore it or choose another folder",
        )
        trials = {
            method.name: comparison.trial(
                method, method.learning_rates[0], comparison.seeds[0]
            )
            for method in comparison.methods
            if method.name == reference
            or (method in methods and method.name not in known)
        }
        if set(trials) - set(known):
            print("measuring the time per step; keep the machine idle")
            taken = train.seconds_per_step(trials, corpus)
            # Known times determine finished runs and stay. A new method is measured
            # beside the reference, because the machine may have changed.
            scale = known.get(reference, taken[reference])[0] / taken[reference][0]
            scaled = {name: [scale * t for t in pair] for name, pair in taken.items()}
            known = scaled | known
            files.replace_text(path, json.dumps(known, indent=2) + "\n")
    return known


def read_seconds(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Returns the seconds per step of a results folder, by method."""
    path = pathlib.Path(folder) / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
