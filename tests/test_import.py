"""Checkpoints of Hugging Face, imported and compared with transformers and torch."""

import dataclasses
import io
import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import samples

from experiments import convert
from sct_jax import compression, data, errors, model, rank, sharding, spectral
from sct_jax.interop import importing, source
from sct_jax.training import (
    accounting,
    array_files,
    cli,
    loop,
    metrics,
    optimizer_config,
    origin,
    trainer,
    workdir,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

LENGTH = 24
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0}
KINDS = {
    "untied": ("Llama", {}, {}),
    "tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    "head_dim": ("Llama", {"head_dim": 12}, {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}, {}),
    "linear": ("Llama", {"rope_parameters": LINEAR}, {}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1]}, {}),
    "sharded": ("Llama", {}, {"max_shard_size": "10KB"}),
    "bfloat16": ("Llama", {}, {"dtype": torch.bfloat16}),
    "float16": ("Qwen3", {"head_dim": 8}, {"dtype": torch.float16}),
}


def save(folder, kind, changes, *, dtype=torch.float32, **options):
    """A random model, saved; norms differ from 1 so that each of them counts."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    net = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    net.to(dtype).save_pretrained(folder, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.train(["kato mi ren lu sha"] * 10, vocab_size=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """The folder of each kind; not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    for name, (kind, changes, options) in KINDS.items():
        save(root / name, kind, changes, **options)
        tokenizer.save(str(root / name / "tokenizer.json"))
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the sharded one, which may be changed."""
    shutil.copytree(folders / "sharded", tmp_path / "hub")
    return tmp_path / "hub"


def tokens():
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, LENGTH))


def their_logits(folder):
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return net(torch.tensor(tokens())).logits.numpy()


def our_logits(params, config):
    run = jax.jit(lambda params, ids: model.forward(params, ids, config))
    return run(params, jnp.asarray(tokens(), jnp.int32))


def every(rule):
    return dict.fromkeys(model.BLOCK_MATRICES, rule)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(folders, kind):
    opened = source.open_folder(folders / kind)
    imported = importing.load(opened, {})
    assert imported.config == dataclasses.replace(opened.config, scan_layers=False)
    assert imported.config.spectral == () and not imported.truncations
    theirs = their_logits(folders / kind)
    assert np.std(theirs) > 0.5
    ours = our_logits(imported.params, imported.config)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_logits_at_full_rank_are_those_of_transformers(folders):
    kind = "qwen3"
    everything = {
        name: importing.Rule(rank=1000)
        for name in source.open_folder(folders / kind).config.matrix_shapes()
    }
    imported = importing.load(source.open_folder(folders / kind), everything)
    assert len(imported.notes) == len(everything)
    assert "rank 1000 is clamped to 32, as the matrix is 32 x 48" in str(imported.notes)
    assert all(max(found.errors) < 1e-5 for found in imported.truncations)
    ours = our_logits(imported.params, imported.config)
    np.testing.assert_allclose(ours, their_logits(folders / kind), atol=1e-4)


def tensor(folder, name):
    for file in folder.glob("*.safetensors"):
        found = safetensors_torch.load_file(file)
        if name in found:
            return found[name].float()
    raise KeyError(name)


def test_a_truncated_matrix_is_that_of_torch(folders):
    path = folders / "sharded"
    rules = {"down": importing.Rule(rank=5), "q": importing.Rule(rank_ratio=0.25)}
    imported = importing.load(source.open_folder(path), rules)
    assert imported.config.matrix_rank("down") == 5
    assert imported.config.matrix_rank("q") == 8
    assert imported.config.matrix_rank("k") is None
    modules = {"down": ("mlp.down_proj", 5), "q": ("self_attn.q_proj", 8)}
    for found in imported.truncations:
        module, rank = modules[found.name]
        for layer, block in enumerate(imported.params[model.LAYERS]):
            w = tensor(path, f"model.layers.{layer}.{module}.weight").T
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
            factors = block[found.name]
            assert factors.s.shape == (rank,)
            np.testing.assert_allclose(
                spectral.to_dense(factors), expected.numpy(), atol=1e-4
            )
            assert spectral.orthonormality_error(factors) < 1e-5
            kept = float((s[:rank] ** 2).sum() / (s**2).sum())
            assert found.energies[layer] == pytest.approx(kept, abs=1e-5)
            assert found.errors[layer] == pytest.approx((1 - kept) ** 0.5, abs=1e-5)


def test_layers_share_the_largest_rank_that_an_energy_needs(folders):
    path = folders / "untied"
    rules = every(importing.Rule(energy=0.9)) | {"o": importing.Rule(rank=3)}
    imported = importing.load(source.open_folder(path), rules, scan_layers=True)
    by_name = {found.name: found for found in imported.truncations}
    firsts = set()
    for name in ("gate", "up"):
        needed = []
        for layer in range(2):
            w = tensor(path, f"model.layers.{layer}.mlp.{name}_proj.weight")
            sums = np.cumsum(np.linalg.svd(w.numpy())[1] ** 2)
            needed.append(1 + int(np.argmax(sums >= 0.9 * sums[-1])))
        assert imported.config.matrix_rank(name) == max(needed)
        assert all(energy >= 0.9 - 1e-5 for energy in by_name[name].energies)
        firsts.add(needed[0] - needed[1])
    assert min(firsts) < 0 < max(firsts), "the largest is first, and last"
    assert imported.config.matrix_rank("o") == 3
    stacked = model.stack_layers(imported.params)  # raises where shapes differ
    assert stacked[model.LAYERS]["up"].s.shape == (2, max(needed))


def test_one_tensor_is_read_at_a_time(folders, monkeypatch):
    """Dense or not, each tensor is read once; an energy needs one more pass."""
    read, names_read = source.Source.read, []

    def counted(self, tensor):
        names_read.append(tensor.name)
        return read(self, tensor)

    monkeypatch.setattr(source.Source, "read", counted)
    opened = source.open_folder(folders / "untied")
    importing.load(opened, {"q": importing.Rule(rank=2)})
    assert len(names_read) == len(set(names_read)) == len(opened.places)
    importing.load(opened, {"q": importing.Rule(energy=0.5)})
    assert len(names_read) == 2 * len(opened.places) + 2


def text_of(config, *, seed=0):
    ids = jax.random.randint(jax.random.key(seed), (4, 32), 0, config.vocab_size)
    return compression.Text([ids])


@pytest.mark.parametrize("rule", [{"rank": 6}, {"energy": 0.7}], ids=str)
def test_text_decides_what_a_rank_keeps(folders, rule):
    """As truncation of the dense model does, one layer in memory at a time."""
    opened = source.open_folder(folders / "untied")
    text = text_of(opened.config)
    found = importing.load(opened, every(importing.Rule(**rule)), text=text)
    dense = importing.load(opened, {})
    dense = dense._replace(params=jax.tree.map(jnp.asarray, dense.params))
    if "energy" in rule:
        inputs = compression.Inputs(dense.params["embedding"], text, dense.config)
        needed = dict.fromkeys(model.BLOCK_MATRICES, 1)
        for layer in dense.params["layers"]:
            for name, moment in inputs.second_moments(layer).items():
                kept = spectral.from_dense(
                    layer[name], energy=0.7, second_moment=moment
                )
                needed[name] = max(needed[name], kept.s.shape[-1])
            inputs.advance(layer)
        assert needed == {n: found.config.matrix_rank(n) for n in needed}
    expected = compression.truncate(dense.params, dense.config, found.config, text=text)
    for layer, other in zip(found.params["layers"], expected["layers"], strict=True):
        for name in model.BLOCK_MATRICES:
            np.testing.assert_allclose(
                spectral.to_dense(layer[name]),
                spectral.to_dense(other[name]),
                atol=1e-4,
            )


def outputs_of(params, config, text):
    """Outputs of every matrix of the layers, in the order of computation."""
    found = []

    def linear(x, w):
        found.append(np.asarray(spectral.linear(x, w), np.float64))
        return spectral.linear(x, w)

    config = dataclasses.replace(config, remat="none", scan_layers=False)
    params = jax.tree.map(jnp.asarray, params)
    model.hidden(params, text.tokens[0], config, linear=linear)
    return found


@pytest.mark.parametrize("also", [(), ("embedding",)])
def test_errors_are_of_the_outputs_on_the_text(folders, also):
    """Those before a matrix included, which it cannot wholly make up for."""
    opened = source.open_folder(folders / "untied")
    text = text_of(opened.config)
    rules = every(importing.Rule(rank=6)) | dict.fromkeys(also, importing.Rule(rank=20))
    found = importing.load(opened, rules, text=text)
    dense = importing.load(opened, {})
    pairs = zip(
        outputs_of(found.params, found.config, text),
        outputs_of(dense.params, dense.config, text),
        strict=True,
    )
    lost = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]
    by_name = {truncation.name: truncation for truncation in found.truncations}
    for place, name in enumerate(model.BLOCK_MATRICES):
        np.testing.assert_allclose(
            by_name[name].errors, lost[place :: len(model.BLOCK_MATRICES)], rtol=1e-3
        )


@pytest.mark.parametrize("with_text", [False, True])
def test_a_budget_goes_where_it_keeps_the_most(folders, with_text):
    opened = source.open_folder(folders / "untied")
    text = text_of(opened.config) if with_text else None
    wanted = every(importing.Rule())
    found = importing.load(opened, wanted, budget=0.4, text=text)
    shapes, config = found.config.matrix_shapes(), found.config
    dense = sum(math.prod(shapes[name]) for name in wanted)
    spent = sum(config.matrix_rank(n) * (sum(shapes[n]) + 1) for n in wanted)
    assert 0.35 * dense < spent <= 0.4 * dense
    whole = importing.load(opened, {})
    whole = whole._replace(params=jax.tree.map(jnp.asarray, whole.params))
    inputs = text and compression.Inputs(whole.params["embedding"], text, whole.config)
    matrices = compression.matrices_of(
        whole.params["layers"], tuple(wanted), inputs=inputs
    )
    spectra = compression.spectra(matrices, whole.config)
    size = int(0.4 * config.num_layers * dense)
    expected = compression.allocate(spectra, budget=size)
    assert {name: config.matrix_rank(name) for name in wanted} == expected


# --- The command.


def test_text_may_be_shorter_than_a_window(folders, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("kato mi ren")
    out = run(
        f"--from={folders / 'tied'}",
        "--rank=4",
        f"--text={words}",
        f"--workdir={tmp_path / 'run'}",
        capsys=capsys,
    )
    assert "error of outputs on the text" in out


def test_the_command_reads_text(folders, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(samples_of_text()) * 50)
    common = (f"--from={folders / 'tied'}", "--budget=.3", "--scan-layers")
    given = [f"--text={words}", "--text-tokens=2048"]
    for name, flags in {"plain": [], "text": given}.items():
        out = run(*common, f"--workdir={tmp_path / name}", *flags, capsys=capsys)
        assert ("error of outputs on the text" in out) == (name == "text")
    plain, read = (workdir.load_run(tmp_path / name) for name in ("plain", "text"))
    # Outputs on that text are closer than with the nearest matrix of that rank.
    dense = importing.load(source.open_folder(folders / "tied"), {})
    ids = jnp.asarray([read.tokenizer.encode(words.read_text())[:512]])
    inputs = compression.Inputs(
        jnp.asarray(dense.params["embedding"]),
        compression.Text([ids]),
        dense.config,
    )
    w = dense.params["layers"][0]["gate"]
    moment = np.asarray(inputs.second_moments(dense.params["layers"][0])["gate"])
    factors = jax.tree.map(lambda x: x[0], read.params["layers"]["gate"])
    alike = spectral.from_dense(jnp.asarray(w), rank=factors.s.shape[0])
    lost = [
        np.vdot(error, moment @ error)
        for error in (w - np.asarray(spectral.to_dense(f)) for f in (factors, alike))
    ]
    assert lost[0] < lost[1]
    assert accounting.parameters(read.config.model) == pytest.approx(
        accounting.parameters(plain.config.model), rel=0.01
    )


def run(*argv, capsys):
    code = convert.main(list(argv))
    out = capsys.readouterr()
    assert code == 0, out
    return out.out


def test_the_command_writes_a_run(folders, tmp_path, capsys, tokenizer):
    path = tmp_path / "a" / "run"
    out = run(
        f"--from={folders / 'sharded'}",
        f"--workdir={path}",
        "--rank=1000",
        "--matrix=down:rank-ratio=.125",
        "--matrix=embedding:energy=.9",
        "--scan-layers",
        capsys=capsys,
    )
    assert "note: q: rank 1000 is clamped to 32" in out
    assert "down" in out and "48 x 32" in out
    assert os.listdir(path.parent) == ["run"]
    config, params, kept = workdir.load_run(path)
    assert kept.hash == tokenizer.hash
    assert config.data.seq_len == 64
    assert config.data.tokenizer == str(path / "tokenizer.json")
    assert config.model.scan_layers and not isinstance(params["layers"], tuple)
    assert params["layers"]["down"].s.shape == (2, 6)
    opened = source.open_folder(folders / "sharded")
    rules = every(importing.Rule(rank=1000)) | {
        "down": importing.Rule(rank=6),
        "embedding": importing.Rule(energy=0.9),
    }
    imported = importing.load(opened, rules)
    expected = model.stack_layers(imported.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture(scope="module")
def dense(folders, tmp_path_factory):
    """A dense run of the tied model."""
    path = tmp_path_factory.mktemp("dense") / "run"
    assert convert.main([f"--from={folders / 'tied'}", f"--workdir={path}"]) == 0
    return path


def test_a_dense_run_computes_what_transformers_does(dense, folders):
    config, params, _ = workdir.load_run(dense)
    assert config.model.spectral == () and isinstance(params["layers"], tuple)
    ours = our_logits(params, config.model)
    np.testing.assert_allclose(ours, their_logits(folders / "tied"), atol=1e-4)


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as ended:
        convert.main(list(argv))
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def edit_json(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))


def edit_tensor(folder, change):
    """Rewrites the shard with q of layer 0, its tensors changed."""
    index = json.loads((folder / source.INDEX).read_text())["weight_map"]
    file = folder / index["model.layers.0.self_attn.q_proj.weight"]
    found = safetensors_torch.load_file(file)
    change(found, "model.layers.0.self_attn.q_proj.weight")
    safetensors_torch.save_file(found, file)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def poison(value):
    def change(found, name):
        found[name][0, 3] = value

    return lambda folder: edit_tensor(folder, change)


def as_pickles(folder):
    for file in (*shards(folder), folder / source.INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def truncate(folder):
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 7)


def index_elsewhere(folder):
    edit_json(folder / source.INDEX, weight_map={"lm_head.weight": "../x.safetensors"})


def index_of_no_text(folder):
    edit_json(folder / source.INDEX, weight_map={"lm_head.weight": "\ud800"})


def as_a_pipe(folder):
    shards(folder)[1].unlink()
    os.mkfifo(folder / "model-00002-of-00012.safetensors")


DAMAGE = {
    "missing shard": (
        lambda f: shards(f)[1].unlink(),
        "model-00002-of-00012.safetensors: is missing",
    ),
    "truncated": (truncate, "model-00002-of-00012.safetensors: cannot be read"),
    "NaN": (poison(float("nan")), "q_proj.weight: holds NaN or infinity"),
    "infinite": (poison(float("inf")), "q_proj.weight: holds NaN or infinity"),
    "wrong shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=40),
        "has shape (48, 32), and config.json describes (40, 32)",
    ),
    "integers": (
        lambda f: edit_tensor(
            f, lambda found, name: found.update({name: found[name].to(torch.int8)})
        ),
        "q_proj.weight: has dtype I8",
    ),
    "missing tensor": (
        lambda f: edit_tensor(f, lambda found, name: found.pop(name)),
        "lacks model.layers.0.self_attn.q_proj.weight, see",
    ),
    "another tensor": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        "has no place for: model.layers.1.input_layernorm.weight, ",
    ),
    "untied head": (
        lambda f: edit_json(f / "config.json", tie_word_embeddings=True),
        "lm_head.weight: differs from model.embed_tokens.weight",
    ),
    "architecture": (
        lambda f: edit_json(f / "config.json", architectures=["GPT2LMHeadModel"]),
        "config.json: architectures: ['GPT2LMHeadModel'] is not computed here",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: is not a JSON object",
    ),
    "pickles": (as_pickles, "has pytorch_model.bin, a pickle"),
    "index": (index_elsewhere, "weight_map: is not a map"),
    "index of no text": (index_of_no_text, "weight_map: is not a map"),
    "pipe": (as_a_pipe, "00002-of-00012.safetensors: cannot be read ([Errno 22] Not a"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer.json; name one with --tokenizer=FILE",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "another one of the same ids with --tokenizer=FILE",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_folder_is_refused(folder, tmp_path, capsys, kind):
    damage, said = DAMAGE[kind]
    damage(folder)
    path = tmp_path / "out" / "run"
    argv = (f"--from={folder}", f"--workdir={path}", "--rank=3")
    assert said in refused(capsys, *argv)
    assert not path.parent.exists()


def test_a_vocabulary_beyond_the_model_is_refused(folder, tmp_path, capsys):
    larger = data.Tokenizer.train(samples_of_text(), vocab_size=400)
    assert larger.vocab_size > SHAPE["vocab_size"]
    larger.save(str(tmp_path / "larger.json"))
    message = refused(
        capsys,
        f"--from={folder}",
        f"--workdir={tmp_path / 'run'}",
        f"--tokenizer={tmp_path / 'larger.json'}",
    )
    assert message.startswith("--tokenizer: ") and "320 tokens" in message


def samples_of_text():
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (200, 40), np.uint8)
    return [row.tobytes().decode() for row in letters] * 3


def test_a_workdir_that_exists_is_refused(folders, tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    message = refused(capsys, f"--from={folders / 'tied'}", f"--workdir={path}")
    assert message == f"--workdir: {path} exists; remove it, or name another"
    assert os.listdir(tmp_path) == ["run"] and not os.listdir(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--workdir: must not be empty"),
        ("gs://bucket/run", "--workdir: gs:/bucket/run looks like the address of a st"),
        ("file/deep/run", "/file: Not a directory; name another folder"),
    ],
)
def test_a_workdir_that_cannot_be_made_is_refused_before_the_import(
    folders, tmp_path, monkeypatch, capsys, name, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(source.Source, "read", lambda *_: pytest.fail("was read"))
    found = refused(capsys, f"--from={folders / 'tied'}", f"--workdir={name}")
    assert message in found
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_is_left_where_writing_fails(folders, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_files, "write", fail)
    path = tmp_path / "run"
    argv = [f"--from={folders / 'tied'}", f"--workdir={path}"]
    assert convert.main(argv) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank=0"], "--rank: 0 must be >= 1"),
        (["--energy=1.5"], "--energy: 1.5 must be > 0 and <= 1"),
        (
            ["--rank=3", "--energy=.5"],
            "--rank: set one of rank, rank_ratio, energy, not rank and energy",
        ),
        (["--matrices=q"], "--matrices: has no effect alone"),
        (["--budget=0"], "--budget: 0.0 must be > 0 and <= 1"),
        (["--budget=.001"], "--budget: "),
        (["--budget=.5", "--rank=3"], "--budget: chooses the ranks itself"),
        (["--budget=.5", "--matrices=embedding"], "--budget: is shared by matrices of"),
        (
            ["--text=x.txt"],
            "--text: has no effect without a rank; add --rank, --rank-ratio",
        ),
        (["--rank=3", "--text=no/such.txt"], "--text: data.source: "),
        (["--rank=3", "--text_tokens=9"], "--text-tokens: has no effect without"),
        (["--rank=3", "--text=x.txt", "--text_tokens=0"], "--text_tokens: 0 must be"),
        (["--rank=3", "--matrices=query"], "--matrices: unknown value 'query'"),
        (["--matrix=down"], "--matrix=down: unknown value ''"),
        (["--matrix=x:rank=3"], "unknown value 'x'"),
        (["--matrix=q:rank=a"], "--matrix=q:rank=a: 'a' is not a value of type int"),
        (["--matrix=q:rank_ratio=0"], "rank_ratio: 0.0 must be > 0"),
        (["--rank_ratio=inf"], "--rank_ratio: inf must be > 0 and <= 1048576"),
        (["--matrix=head:rank=3"], "matrix 'head': the head of this model is its tr"),
    ],
)
def test_bad_flags_are_refused(folders, tmp_path, capsys, flags, said):
    path = tmp_path / "run"
    argv = (f"--from={folders / 'tied'}", f"--workdir={path}", *flags)
    assert said in refused(capsys, *argv)
    assert not path.exists()


# --- A run that starts from another.


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "run"
    argv = [f"--from={folders / 'tied'}", f"--workdir={path}", "--rank=4"]
    argv.append("--matrices=q,down")
    assert convert.main(argv) == 0
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return samples.write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def experiment(imported, corpus, tmp_path_factory):
    """A short run of the imported model, with stacked layers."""
    shape = workdir.load_run(imported).config.model
    return config_lib.ExperimentConfig(
        num_steps=3,
        log_every=1,
        model=dataclasses.replace(shape, scan_layers=True),
        data=data.DataConfig(
            source=corpus,
            batch_size=8,
            seq_len=16,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        ),
        optimizer=optimizer_config.Sct(warmup_steps=1, retraction="qr"),
        checkpoint=config_lib.CheckpointConfig(every=2),
        eval=config_lib.EvalConfig(every=100, num_batches=1),
    )


def train(config, path, **options):
    text = io.StringIO()
    result = loop.train(
        config, path, output=rich.console.Console(file=text, width=200), **options
    )
    return result, text.getvalue()


@pytest.fixture(scope="module")
def trained(experiment, imported, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "run"
    result, text = train(experiment, path, init_from=str(imported))
    assert result.status == "finished"
    assert f"starting from the parameters of step 0 in {imported}" in text
    return path


def test_a_run_starts_from_the_imported_parameters(
    trained, experiment, imported, tokenizer
):
    _, params, _ = workdir.load_run(imported)
    config, after, kept = workdir.load_run(trained)
    assert kept.hash == tokenizer.hash
    assert config.data.tokenizer == str(imported / "tokenizer.json")
    corpus = data.prepare(config.data, vocab_size=320, log=lambda _: None)
    batch = next(data.train_batches(corpus, config.data, seed=config.seed))
    before = dataclasses.replace(config.model, scan_layers=False)
    batch = jax.tree.map(jnp.asarray, batch)
    expected = jax.jit(lambda params: model.loss(params, batch, before))(params)
    rows = metrics.read_rows(trained / "metrics.jsonl")
    assert rows[0]["train/loss"] == pytest.approx(float(expected), rel=1e-4)
    moved = model.unstack_layers(after)["layers"][0]["q"].s
    assert not np.array_equal(moved, params["layers"][0]["q"].s)


def test_it_resumes_without_the_flag_and_tokenizer(
    trained, experiment, imported, tmp_path
):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    shutil.rmtree(path / "checkpoints" / "3")
    result, text = train(experiment, path)
    assert result.step == 3 and "resumed at step 2" in text
    assert "starting from" not in text
    with workdir.reading(path) as checkpoints:
        kept = workdir.origin_of(checkpoints.read_record(3))
    assert kept == {"workdir": str(imported), "step": 0}


def test_the_flag_is_ignored_once_there_are_steps(trained, experiment, tmp_path):
    result, text = train(experiment, trained, init_from=str(tmp_path / "none"))
    assert result.status == "finished"
    assert "note: --init-from has no effect" in text


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_run_starts_from_a_trained_one(trained, experiment, scan_layers, monkeypatch):
    """In either layout, on any mesh; its moments are not even read."""
    read, asked = array_files.read, []

    def reading(folder, target):
        asked.extend(target)
        return read(folder, target)

    monkeypatch.setattr(array_files, "read", reading)
    shape = dataclasses.replace(experiment.model, scan_layers=scan_layers)
    config = dataclasses.replace(experiment, model=shape)
    run = trainer.Trainer(config, sharding.MeshConfig(fsdp=-1, data=1).build())
    found, lines = origin.find(str(trained)), []
    state, _ = origin.start(run, found, text=None, log=lines.append)
    assert lines == [f"starting from the parameters of step 3 in {trained}"]
    assert any(name.startswith("params") for name in asked)
    assert not any(name.startswith("opt_state") for name in asked)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, run.abstract_state
    )
    expected = workdir.load_run(trained).params
    apart = model.unstack_layers({**state.params}), model.unstack_layers(expected)
    jax.tree.map(np.testing.assert_array_equal, *apart)
    fresh = state_lib.start(state.params, run.tx)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    assert state.step == 0 and state.guard.count == 0


def test_the_checkpoint_that_was_read_is_remembered(trained, experiment, tmp_path):
    """Not the newest one, which is damaged."""
    path = tmp_path / "damaged"
    shutil.copytree(trained, path)
    for file in (path / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[::-1])
    short = dataclasses.replace(experiment, num_steps=1)
    with pytest.warns(UserWarning, match="checkpoint 3 is damaged"):
        train(short, tmp_path / "run", init_from=str(path))
    kept = workdir.origin_of(workdir.newest_record(tmp_path / "run"))
    assert kept == {"workdir": str(path), "step": 2}


def refusal(config, path, **options) -> str:
    with pytest.raises(errors.UserError) as caught:
        train(config, path, **options)
    return str(caught.value)


def test_another_shape_is_refused(experiment, imported, tmp_path):
    shape = dataclasses.replace(experiment.model, d_ff=64, rank=5, norm_eps=1e-3)
    other = dataclasses.replace(experiment, model=shape)
    message = refusal(other, tmp_path / "run", init_from=str(imported))
    lines = message.splitlines()
    assert lines[0].startswith(f"--init-from: the model is not that of {imported}; ")
    assert f"  model.d_ff: 48 in {imported}, 64 now" in lines
    assert f"  model.norm_eps: 1e-06 in {imported}, 0.001 now" in lines
    assert len(lines) == 3
    assert not (tmp_path / "run").exists()


def test_another_base_of_rope_is_noted(experiment, imported, tmp_path):
    shape = dataclasses.replace(experiment.model, rope_theta=1e6)
    other = dataclasses.replace(experiment, model=shape)
    path = tmp_path / "run"
    result, text = train(other, path, init_from=str(imported), dry_run=True)
    assert result.status == "dry_run"
    assert f"model.rope_theta was 10000.0 in {imported}, and is 1000000.0 now" in text


def test_another_tokenizer_is_refused(experiment, imported, tmp_path):
    file = str(tmp_path / "other.json")
    data.Tokenizer.train(["other text"] * 9, vocab_size=290).save(file)
    settings = dataclasses.replace(experiment.data, tokenizer=file)
    other = dataclasses.replace(experiment, data=settings)
    message = refusal(other, tmp_path / "run", init_from=str(imported))
    assert message.startswith(f"data.tokenizer: {file!r} has hash ")
    assert str(imported / "tokenizer.json") in message


# --- The command takes the model of the run.

CONFIG = """
from sct_jax import data, model
from sct_jax.training import config, optimizer_config

def get_config():
    return config.ExperimentConfig(
        num_steps=3,
        log_every=1,
        model=model.ModelConfig(
            d_model=64,
            num_layers=1,
            rank=7,
            rope_theta=5e5,
            remat="none",
            scan_layers=False,
        ),
        data=data.DataConfig(
            source={source!r}, batch_size=8, seq_len=16, cache_dir={cache!r}
        ),
        optimizer=optimizer_config.Sct(warmup_steps=1, retraction="qr"),
        checkpoint=config.CheckpointConfig(every=2),
        eval=config.EvalConfig(every=100, num_batches=1),
    )
"""


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory):
    """A recipe for a model of another shape."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.py"
    path.write_text(CONFIG.format(source=corpus, cache=str(folder / "cache")))
    return path


@pytest.fixture(scope="module")
def started(config_file, imported, tmp_path_factory):
    path = tmp_path_factory.mktemp("started") / "run"
    flags = [f"--config={config_file}", f"--workdir={path}"]
    assert cli.main([*flags, f"--init-from={imported}"]) == 0
    return path


def test_the_model_and_the_tokenizer_are_those_of_the_run(started, imported):
    found, wanted = (workdir.load_run(path).config for path in (started, imported))
    own = {"remat": "none", "scan_layers": False}
    assert found.model == dataclasses.replace(wanted.model, **own)
    assert found.model.rope_theta == 10_000 and found.model.rank == 4
    assert found.data.tokenizer == str(imported / "tokenizer.json")


@pytest.mark.parametrize("with_flag", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_such_a_run_is_resumed_with_and_without_the_flag(
    started, config_file, imported, tmp_path, capsys, with_flag, lost
):
    path, source = tmp_path / "run", tmp_path / "imported"
    shutil.copytree(started, path)
    shutil.rmtree(path / "checkpoints" / "3")
    if lost:  # the other run, and its tokenizer
        values = json.loads((path / "config.json").read_text())
        values["data"]["tokenizer"] = str(source / "tokenizer.json")
        (path / "config.json").write_text(json.dumps(values))
    else:
        source = imported
    flags = [f"--config={config_file}", f"--workdir={path}"]
    assert cli.main([*flags, *[f"--init-from={source}"] * with_flag]) == 0
    printed = capsys.readouterr()
    assert "resumed at step 2" in printed.out
    assert ("--init-from has no effect" in printed.out) == with_flag
    assert workdir.load_run(path).config.model == workdir.load_run(started).config.model


def command(config_file, imported, tmp_path, *flags):
    return cli.main(
        [
            f"--config={config_file}",
            f"--workdir={tmp_path / 'run'}",
            f"--init-from={imported}",
            "--dry_run",
            *flags,
        ]
    )


def test_what_the_file_says_of_another_model_is_noted(
    config_file, imported, tmp_path, capsys
):
    assert command(config_file, imported, tmp_path) == 0
    (note,) = (
        line
        for line in capsys.readouterr().err.splitlines()
        if "configuration file" in line
    )
    named = note.partition("without effect in the configuration file: ")[2].split(", ")
    for name in ("d_model", "d_ff", "num_layers", "rank", "rope_theta", "norm_eps"):
        assert f"model.{name}" in named
    for name in ("remat", "scan_layers", "compute_dtype"):
        assert f"model.{name}" not in named
    assert str(imported) in note


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.d_ff=64", "model.d_ff: 48 in {}, 64 now"),
        (
            "--config.model.rank=5",
            "--init-from: {}: model.rank: 5 is above the rank 4 that 'q'",
        ),
        ("--config.model.tie_embeddings=false", "model.tie_embeddings: True in {}"),
        ("--config.model.vocab_size=512", "model.vocab_size: 320 in {}, 512 now"),
        ("--config.data.tokenizer={other}", "data.tokenizer: "),
        (
            "--config.model.factors=low_rank",
            "model.factors: 'low_rank' does not fit optimizer.name",
        ),
    ],
)
def test_a_flag_that_asks_for_another_model_is_refused(
    config_file, imported, tmp_path, capsys, flag, message
):
    other = tmp_path / "other.json"
    data.Tokenizer.train(["other text"] * 9, vocab_size=290).save(str(other))
    with pytest.raises(SystemExit) as end:
        command(config_file, imported, tmp_path, flag.format(other=other))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message.format(imported) in error
    assert str(imported) in error
    assert not (tmp_path / "run").exists()


def test_a_flag_that_agrees_or_changes_rope_is_taken(
    config_file, imported, tmp_path, capsys
):
    flags = ["--config.model.d_ff=48", "--config.model.rope_theta=2e4"]
    assert command(config_file, imported, tmp_path, *flags) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "model.rope_theta was 10000.0" in printed


def test_ranks_that_changed_in_training_are_taken(
    experiment, imported, config_file, tmp_path
):
    adaptive = rank.AdaptiveRankConfig(
        energy=0.5, every=1, warmup_steps=0, floor=1, multiple=1
    )
    shrinking = dataclasses.replace(
        experiment,
        optimizer=optimizer_config.Tsvd(warmup_steps=1),
        adaptive_rank=adaptive,
    )
    train(shrinking, tmp_path / "shrunk", init_from=str(imported))
    kept = workdir.newest_record(tmp_path / "shrunk")["ranks"]
    assert 1 <= kept["layers/q"] < 4
    assert command(config_file, tmp_path / "shrunk", tmp_path) == 0
    path = tmp_path / "next"
    flags = [f"--config={config_file}", f"--init-from={tmp_path / 'shrunk'}"]
    assert cli.main([*flags, f"--workdir={path}"]) == 0
    found = workdir.load_run(path).params["layers"][0]["q"].s
    assert found.shape == (kept["layers/q"],)


def test_parameters_alone_are_not_resumed(experiment, imported):
    before = sorted(os.listdir(imported))
    message = refusal(experiment, imported)
    assert message.startswith(f"workdir: {imported} holds parameters alone")
    assert message.endswith(f"--init-from={imported}")
    assert sorted(os.listdir(imported)) == before


def test_a_folder_without_a_run_is_refused(experiment, tmp_path):
    message = refusal(experiment, tmp_path / "run", init_from=str(tmp_path))
    assert message.startswith(f"--init-from: workdir: {tmp_path} holds no run")
