"""The program that continues text, on a run and on an exported checkpoint."""

import io
import json

import jax
import pytest
import samples
import saved_runs

from experiments import export, generate
from sct_jax import decode, errors, sampling
from sct_jax.training import workdir

SEQ_LEN = 24
COLD = ["--temperature=0", "--num_tokens=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def saved(folder):
    corpus = samples.write_corpus(folder / "corpus", files=40)
    settings = saved_runs.config(corpus, folder / "cache", seq_len=SEQ_LEN)
    return saved_runs.write(folder / "run", settings)


@pytest.fixture(scope="module")
def wanted(saved):
    """What follows two prompts, likeliest tokens only."""
    run = workdir.load_run(saved)
    mark = run.tokenizer.document_mark
    ids = decode.generate(
        run.params,
        run.config.model,
        [[mark, *run.tokenizer.encode(prompt)] for prompt in ("kato", "Wö")],
        num_tokens=6,
        key=jax.random.key(0),
        sampler=sampling.SamplingConfig(temperature=0.0),
        stop=[mark],
    )
    return [run.tokenizer.decode(row) for row in ids]


def test_a_prompt_is_continued_as_it_is_written(saved, wanted, capsys):
    flags = [f"--workdir={saved}", "--prompt=kato", *COLD]
    assert generate.main(flags) == 0
    captured = capsys.readouterr()
    assert captured.out == f"kato{wanted[0]}\n"
    assert "tokens; the first after" in captured.err


def test_several_prompts_are_continued_together(saved, wanted, capsys, tmp_path):
    path = tmp_path / "texts.json"
    prompts = ["--prompt=kato", "--prompt=Wö"]
    flags = [f"--workdir={saved}", *prompts, *COLD, "--latent_cache", f"--json={path}"]
    assert generate.main(flags) == 0
    assert capsys.readouterr().out == f"kato{wanted[0]}\nWö{wanted[1]}\n"
    written = json.loads(path.read_text())
    assert written["texts"] == wanted
    decoded = workdir.load_run(saved).tokenizer.decode
    assert [decoded(row) for row in written["ids"]] == wanted


def test_an_exported_checkpoint_continues_as_its_run(saved, wanted, capsys, tmp_path):
    target = tmp_path / "checkpoint"
    flags = [f"--workdir={saved}", f"--to={target}", "--format=merged"]
    assert export.main(flags) == 0
    assert generate.main([f"--hf={target}", "--prompt=kato", *COLD]) == 0
    assert capsys.readouterr().out == f"kato{wanted[0]}\n"


def test_a_checkpoint_may_have_its_tokenizer_elsewhere(saved, wanted, capsys, tmp_path):
    target, file = tmp_path / "checkpoint", tmp_path / "elsewhere.json"
    flags = [f"--workdir={saved}", f"--to={target}", "--format=merged"]
    assert export.main(flags) == 0
    (target / "tokenizer.json").rename(file)
    flags = [f"--hf={target}", "--prompt=kato", *COLD]
    with pytest.raises(SystemExit) as end:
        generate.main(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"--hf: {target} has no tokenizer.json; name one with --tokenizer" in error
    assert generate.main([*flags, f"--tokenizer={file}"]) == 0
    assert capsys.readouterr().out == f"kato{wanted[0]}\n"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has neither model.safetensors nor"),
    ],
)
def test_the_flag_of_a_damaged_checkpoint_is_named(
    saved, capsys, tmp_path, removed, message
):
    target = tmp_path / "checkpoint"
    flags = [f"--workdir={saved}", f"--to={target}", "--format=merged"]
    assert export.main(flags) == 0
    (target / removed).unlink()
    with pytest.raises(SystemExit) as end:
        generate.main([f"--hf={target}", "--prompt=kato"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"error: --hf: {target} {message}" in error


def test_a_prompt_comes_from_a_file_or_a_pipe(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("from a file")
    assert generate.read_prompts([], str(path), io.StringIO("")) == ["from a file"]
    assert generate.read_prompts([], None, io.StringIO("piped")) == ["piped"]
    assert generate.read_prompts(["a", "b"], None, io.StringIO("")) == ["a", "b"]


def test_a_closed_standard_input_has_no_prompt():
    with pytest.raises(errors.UserError, match="--prompt: give a prompt"):
        generate.read_prompts([], None, None)


def test_a_pipe_of_other_bytes_is_refused():
    pipe = io.TextIOWrapper(io.BytesIO(b"ka\xff"), encoding="utf-8", errors="strict")
    with pytest.raises(errors.UserError, match="--prompt: is not UTF-8"):
        generate.read_prompts([], None, pipe)


@pytest.mark.parametrize(
    ("given", "file", "message"),
    [
        ([""], None, "--prompt: is empty"),
        ([], None, "--prompt: is empty"),
        (["a"], "b", "give only one of them"),
        ([], "/nowhere/prompt.txt", "cannot read /nowhere/prompt.txt"),
        (["\udcff"], None, "is not UTF-8"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(given, file, message):
    with pytest.raises(errors.UserError, match=message):
        generate.read_prompts(given, file, io.StringIO(""))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=kato", "--num_tokens=60"], "60 must be in 1.."),
        (["--prompt=kato", "--num_tokens=0"], "0 must be in 1.."),
        ([f"--prompt={'木' * 30}"], "do not fit into the context of 24"),
        (["--prompt=kato", "--top_p=0"], "--top_p: 0.0 must be > 0"),
        (["--prompt=kato", "--top_p=x"], "--top_p"),
        (["--promt=kato"], "did you mean '--prompt'"),
        (["--prompt=kato", "--hf=/nowhere"], "and not both"),
        (["--prompt=kato", "--tokenizer=x.json"], "--tokenizer: belongs to --hf"),
        (["--prompt=kato", f"--seed={1 << 70}"], "--seed: "),
        (["--prompt=kato", "--seed=-1"], "--seed: -1 must be >= 0"),
    ],
)
def test_flags_that_cannot_be_met_exit_with_2(saved, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        generate.main([f"--workdir={saved}", *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_exits_with_2(capsys):
    for flags in (["--workdir=/nowhere"], ["--hf=/nowhere"], []):
        with pytest.raises(SystemExit) as end:
            generate.main([*flags, "--prompt=a"])
        assert end.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_characters_are_written_once_they_are_whole(saved):
    run, output = workdir.load_run(saved), io.StringIO()
    ids = run.tokenizer.encode("木 a")
    writer = generate._Writer(run.tokenizer, "", output)
    shown = []
    for end in range(1, len(ids) + 1):
        writer.write(ids[:end])
        shown.append(output.getvalue())
    assert shown[-1] == "木 a"
    assert all("木 a".startswith(text) for text in shown)
