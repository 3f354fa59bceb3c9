"""Runs lm-evaluation-harness with one more model, `sct_jax`.

python -m sct_jax.interop.harness run --model sct_jax --tasks lambada_openai \
  --model_args workdir=runs/smollm_r128-tiny

The harness looks for no models of other packages, so this command tells it of ours and
hands over its flags. The exit code is that of the harness, or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("sct_jax.interop.harness")

import sys

from sct_jax import errors
from sct_jax.training import overrides

MODEL = "sct_jax"


def register() -> None:
    """Tells the harness of the model, so that `model="sct_jax"` finds it.

    Raises:
      UserError: the harness is not installed.
    """
    try:
        from lm_eval.api import registry  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise errors.UserError(
            f"lm_eval: cannot be imported ({error}); install it with "
            "pip install 'sct_jax[eval]'"
        ) from error
    if MODEL not in registry.model_registry:
        registry.model_registry.register(
            MODEL, target="sct_jax.interop.harness_model:HarnessModel"
        )


def main() -> int:
    """Runs the command line of the harness; exits with code 2 for bad input."""
    sys.argv[0] = "sct_jax.interop.harness"  # for its help
    try:
        register()
        import lm_eval.__main__  # pyright: ignore[reportMissingImports]

        lm_eval.__main__.cli_evaluate()
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0
