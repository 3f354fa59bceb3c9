"""The README's snippet runs as pasted, and what it names exists."""

import pathlib
import re

from sct_jax import spectral

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_snippet_runs_as_pasted():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["params"]["w"].u.shape == (512, 64)
    assert spectral.orthonormality_error(names["params"]) < 4e-6


def test_files_that_it_names_exist():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    paths = re.findall(r"`((?:configs|notebooks)/[\w/.]+)`", README)
    tree = README[README.index("## The tree") :].split("\n\n")[1]
    parts = [
        ("sct_jax/" if line.startswith(" " * 6) else "") + line.split()[0]
        for line in tree.splitlines()
    ]
    assert len(links) > 3 and len(paths) > 1 and len(parts) > 8
    for path in (*links, *paths, *parts):
        assert (ROOT / path).exists(), path


def test_it_is_a_front_page():
    assert len(README.splitlines()) <= 150
