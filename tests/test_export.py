"""A run as a model of transformers, which has to compute what ours does."""

import dataclasses
import io
import json
import re
import shutil
import stat
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import safetensors
import safetensors.numpy
import samples
import tokenizers

from experiments import export as program
from sct_jax import data, decode, errors, model, sampling, spectral
from sct_jax.interop import exporting, model_card, names
from sct_jax.training import accounting, loop, optimizer_config, workdir
from sct_jax.training import config as config_lib

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # more would compete with the threads of XLA

MARK = data.tokenizer.DOCUMENT_MARK
BLOCKS = model.BLOCK_MATRICES
BASE = dataclasses.replace(samples.SMALL, vocab_size=300, num_layers=2)
LLAMA3 = model.RopeScaling(kind="llama3", factor=8.0, original_length=16)
LINEAR = model.RopeScaling(kind="linear", factor=2.5)
CONFIGS = {
    "spectral": BASE,
    "dense, untied, llama3": dataclasses.replace(
        BASE, spectral=(), tie_embeddings=False, rope_scaling=LLAMA3, norm_eps=1e-3
    ),
    "low rank, normalised keys, heads of another size, linear": dataclasses.replace(
        BASE, factors="low_rank", qk_norm=True, head_dim=6, rope_scaling=LINEAR
    ),
    "tied spectral embedding": dataclasses.replace(
        BASE, spectral=("q", "o", "up", "embedding"), rope_theta=500.0
    ),
    "spectral embedding and head, normalised keys": dataclasses.replace(
        BASE, spectral=model.MATRICES, tie_embeddings=False, qk_norm=True
    ),
    "ranks that differ between layers": dataclasses.replace(BASE, scan_layers=False),
    "blocks": dataclasses.replace(
        BASE,
        spectral=("q", "k", "o", "up", "down", "embedding"),
        num_blocks=2,
        blocks=model.MatrixBlocks(q=4, up=1),
        ranks=model.MatrixRanks(down=7),
    ),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
each_form = pytest.mark.parametrize("form", exporting.FORMATS)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 24))
GREEDY = sampling.SamplingConfig(temperature=0.0)
TEXT = f"kato mi {MARK} ren lü\n\n  12 🙂 {MARK}"


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, without a network and with a cache of its own for exported code."""
    code = str(tmp_path_factory.mktemp("code"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_MODULES_CACHE", code)
        library = pytest.importorskip("transformers")
        library.logging.disable_progress_bar()
        # Another module of tests may have loaded it before.
        patch.setattr(library.dynamic_module_utils, "HF_MODULES_CACHE", code)
        patch.setattr(sys, "path", [*sys.path])
        yield library


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.train(["kato mi ren lu sha"] * 10, vocab_size=300)


@pytest.fixture(scope="module")
def runs(tokenizer):
    """Runs with random parameters, by the name of their configuration."""
    return {name: random_run(name, tokenizer) for name in CONFIGS}


def random_run(name, tokenizer):
    config = CONFIGS[name]
    shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    rng = np.random.default_rng(2)

    def draw(path, x):
        """Norms are not one, singular values have both signs, nothing vanishes."""
        key = jax.tree_util.keystr(path)
        if "norm" in key:
            drawn = rng.uniform(0.5, 1.5, x.shape)
        elif key.endswith(".s"):
            drawn = rng.uniform(0.5, 2, x.shape) * rng.choice([-1, 1], x.shape)
        else:
            last = key.endswith((".v", ".b"))
            drawn = rng.normal(size=x.shape) / np.sqrt(x.shape[-1 if last else -2])
            if "embedding" in key and not last:  # less than what the layers add
                drawn *= 0.3 * np.sqrt(x.shape[-2])
        return jnp.asarray(drawn, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    if name == "ranks that differ between layers":
        first, last = params["layers"]
        thin = spectral.SpectralFactors(*(x[..., :3] for x in last["down"]))
        params = params | {"layers": (first, last | {"down": thin})}
    run_config = config_lib.ExperimentConfig(
        model=config, data=data.DataConfig(seq_len=64)
    )
    return workdir.LoadedRun(run_config, params, tokenizer)


@pytest.fixture(scope="module")
def exported(runs, transformers, tmp_path_factory):
    """Returns the folder of an export, and the model that transformers reads there."""
    done = {}
    root = tmp_path_factory.mktemp("exports")

    def get(name, form):
        if (name, form) not in done:
            folder = root / f"{list(CONFIGS).index(name)}-{form}"
            exporting.export(runs[name], folder, form=form, card="")
            done[name, form] = folder, load(transformers, folder)
        return done[name, form]

    return get


def load(transformers, folder, **options):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=kind == "spectral",
        output_loading_info=True,
        **options,
    )
    assert not any(info.values()), info  # every tensor was there, and none too many
    return loaded.eval()


def logits(loaded, tokens=TOKENS, **options):
    with torch.no_grad():
        return loaded(torch.from_numpy(tokens), **options).logits.float().numpy()


forward = jax.jit(model.forward, static_argnames="config")


def our_logits(run):
    return np.asarray(forward(run.params, jnp.asarray(TOKENS), run.config.model))


# --- What transformers computes.


@each_form
@each_config
def test_logits_are_ours(runs, exported, name, form):
    _, loaded = exported(name, form)
    wanted = our_logits(runs[name])
    assert np.abs(wanted).max() > 1
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(logits(loaded), wanted, atol=1e-4)
    loaded.set_attn_implementation("eager")
    np.testing.assert_allclose(logits(loaded), wanted, atol=1e-4)
    loaded.set_attn_implementation("sdpa")


@each_form
@each_config
def test_the_likeliest_tokens_are_ours(runs, exported, name, form):
    run, (_, loaded) = runs[name], exported(name, form)
    mark, count = run.tokenizer.document_mark, 8
    texts = ("kato mi", "ren", "lu lu sha to", "12 é")
    prompts = [[mark, *run.tokenizer.encode(text)] for text in texts]
    wanted = decode.generate(
        run.params,
        run.config.model,
        prompts,
        num_tokens=count,
        key=jax.random.key(0),
        sampler=GREEDY,
        stop=[mark],
    )
    for prompt, new in zip(prompts, wanted, strict=True):
        found = loaded.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=count
        )
        end = [mark] * (len(new) < count)
        assert found[0].tolist() == [*prompt, *new, *end]
    assert len({token for new in wanted for token in new}) > 2


@each_form
def test_padded_prompts_continue_as_alone(exported, form):
    _, loaded = exported("spectral", form)
    short, long = [7, 8, 9], [1, 2, 3, 4, 5]
    new = lambda ids, mask: loaded.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        min_new_tokens=5,
        max_new_tokens=5,
    )[:, -5:].tolist()
    together = new([[0, 0, *short], long], [[0, 0, 1, 1, 1], [1] * 5])
    assert together == new([short], [[1] * 3]) + new([long], [[1] * 5])


def test_the_tensors_of_a_dense_model_are_ours_bitwise(runs, exported):
    name = "dense, untied, llama3"
    run = runs[name]
    for form in exporting.FORMATS:
        folder, _ = exported(name, form)
        found = safetensors.numpy.load_file(folder / "model.safetensors")
        wanted = list(names.tensors(run.config.model))
        assert found.keys() == {tensor.name for tensor in wanted}
        for tensor in wanted:
            ours = run.params
            if tensor.layer is not None:
                ours = {k: x[tensor.layer] for k, x in ours["layers"].items()}
            ours = np.asarray(ours[tensor.key])
            if tensor.is_matrix and tensor.key != "embedding":
                ours = ours.T
            assert found[tensor.name].tobytes() == ours.tobytes()


@each_form
def test_a_bfloat16_export_is_half_as_large_and_loads(
    runs, exported, transformers, tmp_path, form
):
    name = "spectral embedding and head, normalised keys"
    folder = tmp_path / "half"
    exporting.export(runs[name], folder, form=form, card="", dtype="bfloat16")
    loaded = load(transformers, folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    whole, precise = exported(name, form)
    sizes = [tensor_bytes(path / "model.safetensors") for path in (folder, whole)]
    assert sizes[1] == 2 * sizes[0]
    for half, full in zip(
        loaded.state_dict().values(), precise.state_dict().values(), strict=True
    ):
        assert torch.equal(half, full.to(torch.bfloat16))
    # 8 bits in about 30 operations in sequence, whose errors add up like a random walk.
    wanted = our_logits(runs[name])
    assert np.abs(logits(loaded) - wanted).mean() < 0.03 * np.abs(wanted).mean()


def tensor_bytes(path):
    found = safetensors.deserialize(path.read_bytes())
    return sum(len(tensor["data"]) for _, tensor in found)


@each_form
def test_shards_hold_the_same_tensors(runs, exported, transformers, tmp_path, form):
    name, limit = "spectral", 10_000
    folder = tmp_path / "parts"
    exporting.export(runs[name], folder, form=form, card="", max_shard_bytes=limit)
    parts = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(parts) > 2
    assert {*index["weight_map"].values()} == {part.name for part in parts}
    assert index["metadata"]["total_size"] == sum(map(tensor_bytes, parts))
    for part in parts:
        content = safetensors.numpy.load_file(part)
        assert len(content) == 1 or tensor_bytes(part) <= limit
        assert all(index["weight_map"][key] == part.name for key in content)
        with safetensors.safe_open(part, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
    _, whole = exported(name, form)
    for one, other in zip(
        load(transformers, folder).parameters(), whole.parameters(), strict=True
    ):
        assert torch.equal(one, other)


# --- Factors.


def test_factors_stay_factors(runs, exported):
    """The parameters are those of the run, without s."""
    for name in CONFIGS:
        run, (_, loaded) = runs[name], exported(name, "factors")
        leaves = jax.tree.leaves(run.params, is_leaf=spectral.is_factors)
        merged = sum(w.s.size for w in leaves if spectral.is_spectral(w))
        ours = accounting.count(run.params) - merged
        assert sum(p.numel() for p in loaded.parameters()) == ours


def test_singular_values_are_in_b(runs, exported):
    folder, _ = exported("spectral", "factors")
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    u, s, v = (np.asarray(x[1]) for x in runs["spectral"].params["layers"]["down"])
    a, b = (found[f"model.layers.1.mlp.down_proj.{key}.weight"] for key in "ab")
    np.testing.assert_array_equal(a, u.T)
    np.testing.assert_array_equal(b, v * s)


def test_ranks_are_in_the_configuration(runs, exported):
    for name, wanted in {
        "spectral": dict.fromkeys(
            (
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ),
            4,
        ),
        "tied spectral embedding": dict.fromkeys(
            ("embed_tokens", "q_proj", "o_proj", "up_proj"), 4
        ),
        "dense, untied, llama3": {},
    }.items():
        folder, loaded = exported(name, "factors")
        assert json.loads((folder / "config.json").read_text())["ranks"] == wanted
        assert loaded.config.ranks == wanted
    _, uneven = exported("ranks that differ between layers", "factors")
    assert uneven.config.ranks["down_proj"] == [4, 3]
    assert uneven.config.ranks["up_proj"] == 4


# --- What vLLM's Transformers backend relies on.


@each_config
def test_attention_is_exchangeable_and_gets_what_the_model_is_called_with(
    exported, transformers, name
):
    """The backend puts its own attention there, and hands it its caches so."""
    _, loaded = exported(name, "factors")
    calls = []

    def attend(module, query, key, value, mask, scaling=None, mine=None, **kwargs):
        calls.append((module.layer_idx, module.is_causal, mine))
        plain = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, None, scaling=scaling, **kwargs)

    attention = transformers.AttentionInterface()
    attention.register("of_a_test", attend)
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        (wanted,) = loaded.model(tokens, use_cache=False, return_dict=False)
        before = loaded.config._attn_implementation
        loaded.config._attn_implementation = "of_a_test"
        try:
            (found,) = loaded.model(
                input_ids=tokens,
                position_ids=torch.arange(tokens.shape[1])[None],
                use_cache=False,
                return_dict=False,
                mine="handed down",
            )
        finally:
            loaded.config._attn_implementation = before
    assert calls == [(0, True, "handed down"), (1, True, "handed down")]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "blocks"])
def test_plans_divide_what_they_name(exported, name):
    """Every matrix of the layers is divided once, on its wide side."""
    _, loaded = exported(name, "factors")
    base = loaded.model
    assert base.is_backend_compatible()
    assert base.supports_pp_plan
    assert all(hasattr(base, part) for part in base.config.base_model_pp_plan)
    plan = base.config.base_model_tp_plan
    assert len(plan) == len(BLOCKS)
    for key, style in plan.items():
        for layer in range(base.config.num_hidden_layers):
            module = base.get_submodule(key.replace("*", str(layer)))
            assert type(module) is torch.nn.Linear
            size = module.out_features if style == "colwise" else module.in_features
            assert size >= 12  # not the rank
    modules = {re.sub(r"\.\d+\.", ".*.", key): m for key, m in loaded.named_modules()}
    assert all(
        type(modules[key]) in (torch.nn.Linear, torch.nn.Embedding)
        for key in loaded.tp_plan
    )


def test_blocks_are_in_the_configuration_and_not_divided(exported):
    folder, loaded = exported("blocks", "factors")
    wanted = {"q_proj": 4, "k_proj": 2, "o_proj": 2, "down_proj": 2}
    assert json.loads((folder / "config.json").read_text())["blocks"] == wanted
    assert {
        name.split(".")[-1]: module.blocks
        for name, module in loaded.named_modules()
        if hasattr(module, "blocks")
    } == wanted
    divided = {key.split(".")[-1] for key in loaded.model.config.base_model_tp_plan}
    assert divided == {"v_proj", "b", "gate_proj"}
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    assert found["model.layers.1.mlp.down_proj.a.weight"].shape == (2, 7, 24)
    assert found["model.layers.1.mlp.down_proj.b.weight"].shape == (2, 16, 7)


def test_the_table_of_the_embedding_can_be_exchanged(exported):
    _, loaded = exported("tied spectral embedding", "factors")
    table = loaded.get_input_embeddings()
    assert tuple(table.weight.shape) == (300, loaded.config.embedding_size) == (300, 4)
    before = logits(loaded)
    other = torch.nn.Embedding.from_pretrained(2 * table.weight.detach())
    try:
        loaded.set_input_embeddings(other)
        assert loaded.model.embed_tokens.a is other
        assert np.abs(logits(loaded) - before).max() > 1e-2
    finally:
        loaded.set_input_embeddings(table)
    np.testing.assert_array_equal(logits(loaded), before)


def test_an_export_saved_by_transformers_is_the_same(exported, transformers, tmp_path):
    _, loaded = exported("tied spectral embedding", "factors")
    loaded.save_pretrained(tmp_path / "again")
    again = load(transformers, tmp_path / "again")
    np.testing.assert_array_equal(logits(again), logits(loaded))


def test_hidden_states_and_gradients_come_with_it(exported):
    _, loaded = exported("spectral", "factors")
    tokens = torch.from_numpy(TOKENS)
    out = loaded(tokens, labels=tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + loaded.config.num_hidden_layers
    out.loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.zero_grad(set_to_none=True)


# --- The tokenizer, and what ends a text.


@each_form
def test_ids_are_ours(runs, exported, transformers, form):
    folder, loaded = exported("spectral", form)
    ours = runs["spectral"].tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=form == "factors"
    )
    plain = theirs(TEXT, add_special_tokens=False)
    assert plain["input_ids"] == ours.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == [ours.document_mark, *ours.encode(TEXT)]
    assert theirs.decode(plain["input_ids"]) == TEXT
    assert {*plain} == {"input_ids", "attention_mask"}
    marks = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert marks == (ours.document_mark,) * 3
    settings = loaded.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == marks[:2]
    assert theirs.model_max_length == loaded.config.max_position_embeddings == 64


def test_what_begins_a_text_need_not_end_it(runs, tmp_path, tokenizer):
    """As in checkpoints of Llama 3 that were imported."""
    raw = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    raw.add_special_tokens(["<|begin_of_text|>"])
    begin = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<|begin_of_text|>", "$A"],
        special_tokens=[("<|begin_of_text|>", begin)],
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    ours = data.Tokenizer.load(str(tmp_path / "tokenizer.json"))
    run = runs["spectral"]._replace(tokenizer=ours)
    exporting.export(run, tmp_path / "out", form="merged", card="")
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert read("generation_config.json") == {
        "bos_token_id": begin,
        "eos_token_id": [tokenizer.document_mark, begin],
        "pad_token_id": tokenizer.document_mark,
    }
    described = read("config.json")
    assert described["bos_token_id"] == begin
    assert described["eos_token_id"] == tokenizer.document_mark
    assert read("tokenizer_config.json")["bos_token"] == "<|begin_of_text|>"
    assert read("tokenizer_config.json")["eos_token"] == MARK
    again = data.Tokenizer.load(str(tmp_path / "out" / "tokenizer.json"))
    assert again.document_mark == begin and again.stops == ours.stops


def test_one_shard_is_in_memory_at_a_time(runs, tmp_path, monkeypatch):
    alive: list = []
    save = exporting._save

    def counted(path, arrays):
        assert not any(ref() is not None for ref in alive), "of an earlier shard"
        alive.extend(weakref.ref(array) for array in arrays.values() if array.size)
        save(path, arrays)

    monkeypatch.setattr(exporting, "_save", counted)
    made = (
        exporting.Stored(str(i), (8, 8), lambda i=i: np.full((8, 8), i, np.float64))
        for i in range(6)
    )
    exporting.write_tensors(tmp_path, made, dtype="float32", max_shard_bytes=512)
    assert len(alive) == 6


# --- The program.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    config = config_lib.ExperimentConfig(
        num_steps=4,
        log_every=2,
        model=dataclasses.replace(BASE, spectral=("up", "down")),
        data=data.DataConfig(
            source=samples.write_corpus(root / "corpus", files=40),
            cache_dir=str(root / "cache"),
            batch_size=8,
            seq_len=16,
            split="documents",
        ),
        optimizer=optimizer_config.Sct(warmup_steps=1),
        checkpoint=config_lib.CheckpointConfig(every=3),
        eval=config_lib.EvalConfig(every=4, num_batches=1),
    )
    output = rich.console.Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        done = loop.train(config, root / "run", output=output)
    assert done.status == "finished"
    return root / "run"


def call(path, folder, **flags):
    flags = {"workdir": path, "to": folder, "format": "merged"} | flags
    return program.main([f"--{key}={value}" for key, value in flags.items()])


@each_form
def test_the_program_exports_a_run(trained, transformers, tmp_path, capsys, form):
    folder = tmp_path / "below" / "named"
    assert call(trained, folder, format=form) == 0
    assert str(folder) in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["named"]
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } | ({exporting.CODE} if form == "factors" else set())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1
    run = workdir.load_run(trained)
    loaded = load(transformers, folder)
    np.testing.assert_allclose(logits(loaded), our_logits(run), atol=1e-4)


@each_form
def test_the_card_says_what_the_run_says(trained, tmp_path, form):
    folder = tmp_path / "named"
    call(trained, folder, format=form)
    card = (folder / "README.md").read_text()
    run, rows = workdir.load_run(trained), read_rows(trained)
    architecture = exporting.architecture(run.config.model, form)
    for wanted in (
        "license: unknown",
        "# named",
        architecture,
        f"{accounting.count(run.params):,}",
        f"{accounting.parameters(accounting.dense_config(run.config.model)):,}",
        "up_proj 4, down_proj 4",
        run.config.data.source,
        f"| tokens seen | {4 * 8 * 16} |",
        f"{rows['eval/loss']:.4f} nats per token, at step 4",
        f"| held-out bits per byte | {rows['eval/bits_per_byte']:.4f} |",
        MARK,
    ):
        assert wanted in card
    assert ("trust_remote_code" in card) == (form == "factors")
    assert "library_name" not in card


def read_rows(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def test_the_card_leaves_out_what_the_run_does_not_say(trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    later = json.dumps({"step": 9, "train/loss": 1.0, "eval/loss": 1.0})
    (path / "metrics.jsonl").write_text(later + "\n")
    progress = model_card.read_progress(path, workdir.newest_record(path), seq_len=16)
    assert progress == model_card.Progress(step=4, tokens=512)
    assert len(lines) > 1
    call(path, tmp_path / "named")
    card = (tmp_path / "named" / "README.md").read_text()
    assert "held-out" not in card
    assert "training loss" not in card


def test_the_card_is_of_the_checkpoint_that_is_exported(trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    newest = path / "checkpoints" / "4" / "state"
    file = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        call(path, tmp_path / "named")
    card = (tmp_path / "named" / "README.md").read_text()
    assert "| steps | 3 |" in card
    assert "| tokens seen | 384 |" in card


def refusal(capsys, *arguments, **flags):
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **flags)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_existing_folder_is_left_alone(trained, tmp_path, capsys):
    folder = tmp_path / "there"
    folder.mkdir()
    assert f"{folder} exists" in refusal(capsys, trained, folder)
    assert not list(folder.iterdir())
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "exists" in refusal(capsys, trained, link)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"format": "onnx"}, "--format: unknown value 'onnx'"),
        ({"dtype": "float16"}, "--dtype: unknown value 'float16'"),
        ({"max_shard_gb": 0}, "--max_shard_gb: 0.0 must be above 0"),
        ({"max_shard_gb": "nan"}, "--max_shard_gb: nan must be above 0"),
        ({"max_shard_gb": "inf"}, "--max_shard_gb: inf must be above 0 and finite"),
        ({"to": ""}, "--to: must not be empty"),
        ({"to": "gs://bucket/model"}, "--to: gs:/bucket/model looks like the address"),
        ({"workdir": "/nowhere/run"}, "holds no run"),
        ({"to": "~nobody-here/x"}, "--to: "),
    ],
)
def test_what_cannot_be_exported_is_refused(trained, tmp_path, capsys, flags, message):
    assert message in refusal(capsys, trained, tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_the_run_is_read(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(workdir, "load_with_record", lambda _: pytest.fail("was read"))
    (tmp_path / "file").touch()
    message = refusal(capsys, trained, tmp_path / "file" / "deep" / "model")
    assert f"--to: cannot write to {tmp_path / 'file'}: Not a directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["checkpoints", "mark", "metrics"])
def test_a_damaged_run_is_refused(trained, tmp_path, capsys, damage):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    if damage == "checkpoints":
        shutil.rmtree(path / "checkpoints")
    elif damage == "mark":
        text = (path / "tokenizer.json").read_text()
        (path / "tokenizer.json").write_text(text.replace(MARK, "<|other|>"))
    else:
        (path / "metrics.jsonl").write_text("{\n")
    wanted = {
        "checkpoints": "has no checkpoint yet",
        "mark": "puts no token before a text",
        "metrics": "metrics.jsonl:1",
    }
    assert wanted[damage] in refusal(capsys, path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError()])
def test_a_failure_leaves_nothing(trained, tmp_path, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(exporting, "_write_tokenizer", fail)
    folder = tmp_path / "out"
    if isinstance(error, OSError):
        message = refusal(capsys, trained, folder)
        assert f"cannot write to {folder}: No space left on device" in message
    else:
        with pytest.raises(KeyError):
            call(trained, folder)
    assert not list(tmp_path.iterdir())


def test_heads_that_llama_cannot_have_are_refused_merged_alone(tokenizer, tmp_path):
    config = dataclasses.replace(BASE, num_heads=6, num_kv_heads=2, head_dim=4)
    shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    run = workdir.LoadedRun(
        config_lib.ExperimentConfig(model=config), params, tokenizer
    )
    folder = tmp_path / "out"
    with pytest.raises(errors.UserError, match=r"model\.num_heads: 6 does not divide"):
        exporting.export(run, folder, form="merged", card="")
    assert not list(tmp_path.iterdir())
    exporting.export(run, folder, form="factors", card="")
    assert (folder / "model.safetensors").exists()


def test_the_code_needs_torch_and_transformers_alone():
    """The exported file is read from the package, and imports nothing of it."""
    text = exporting._code()
    assert "class SpectralForCausalLM" in text
    assert "sct_jax" not in text
    assert "jax" not in text
