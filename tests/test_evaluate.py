"""The loss of whole documents, beside a loop over single tokens in PyTorch."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
import samples
import saved_runs

from experiments import evaluate
from sct_jax import errors, files, model, scoring
from sct_jax.data import pipeline, sources
from sct_jax.training import perplexity, workdir

SEQ_LEN = 16
# Shorter than the window, as long, and much longer.
TEXTS = ["ka", "木 🌳\r\n", saved_runs.TEXT, saved_runs.TEXT * 2 + "\0<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def corpus(folder):
    return samples.write_corpus(folder / "corpus", files=40)


@pytest.fixture(scope="module")
def saved(folder, corpus):
    settings = saved_runs.config(corpus, folder / "cache", seq_len=SEQ_LEN)
    return saved_runs.write(folder / "run", settings)


@pytest.fixture(scope="module")
def run(saved):
    return workdir.load_run(saved)


@pytest.fixture(scope="module")
def json_lines(folder):
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def torch_nats(run):
    """The negative log-probability of a token after others, in float64."""
    torch = pytest.importorskip("torch")
    llama = torch_model(pytest.importorskip("transformers"), torch, run)

    def nats(context, token):
        with torch.no_grad():
            logits = llama(torch.tensor([context])).logits[0, -1]
        return -float(torch.log_softmax(logits, -1)[token])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait for each other on a busy machine
    yield nats
    torch.set_num_threads(threads)


def torch_model(transformers, torch, run):
    shape = run.config.model
    settings = transformers.LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(settings).double().eval()
    places = {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
    places |= {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    places |= {
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
    }
    params = jax.tree.map(np.asarray, model.unstack_layers(run.params))
    weights = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": params["head"].T,
    }
    for number, layer in enumerate(params["layers"]):
        for name, place in places.items():
            weights[f"model.layers.{number}.{place}"] = layer[name].T
    llama.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    return llama


def reference(nats, tokens, *, seq_len, stride):
    """The score of every token but the first, each by a pass of its own."""
    last = len(tokens) - 1
    found = []
    for at in range(1, last + 1):
        blocks = max(0, math.ceil((at - seq_len) / stride))
        end = min(last, seq_len + blocks * stride)
        found.append(nats(tokens[max(0, end - seq_len) : at], tokens[at]))
    return found


# --- Windows.


def test_every_token_is_scored_once_with_all_the_context_that_the_stride_leaves():
    for seq_len in (1, 2, 5, 8):
        for stride, first, size in itertools.product(
            range(1, seq_len + 1), range(1, 12), range(30)
        ):
            found = list(
                scoring.windows(size, first=first, seq_len=seq_len, stride=stride)
            )
            scored = [t for w in found for t in range(w.begin, w.end + 1)]
            assert scored == list(range(first, size))
            for window in found:
                assert window.start == max(0, window.end - seq_len)
                assert window.begin - window.start >= min(
                    window.begin, seq_len - stride + 1
                )


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for seq_len, size in itertools.product((1, 4, 7), range(1, 25)):
        for stride in range(1, seq_len + 1):
            tokens = list(range(100, 100 + size))
            theirs = utils.get_rolling_token_windows(
                tokens, 99, seq_len, seq_len - stride + 1
            )
            ours = scoring.windows(size + 1, first=1, seq_len=seq_len, stride=stride)
            whole = [99, *tokens]
            assert [
                (whole[w.start : w.end], whole[w.begin : w.end + 1]) for w in ours
            ] == list(theirs)


# --- Scores.


@pytest.mark.parametrize("stride", [SEQ_LEN, 5, 1])
def test_scores_are_those_of_a_loop_in_pytorch(run, torch_nats, stride):
    found = list(
        perplexity.score_documents(
            run.params,
            run.config.model,
            run.tokenizer,
            TEXTS,
            seq_len=SEQ_LEN,
            stride=stride,
        )
    )
    wanted = []
    for text, score in zip(TEXTS, found, strict=True):
        tokens = [run.tokenizer.document_mark, *run.tokenizer.encode(text)]
        nats = reference(torch_nats, tokens, seq_len=SEQ_LEN, stride=stride)
        assert score.tokens == len(nats) and score.bytes == len(text.encode())
        assert score.nats == pytest.approx(sum(nats), rel=1e-5)
        wanted += nats
    assert max(score.tokens for score in found) > 3 * SEQ_LEN
    assert min(score.tokens for score in found) < SEQ_LEN
    figures = perplexity.summarise(found)
    assert figures.perplexity.value == pytest.approx(
        math.exp(np.mean(wanted)), rel=1e-5
    )


def test_scores_do_not_depend_on_what_is_scored_together(run):
    tokens = [
        [run.tokenizer.document_mark, *run.tokenizer.encode(text)] for text in TEXTS
    ]
    requests = [scoring.Request(each, 1) for each in tokens]
    options = {"seq_len": SEQ_LEN, "stride": 4}
    score = lambda requests, **more: list(
        scoring.score(run.params, run.config.model, requests, **options, **more)
    )
    together = score(requests)
    apart = [score([request], tokens_per_batch=1)[0] for request in requests]
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a.nats, b.nats, rtol=1e-5, atol=1e-6)
        assert (a.is_greedy == b.is_greedy).all()
    # Context is not scored, and all that there is counts.
    (late,) = score([scoring.Request(tokens[3], 10)])
    np.testing.assert_allclose(late.nats, together[3].nats[9:], rtol=1e-5, atol=1e-6)
    assert score([scoring.Request([1]), scoring.Request([])])[1].nats.shape == (0,)


def test_a_token_is_greedy_where_it_is_the_likeliest(run):
    prompt = [run.tokenizer.document_mark, 65]
    forward = jax.jit(model.forward, static_argnames="config")
    logits = forward(run.params, np.array([prompt]), run.config.model)[0, -1]
    likeliest = int(np.argmax(logits))
    for token in (likeliest, (likeliest + 1) % 300):
        (scores,) = scoring.score(
            run.params,
            run.config.model,
            [scoring.Request([*prompt, token], 2)],
            seq_len=SEQ_LEN,
            stride=SEQ_LEN,
        )
        assert scores.is_greedy.tolist() == [token == likeliest]


def test_few_programs_are_compiled(run):
    scoring._token_scores.clear_cache()
    requests = [scoring.Request([1] * size) for size in range(60)]
    for batch in (requests, requests[::7]):
        list(
            scoring.score(
                run.params, run.config.model, batch, seq_len=SEQ_LEN, stride=3
            )
        )
    assert scoring._token_scores._cache_size() <= 4


@pytest.mark.parametrize(
    ("request_", "stride", "message"),
    [
        (([1, 2], 1), 0, "stride"),
        (([1, 2], 1), SEQ_LEN + 1, "stride"),
        (([1, 300], 1), 1, r"0\.\.299"),
        (([1, -1], 1), 1, r"got -1"),
        (([1, 2], 0), 1, "first"),
    ],
)
def test_what_cannot_be_scored_is_refused(run, request_, stride, message):
    with pytest.raises(ValueError, match=message):
        list(
            scoring.score(
                run.params,
                run.config.model,
                [scoring.Request(*request_)],
                seq_len=SEQ_LEN,
                stride=stride,
            )
        )


# --- Standard errors.


def test_the_standard_error_is_that_of_a_ratio():
    documents = [perplexity.DocumentScore(*row) for row in ((2.0, 1, 4), (4.0, 3, 4))]
    figures = perplexity.summarise(documents)
    # Residuals are 1/2 and -1/2: sqrt(2 / 1 (1/4 + 1/4)) / 4.
    assert figures.loss == (1.5, 0.25)
    assert figures.perplexity == pytest.approx((math.exp(1.5), 0.25 * math.exp(1.5)))
    assert figures.bits_per_byte == pytest.approx(
        (0.75 / math.log(2), math.sqrt(2 * 2) / 8 / math.log(2))
    )
    assert figures[3:] == (2, 4, 8)


def test_the_standard_error_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        tokens = rng.integers(1, 200, size=60)
        level = rng.normal(3.0, 0.5, size=60)  # of a whole document
        documents = [
            perplexity.DocumentScore(float(x * y), int(x), 1)
            for x, y in zip(tokens, level, strict=True)
        ]
        value, error = perplexity.summarise(documents).loss
        inside.append(abs(value - 3.0) < error)
    # 68 % within one; binomial, with 400 draws: 2.3 %.
    assert 0.60 < np.mean(inside) < 0.76


def test_one_document_has_no_standard_error():
    figures = perplexity.summarise([perplexity.DocumentScore(6.0, 3, 5)])
    assert figures.loss == (2.0, None) and figures.perplexity.standard_error is None


# --- The command.


def call(capsys, *flags):
    assert evaluate.main(list(flags)) == 0
    return capsys.readouterr().out


def test_the_command_says_and_writes_figures(saved, run, json_lines, folder, capsys):
    target = folder / "figures.json"
    said = call(
        capsys,
        f"--workdir={saved}",
        f"--data={json_lines}",
        "--stride=5",
        f"--json={target}",
        "--documents",
    )
    found = json.loads(target.read_text())
    scores = list(
        perplexity.score_documents(
            run.params,
            run.config.model,
            run.tokenizer,
            TEXTS,
            seq_len=SEQ_LEN,
            stride=5,
        )
    )
    assert found["per_document"] == [score._asdict() for score in scores]
    assert (found["seq_len"], found["stride"], found["split"]) == (SEQ_LEN, 5, "all")
    total = sum(score.nats for score in scores) / sum(score.tokens for score in scores)
    assert found["loss"]["value"] == pytest.approx(total)
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert f"{total:.4f} ± " in said and "4 documents" in said


def test_figures_are_said_where_they_cannot_be_written(
    saved, json_lines, tmp_path, monkeypatch, capsys
):
    def refuse(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace_text", refuse)
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            [
                f"--workdir={saved}",
                f"--data={json_lines}",
                f"--json={tmp_path / 'figures.json'}",
            ]
        )
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "bits per byte" in captured.out
    assert "--json: cannot write" in captured.err


def test_the_default_is_the_held_out_text_of_the_run(saved, run, corpus, capsys):
    said = call(capsys, f"--workdir={saved}")
    opened, summary = sources.scan(pipeline.open_source(run.config.data))
    held_out = list(sources.documents(opened, "validation"))
    assert 0 < len(held_out) < 40
    assert f"(validation): {len(held_out)} documents" in said
    assert f"{summary.bytes['validation']:,} bytes" in said


def test_text_that_changed_since_training_is_noted(saved, capsys):
    evaluate.main([f"--workdir={saved}"])
    assert "may have been trained on" in capsys.readouterr().err


def test_documents_are_evenly_spaced(run, corpus):
    whole = list(evaluate.open_text(run, split="all").documents)
    few = list(evaluate.open_text(run, split="all", max_documents=4).documents)
    assert len(whole) == 40 and few == whole[::10]
    many = evaluate.open_text(run, split="all", max_documents=99)
    assert list(many.documents) == whole
    train = list(evaluate.open_text(run, split="train").documents)
    validation = list(evaluate.open_text(run).documents)
    assert sorted(train + validation) == sorted(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=nowhere/*.txt"], "data.source: no file matches"),
        (["--data=tfds:nothing_here"], "data.source: the TFDS dataset"),
        (["--data={empty}"], "--data: has no text"),
        (["--data={lines}", "--text_field=body"], "data.text_field: "),
        (
            ["--data={lines}", "--seq_len=17"],
            "--seq_len: 17 is above the context",
        ),
        (["--data={lines}", "--seq_len=0"], "--seq_len: 0 must"),
        (
            ["--data={lines}", "--beyond_context", "--seq_len=99999999999"],
            "--seq_len: 99999999999 is above 1048576",
        ),
        (["--data={lines}", "--stride=0"], "--stride: 0 must be in 1..16"),
        (["--data={lines}", "--stride=17"], "--stride: 17 must be in 1..16"),
        (["--data={lines}", "--max_documents=0"], "--max_documents: 0 must"),
        (["--data={lines}", "--documents"], "--documents: needs --json"),
        (["--data={lines}", "--json=/nowhere/x.json"], "/nowhere is not a folder"),
        (["--data={lines}", "--split=test"], "split"),
    ],
)
def test_bad_input_ends_with_code_2(saved, json_lines, folder, capsys, flags, message):
    empty = folder / "empty.txt"
    empty.write_text("")
    flags = [flag.format(empty=empty, lines=json_lines) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        evaluate.main([f"--workdir={saved}", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_longer_context_has_to_be_asked_for(run):
    assert evaluate.window(
        run, seq_len=2 * SEQ_LEN, stride=None, beyond_context=True
    ) == (2 * SEQ_LEN, SEQ_LEN)
    with pytest.raises(errors.UserError, match="--beyond_context"):
        evaluate.window(run, seq_len=2 * SEQ_LEN, stride=None)
