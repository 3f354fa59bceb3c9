"""Numbers in prose are what they say: which arm, on which side, by how much."""

import functools
import pathlib
import re
from typing import NamedTuple

import pytest

from experiments.studies import summary
from sct_jax.training import metrics

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


class Gap(NamedTuple):
    """The loss of one arm less that of another, "study/arm" each; `sign`: its side."""

    arm: str
    other: str
    protocol: tuple[str, float]
    sign: int

    def __str__(self):
        """As prose has it, without the sign."""
        horizon = summary.horizon(*self.protocol)
        mean, error = summary.gap(_arm(self.arm), _arm(self.other), horizon)
        assert mean * self.sign > 0, self
        return f"{abs(mean):.3f} ± {error:.3f}"


class Loss(NamedTuple):
    """The loss of an arm, "study/arm"."""

    arm: str
    protocol: tuple[str, float]

    def __str__(self):
        """Mean and deviation."""
        return _arm(self.arm).with_error(summary.horizon(*self.protocol))


def _arm(name):
    study, _, arm = name.partition("/")
    return _arms_of(study)[arm]


@functools.cache
def _arms_of(study):
    comparison = RESULTS / f"compare_methods-{study}"
    folder = comparison if comparison.is_dir() else RESULTS / study
    rows = metrics.read_rows(folder / "runs.jsonl")
    return {arm.name: arm for arm in summary.arms(rows)}


BELOW, ABOVE = -1, 1
SHORT, AT_FLOPS, TEN = ("tokens", 0.4), ("flops", 0.4), ("flops", 10)
TEN_TOKENS, ONE = ("tokens", 10), ("tokens", 1)
OURS, MUON, ADAMW = "Stiefel Muon", "dense Muon", "dense AdamW"
NARROW, SPECTRON, SCT = "dense Muon (narrow)", "Spectron (code)", "SCT (s = 1)"


def _short(arm, other, sign):
    return Gap(f"short/{arm}", f"short/{other}", SHORT, sign)


def _decayed(arm, other, sign):
    study = "long_decay/{}: decay .9"
    return Gap(study.format(arm), study.format(other), TEN, sign)


def _by_decay(arm, sign):
    return Gap(f"long_decay/{arm}: decay .9", f"long/{arm}", TEN, sign)


def _against_own_decay(other, sign=ABOVE):
    return Gap(f"long_decay/{OURS}: decay .9", f"long/{other}", TEN, sign)


def _changed(change, sign, arm=OURS):
    plain = f"recipe_long/{arm}"
    return Gap(f"{plain}: {change}", plain, TEN_TOKENS, sign)


# Of a page all prose that has a number with an error, with what the numbers are.
BEST = "momentum .9 + normalised q and k"
SENTENCES = {
    ROOT / "README.md": [
        ("{} below dense AdamW with 55 %", _short(OURS, ADAMW, BELOW)),
        ("dense Muon ({} below it,", _short(OURS, MUON, BELOW)),
        ("takes {} off Stiefel Muon", _by_decay(OURS, BELOW)),
        (
            "AdamW, it is {} below the one with that schedule and {} above the one "
            "with its own",
            _decayed(OURS, ADAMW, BELOW),
            _against_own_decay(ADAMW),
        ),
        (
            "bfloat16 moments do not change the loss: over three seeds, {} nats per "
            "token on held-out text against {} with float32",
            Loss("recipe/SCT (dense spectrum): bfloat16 moments", SHORT),
            Loss("recipe/SCT (dense spectrum)", SHORT),
        ),
    ],
    RESULTS / "README.md": [
        (
            "Stiefel Muon is {} above it, at equal tokens {} above it.",
            Gap(f"small/{OURS}", f"small/{NARROW}", AT_FLOPS, ABOVE),
            Gap(f"small/{OURS}", f"small/{NARROW}", SHORT, ABOVE),
        ),
        (
            "At equal tokens Stiefel Muon has the least loss, {}: {} below dense "
            "AdamW, {} below the narrow dense model, and {} below dense Muon,",
            Loss(f"short/{OURS}", SHORT),
            _short(OURS, ADAMW, BELOW),
            _short(OURS, NARROW, BELOW),
            _short(OURS, MUON, BELOW),
        ),
        (
            "Spectron is {} below dense AdamW, SCT {} above it.",
            _short(SPECTRON, ADAMW, BELOW),
            _short(SCT, ADAMW, ABOVE),
        ),
        (
            "Stiefel Muon ({}), Spectron ({}) and the narrow model ({}) are level",
            *(Loss(f"short/{arm}", AT_FLOPS) for arm in (OURS, SPECTRON, NARROW)),
        ),
        (
            "Stiefel Muon from {} to {}, dense Muon from {} to {}, and the narrow one "
            "to {}.",
            Loss(f"recipe/{OURS}", SHORT),
            Loss(f"recipe/{OURS}: {BEST}", SHORT),
            Loss(f"recipe/{MUON}", SHORT),
            Loss(f"recipe/{MUON}: {BEST}", SHORT),
            Loss(f"recipe/{MUON}: {BEST} (narrow)", SHORT),
        ),
        (
            "level with it at equal FLOPs, {} and {}.",
            Loss(f"recipe/{OURS}: {BEST}", AT_FLOPS),
            Loss(f"recipe/{MUON}: {BEST} (narrow)", AT_FLOPS),
        ),
        ("R = d/2 takes {} off,", _changed("R = d/2", BELOW)),
        ("over the last fifth, with {}.", _changed("decay .9", BELOW)),
        (
            "dense Muon, wide (+{}) or narrow (+{})",
            _changed("decay .9", ABOVE, MUON),
            _changed("decay .9", ABOVE, NARROW),
        ),
        (
            "The lossless retraction, as good as any in short runs, loses {}:",
            _changed("lossless", ABOVE),
        ),
        (
            "Stiefel Muon is at {}, {} below dense AdamW, {} above dense Muon and {} "
            "above the narrow dense model; Spectron is {} and SCT {} above it.",
            Loss(f"long_decay/{OURS}: decay .9", TEN),
            _decayed(OURS, ADAMW, BELOW),
            _decayed(OURS, MUON, ABOVE),
            _decayed(OURS, NARROW, ABOVE),
            _decayed(SPECTRON, OURS, ABOVE),
            _decayed(SCT, OURS, ABOVE),
        ),
        (
            "takes {} off Stiefel Muon and {} off Spectron, and adds {} to dense "
            "AdamW, {} to dense Muon and {} to the narrow one.",
            _by_decay(OURS, BELOW),
            _by_decay(SPECTRON, BELOW),
            _by_decay(ADAMW, ABOVE),
            _by_decay(MUON, ABOVE),
            _by_decay(NARROW, ABOVE),
        ),
        (
            "Stiefel Muon with the long one is {} above dense AdamW, {} above dense "
            "Muon and {} above the narrow dense model.",
            *map(_against_own_decay, (ADAMW, MUON, NARROW)),
        ),
        (
            "it does not: {} nats with the retraction, {} without, dense AdamW {}. At "
            "R = d/4 it helps: {} with, {} without;",
            *(
                Loss(f"ablation_retraction/{arm}", ONE)
                for arm in (
                    "full rank retracted",
                    "full rank free",
                    ADAMW,
                    "R = d/4 retracted",
                    "R = d/4 free",
                )
            ),
        ),
    ],
}


@pytest.mark.parametrize("page", SENTENCES)
def test_every_number_with_an_error_is_that_of_its_sentence(page):
    lines = page.read_text().splitlines()
    prose = " ".join(line for line in lines if not line.startswith("|"))
    for template, *values in SENTENCES[page]:
        sentence = template.format(*values)
        assert sentence in prose
        prose = prose.replace(sentence, "")
    assert not re.findall(r"\d ± \d", prose)
