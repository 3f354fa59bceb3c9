"""The model of lm-evaluation-harness, on tasks made of local files."""

import functools
import json
import math
import sys
import types
import warnings

import jax
import numpy as np
import pytest
import saved_runs

pytest.importorskip("lm_eval", reason="an extra: pip install 'sct_jax[eval]'")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its many dependencies
    import lm_eval
    from lm_eval import tasks as harness_tasks

from sct_jax import decode, errors, model, sampling, scoring
from sct_jax.interop import harness, harness_model

SEQ_LEN = 16
GREEDY = sampling.SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    settings = saved_runs.config("none", folder / "cache", seq_len=SEQ_LEN)
    return harness_model.HarnessModel(str(saved_runs.write(folder / "run", settings)))


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def whole_score(lm, tokens, first):
    """The log-probability of tokens from `first` on, in one pass."""
    forward = jax.jit(model.forward, static_argnames="config")
    logits = forward(lm.run.params, np.array([tokens]), lm.run.config.model)[0]
    log_p = np.asarray(jax.nn.log_softmax(logits.astype("float32"), axis=-1))
    return sum(log_p[at - 1, tokens[at]] for at in range(first, len(tokens)))


# --- Requests.


def test_a_continuation_is_scored_after_its_context(lm):
    pairs = [("kato mi", " ren"), ("", "kato"), ("kato ", "mi"), ("木 🌳", " Bäume")]
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = [lm.eot_token_id, *lm.run.tokenizer.encode(context.rstrip())]
        whole = [lm.eot_token_id, *lm.run.tokenizer.encode(context + continuation)]
        assert whole[: len(before)] == before and len(whole) <= SEQ_LEN + 1
        assert value == pytest.approx(whole_score(lm, whole, len(before)), abs=1e-4)


def test_a_long_context_is_cut_so_that_the_end_fits_into_one_window(lm):
    context, continuation = saved_runs.TEXT * 2, " lusha"
    ((value, _),) = lm.loglikelihood(requests((context, continuation)), True)
    before, after = lm._encode_pair(context, continuation)
    whole = [*before, *after][-(SEQ_LEN + 1) :]
    first = len(whole) - len(after)
    assert len(before) > SEQ_LEN
    assert value == pytest.approx(whole_score(lm, whole, first), abs=1e-4)


def test_a_token_across_the_border_is_split(lm):
    """Else the continuation would have no tokens, and be certain."""
    tokens = lm.run.tokenizer.encode
    assert len(tokens("kato")) == 1
    before, after = lm._encode_pair("ka", "to")
    assert (before[1:], after) == (tokens("ka"), tokens("to"))


def test_only_the_likeliest_continuation_is_greedy(lm):
    prompt = lm.tok_encode("kato mi")
    (new,) = decode.generate(
        lm.run.params,
        lm.run.config.model,
        [prompt],
        num_tokens=3,
        key=jax.random.key(0),
        sampler=GREEDY,
    )
    other = [*new[:-1], (new[-1] + 1) % 300]
    answers = lm._loglikelihood_tokens(
        [(("", ""), prompt, new), (("", ""), prompt, other)]
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]


def test_a_long_text_is_scored_by_a_sliding_window(lm):
    texts = [saved_runs.TEXT * 3, "ka", ""]
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        tokens = [lm.eot_token_id, *lm.run.tokenizer.encode(text)]
        (scores,) = scoring.score(
            lm.run.params,
            lm.run.config.model,
            [scoring.Request(tokens)],
            seq_len=SEQ_LEN,
            stride=SEQ_LEN,
        )
        assert value == pytest.approx(-scores.nats.sum(), abs=1e-4)
    assert found[2] == 0


def test_text_is_generated_up_to_a_stop_sequence(lm):
    contexts = ["kato", "木", "def f"]
    plain = lm.generate_until(
        requests(*((c, {"until": [], "max_gen_toks": 9}) for c in contexts))
    )
    for context, text in zip(contexts, plain, strict=True):
        (wanted,) = decode.generate(
            lm.run.params,
            lm.run.config.model,
            [lm.tok_encode(context)],
            num_tokens=9,
            key=jax.random.key(0),
            sampler=GREEDY,
            stop=[lm.eot_token_id],
        )
        assert text == lm.run.tokenizer.decode(wanted)
    stop = plain[0][2:4]
    options = {"until": [stop, "never"], "max_gen_toks": 9}
    stopped = lm.generate_until(requests(*((c, options) for c in contexts)))
    for text, whole in zip(stopped, plain, strict=True):
        assert text == whole.partition(stop)[0]
    assert stopped[0] != plain[0]


def test_a_long_context_leaves_room_to_generate(lm):
    ask = lambda most: lm.generate_until(
        requests((saved_runs.TEXT * 2, {"until": [], "max_gen_toks": most}))
    )[0]
    assert ask(3) and ask(1000).startswith(ask(SEQ_LEN // 2))


def test_what_follows_a_context_does_not_depend_on_its_batch(lm):
    contexts = ["ka", "ka to", saved_runs.TEXT * 2]
    ask = lambda *some: lm.generate_until(
        requests(*((c, {"until": [], "max_gen_toks": 99}) for c in some))
    )
    assert ask(*contexts) == [ask(context)[0] for context in contexts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workdir": "nowhere"}, "workdir: "),
        ({"max_length": SEQ_LEN + 1}, "max_length: "),
        ({"max_length": 1}, "max_length: "),
        ({"stride": 0}, "stride: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"batch_size": "four"}, "batch_size: 'four'"),
        ({"seed": 1 << 70}, "seed: "),
        ({"strid": 2}, "did you mean 'stride'"),
    ],
)
def test_what_cannot_be_done_is_refused(lm, monkeypatch, arguments, message):
    load = harness_model.workdir_lib.load_run
    monkeypatch.setattr(
        harness_model.workdir_lib,
        "load_run",
        lambda path: lm.run if path == "run" else load(path),
    )
    with pytest.raises(errors.UserError, match=message):
        harness_model.HarnessModel(**{"workdir": "run"} | arguments)


def test_an_unknown_option_of_generation_is_refused(lm):
    with pytest.raises(errors.UserError, match=r"generation_kwargs: .*num_beams"):
        lm.generate_until(requests(("ka", {"until": [], "num_beams": 3})))


# --- Tasks.

QUESTIONS = [
    {"text": "kato mi ren", "ends": [" lusha", " Bäume"], "best": 0},
    {"text": "def f(x)", "ends": [": return", "kato mi"], "best": 1},
]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    for task in (
        {
            "task": "local_choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{ends}}",
            "doc_to_target": "{{best}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        {
            "task": "local_text",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.mark.filterwarnings("ignore")  # of the harness, and what it imports
def test_the_harness_evaluates_tasks_of_local_files(lm, task_folder, offline):
    manager = harness_tasks.TaskManager(
        include_path=str(task_folder), include_defaults=False
    )
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=["local_choice", "local_text"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    right, nats, size = 0, 0.0, 0
    for question in QUESTIONS:
        values = []
        for end in question["ends"]:
            before, after = lm._encode_pair(question["text"], end)
            values.append(whole_score(lm, [*before, *after], len(before)))
        right += int(np.argmax(values)) == question["best"]
        nats -= whole_score(lm, lm.tok_encode(question["text"]), 1)
        size += len(question["text"].encode())
    results = found["results"]
    assert results["local_choice"]["acc,none"] == right / len(QUESTIONS)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(
        nats / size / math.log(2), abs=1e-4
    )


def test_the_harness_finds_the_model_by_its_name():
    from lm_eval.api import registry

    harness.register()
    harness.register()
    assert registry.get_model("sct_jax") is harness_model.HarnessModel


def test_the_command_ends_with_code_2_for_bad_input(
    task_folder, offline, monkeypatch, capsys
):
    flags = ["run", "--model", "sct_jax", "--tasks", "local_choice"]
    flags += ["--include_path", str(task_folder), "--model_args", "workdir=nowhere"]
    monkeypatch.setattr(sys, "argv", ["harness", *flags])
    # To list the harness's own tasks takes most of the time of this module.
    only_ours = functools.partial(harness_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness_tasks, "TaskManager", only_ours)
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        harness.main()
    assert caught.value.code == 2
    assert "error: workdir: nowhere holds no run" in capsys.readouterr().err


def test_a_missing_harness_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    with pytest.raises(SystemExit) as caught:
        harness.main()
    assert caught.value.code == 2
    assert "pip install 'sct_jax[eval]'" in capsys.readouterr().err
