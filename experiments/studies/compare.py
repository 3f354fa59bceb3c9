"""Compares training methods: every arm tuned alike, with seeds, on held-out text.

python -m experiments.compare --config=configs/compare_methods.py
python -m experiments.compare --config=configs/compare_methods.py:small --arms=Spectron

Trains what is missing in the folder of the results, a row per finished trial in
runs.jsonl, and stops when nothing is. The same command goes on after an interruption;
several at once share the work. `python -m experiments.report FOLDER` draws it.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

from experiments.studies import grid, store, trial
from sct_jax import data, errors
from sct_jax.training import command_line, config, metrics

RESULTS = "experiments/results"
INTERRUPTED = "interrupted: finished trials are kept; the same command goes on"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 nothing is missing, 2 bad input, 130 interrupted."""
    return command(argv, __doc__ or "")


def command(
    argv: Sequence[str] | None, description: str, *, default: str | None = None
) -> int:
    """Returns the exit code of a program that fills a comparison, see `main`.

    Args:
      argv: the words of its command line; those of this process if None.
      description: for `--help`.
      default: of `--config`, which is required where there is none.
    """
    parser = command_line.FlagParser(description)
    parser.add_argument(
        "--config",
        default=default,
        required=default is None,
        help="config file, with :variant if it has several",
    )
    parser.add_argument(
        "--results", help=f"folder (default: {RESULTS}/<file>-<variant>)"
    )
    parser.add_argument("--arms", help="only these arms, by comma")
    parser.add_argument(
        "--reuse", help="folder of results whose rows of the same trials are taken over"
    )
    flags, overrides = parser.parse(sys.argv[1:] if argv is None else argv)
    try:
        comparison = config.load_as(grid.Comparison, flags.config, overrides)
        run(
            comparison,
            results_folder(flags.config, flags.results),
            arms=choose(comparison, flags.arms),
            reuse=flags.reuse,
        )
    except errors.UserError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print(INTERRUPTED)
        return 130
    return 0


def results_folder(spec: str, given: str | None) -> str:
    """Returns the folder of the results: the given one, or named by the config."""
    name = pathlib.Path(config.default_workdir(spec)).name
    return given or os.path.join(RESULTS, name)


def choose(comparison: grid.Comparison, arms: str | None) -> tuple[grid.Arm, ...]:
    """Returns the arms with the given names, separated by commas; all for None.

    Raises:
      UserError: for an arm that it does not have.
    """
    if arms is None:
        return comparison.arms
    names = arms.split(",")
    for name in names:
        errors.check_choice("--arms", name, [arm.name for arm in comparison.arms])
    return tuple(arm for arm in comparison.arms if arm.name in names)


def run(
    comparison: grid.Comparison,
    folder: str | os.PathLike[str],
    *,
    arms: tuple[grid.Arm, ...],
    reuse: str | None = None,
) -> None:
    """Returns once the folder holds every trial of these arms of the comparison."""
    corpus = data.prepare(
        comparison.base.data, vocab_size=comparison.base.model.vocab_size
    )
    book = store.Store(folder, reuse=reuse)
    book.check_text(corpus)
    book.share_programs()
    seconds = _seconds(comparison, arms, book, corpus)
    grid.check_same(comparison, book.rows(), seconds=seconds)
    longest = grid.most_tokens(comparison, arms=arms, seconds=seconds)
    if longest > len(corpus.train):
        print(
            f"note: the longest trial reads {longest:,} tokens, the training text has "
            f"{len(corpus.train):,}: some of it is seen again"
        )
    store.fill(
        book,
        lambda rows: grid.missing(comparison, rows, arms=arms, seconds=seconds),
        lambda missing: trial.run(missing, corpus),
    )


def _seconds(
    comparison: grid.Comparison,
    arms: tuple[grid.Arm, ...],
    book: store.Store,
    corpus: data.Corpus,
) -> dict[str, list[float]] | None:
    """Times per step of these arms, measured once, where a protocol asks for them."""
    if "seconds" not in comparison.protocols:
        return None
    path, reference = book.folder / "seconds.json", comparison.reference
    with book.hold("seconds"):
        known = json.loads(path.read_text()) if path.exists() else {}
        rows = book.rows().values()
        trained = sorted(
            {row["arm"] for row in rows} & {a.name for a in comparison.arms}
        )
        errors.check(
            "--results",
            set(trained) <= set(known),
            f"{path} is gone, or lacks one of {', '.join(trained)}: their lengths were "
            "made of it; restore it, or choose another folder",
        )
        trials = {
            arm.name: comparison.trial(arm, arm.rates[0], comparison.seeds[0])
            for arm in comparison.arms
            if arm.name == reference or (arm in arms and arm.name not in known)
        }
        if set(trials) - set(known):
            print("measuring the time per step of the arms: keep the machine quiet")
            taken = trial.seconds_per_step(trials, corpus)
            # What stands is what horizons were made of; an arm that is new is measured
            # beside the reference, as the machine may be another one by now.
            scale = known.get(reference, taken[reference])[0] / taken[reference][0]
            scaled = {name: [scale * t for t in pair] for name, pair in taken.items()}
            known = scaled | known
            metrics.replace_text(path, json.dumps(known, indent=2) + "\n")
    return known


if __name__ == "__main__":
    sys.exit(main())
