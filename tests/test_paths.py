import pathlib

import pytest

from sct_jax import data, errors, paths


def test_a_home_folder_replaces_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert paths.expand("workdir", "~/x") == "/home/ada/x"
    assert paths.expand("workdir", pathlib.Path("~")) == "/home/ada"


@pytest.mark.parametrize("path", ["", "a/~/b", "./~", "/x~", "a b", "*.txt"])
def test_other_paths_stay(path):
    assert paths.expand("workdir", path) == path


@pytest.mark.parametrize("path", ["~", "~/x", "~nobody-of-this-name/x"])
def test_a_home_folder_that_nobody_has_is_refused(monkeypatch, path):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(errors.UserError, match=r"^data\.cache_dir: ") as caught:
        paths.expand("data.cache_dir", path)
    assert repr(path) in str(caught.value) and f"./{path}" in str(caught.value)


def test_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert paths.user_cache() == "/home/ada/elsewhere/sct_jax"
    for unset in (True, False):
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        if unset:
            monkeypatch.delenv("XDG_CACHE_HOME")
        assert paths.user_cache() == "/home/ada/.cache/sct_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.chdir(tmp_path)
    assert paths.user_cache() == str(tmp_path / "here" / "sct_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    with pytest.raises(errors.UserError, match=r"^XDG_CACHE_HOME: "):
        paths.user_cache()


def test_without_a_home_there_is_no_folder_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(errors.UserError, match=r"^data\.cache_dir: "):
        data.prepare(data.DataConfig(), vocab_size=300)
    assert not list(tmp_path.iterdir())
