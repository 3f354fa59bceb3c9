"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
python -m experiments.pretrain --config=configs/smollm_r128.py --config.seed=1
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.pretrain")

from sct_jax.training import cli

main = cli.main
