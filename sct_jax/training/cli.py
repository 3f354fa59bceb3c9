"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
sct-train --config=my_config.py --config.seed=1
"""

import os
import sys
from collections.abc import Sequence

# Silences JAX about absent accelerators, and TFDS about TensorFlow. JAX sets "1".
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

from sct_jax import errors
from sct_jax.training import loop, overrides, signals


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of a run.

    0 finished (or finished earlier), 1 diverged, 2 bad input, 130 after SIGINT and 143
    after SIGTERM, both once the state is saved.

    Args:
      argv: command line without the program; `sys.argv[1:]` if None.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with overrides.notes_on_renames():
        experiment, workdir, flags = overrides.parse_experiment(
            arguments, __doc__ or ""
        )
    try:
        result = loop.train(experiment, workdir, dry_run=flags.dry_run)
    except errors.UserError as error:
        overrides.fail(str(error))
    if result.signal is not None:
        return signals.exit_code(result.signal)
    return 1 if result.status == "diverged" else 0
