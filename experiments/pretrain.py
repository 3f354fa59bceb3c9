"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
python -m experiments.pretrain --config=configs/smollm_r128.py --config.seed=1
"""

import sys

from sct_jax.training import cli

main = cli.main

if __name__ == "__main__":
    sys.exit(cli.console_script())
