"""Exports a trained model to a format of Hugging Face.

python -m experiments.export --workdir=runs/smollm_r128-tiny --to=tiny --format=merged

"merged" is a plain Llama or Qwen3: factors are multiplied out, one shard at a time.
"factors" keeps them, in two linear layers per matrix, with the code that computes them.
The exit code is 0, or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.export")

import math
import os
import pathlib
import sys
from collections.abc import Sequence

from sct_jax import errors, paths
from sct_jax.interop import exporting, model_card
from sct_jax.training import overrides, workdir


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--workdir", help="a run, with a checkpoint", required=True)
    parser.add_argument("--to", help="folder to make; must not exist", required=True)
    parser.add_argument(
        "--format", help=f"one of: {', '.join(exporting.FORMATS)}", required=True
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help=f"of the tensors, one of: {', '.join(exporting.DTYPES)}",
    )
    parser.add_argument(
        "--max_shard_gb",
        type=float,
        default=exporting.MAX_SHARD_BYTES / 1e9,
        help="most gigabytes of a file of tensors, and of memory for it (default: 5)",
    )
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        folder = export_workdir(
            flags.workdir,
            flags.to,
            form=flags.format,
            dtype=flags.dtype,
            max_shard_gb=flags.max_shard_gb,
        )
    except errors.UserError as error:
        overrides.fail(str(error))
    process.say(describe(folder))
    return 0


def export_workdir(
    path: str, to: str, *, form: str, dtype: str, max_shard_gb: float
) -> pathlib.Path:
    """Writes the newest checkpoint of a run to a new folder, and returns that.

    Args:
      path: workdir of the run.
      to: folder to make.
      form: from `exporting.FORMATS`.
      dtype: from `exporting.DTYPES`.
      max_shard_gb: most gigabytes of a file of tensors.

    Raises:
      UserError: there is no checkpoint, the folder exists or cannot be written, or
        the format has no such model.
    """
    errors.check_choice("--format", form, exporting.FORMATS)
    errors.check_choice("--dtype", dtype, exporting.DTYPES)
    errors.check(
        "--max_shard_gb",
        0 < max_shard_gb < math.inf,
        f"{max_shard_gb} must be above 0 and finite",
    )
    errors.check("--to", to != "", "must not be empty; name a folder")
    written = paths.expand("--to", to)
    workdir.check_new(pathlib.Path(written), flag="--to")
    # Absolute, so that "." and "run/" have a name to write beside.
    folder = pathlib.Path(os.path.abspath(written))
    run, record = workdir.load_with_record(path)
    source = pathlib.Path(paths.expand("--workdir", path))
    progress = model_card.read_progress(source, record, seq_len=run.config.data.seq_len)
    card = model_card.write(
        run,
        name=folder.name,
        form=form,
        dtype=dtype,
        progress=progress,
    )
    exporting.export(
        run,
        folder,
        form=form,
        card=card,
        dtype=dtype,
        max_shard_bytes=int(max_shard_gb * 1e9),
    )
    return folder


def describe(folder: pathlib.Path) -> str:
    """Returns a line about what was written."""
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return f"{folder}: {len(sizes)} files, {sum(sizes):,} bytes"
