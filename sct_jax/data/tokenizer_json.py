"""Reads a tokenizer.json, and has the texts that show whether it changes text."""

import json
import os
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import tokenizers
from tokenizers import models

from sct_jax import errors, files

T = TypeVar("T")

# The largest in use have 35 MB.
_MAX_FILE_BYTES = 1 << 28
_LARGEST_ID_PER_TOKEN = 4
# Characters before or after the parts of a word: not bytes of the text.
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")

# Every byte that UTF-8 can have, at every place of a character that it can have.
_CHARACTERS = "".join(
    map(
        chr,
        (
            *range(0x800),
            *range(0x800, 0xD800, 61),
            *range(0xE000, 0x10000, 61),
            *range(0x10000, 0x110000, 4093),
        ),
    )
)
# What normalizers, strippers, splitters and decoders change, drop or tell apart.
_TEXTS = (
    _CHARACTERS,
    _CHARACTERS[::-1],
    " ".join(_CHARACTERS[:512]),
    *_CHARACTERS[:256],
    "cafe\u0301 \ufb01ne\n  A  \t b ",
    "1234567890 0 12 345 3.14e-10 1,000 ½ ² ٣ 四",
    '{"a": [1, (2.5)], <b>}; #!/$%^&*~`|\\@ _x__y_ don\'t \'s "q" -- ... ?!',
    "def f(x):\n    return x\n\n\n\tif x:\n\t\ty\r\n\r\n  \r  z   \n \n",
    "".join(f"{'a' * count}{' ' * count}{chr(10) * count}" for count in range(1, 40)),
    *(
        f"{space}word{space * 3}Word{space}"
        for space in " \t\n\r\u00a0\u2003\u3000\x0b"
    ),
    "ÀÉÎ ǅ ß ẞ İı ŉ ﬁ \uff21\uff11 ① ™ K Å Ω",
    "\ufeffa\x00b\u00adc\u200bd\u200de\ufffdf\uffffg\u2028h\x1ci\u0085j\x7f",
    "naïve 漢字かな 한국어 العربية हिन्दी ไทย עברית Ελληνικά Русский",
    "🙂👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈🇩🇪👍🏽 \U0010ffff",
    "▁Ġ Ċ ##a a## </w> <0x41> <unk> [UNK] [CLS] <s> </s> <pad> <mask>",
    f"{'supercalifragilistic' * 20} {'x' * 300} {'-' * 300} {'é' * 300}",
)


def read(path: str) -> tokenizers.Tokenizer:
    """Returns the byte-level byte-pair encoding of a tokenizer.json file.

    Without its normalizer, prefix space and dropout. It may still change text: see
    `probes`.

    Raises:
      UserError: names `data.tokenizer`. The file is missing, corrupt, of another kind,
        or gives two tokens one id.
    """
    content = _content(path)
    affixes = [name for name in _AFFIXES if content["model"].get(name)]
    if affixes:  # some make the library panic
        raise unfit(path, f"has a {affixes[0]}, so it is not byte-level")
    text = json.dumps(content)
    try:
        backend = attempt(lambda: tokenizers.Tokenizer.from_str(text))
    except (RuntimeError, ValueError, TypeError) as error:
        raise unreadable(path, str(error)) from error
    model = type(backend.model)
    if model is not models.BPE:
        raise unfit(path, f"has a {model.__name__} model, so it is not byte-level")
    if '"ByteLevel"' not in json.dumps(content.get("decoder")):
        raise unfit(path, "is not byte-level")
    _check_ids(path, content["model"]["vocab"], content["added_tokens"])
    return backend


def probes(backend: tokenizers.Tokenizer) -> list[str]:
    """Returns texts that a tokenizer which changes text is likely to change.

    They have every byte that UTF-8 can have. Each added token is there by itself, with
    spaces around it, and inside a word.
    """
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    around = ("{}", " {} ", "  {}  ", "a{}b", "\n{}\n{}")
    return [
        *_TEXTS,
        *(form.replace("{}", content) for content in added for form in around),
    ]


def attempt(call: Callable[[], T]) -> T:
    """Returns `call()`, which runs code of the library.

    Raises:
      RuntimeError: the library failed.
    """
    try:
        return call()
    except BaseException as error:
        # It raises bare exceptions, and those of Rust, which cannot be imported.
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from error
        raise


def unfit(path: str, why: str) -> errors.UserError:
    """Returns the error for a tokenizer that cannot keep text as it is."""
    return errors.UserError(
        f"data.tokenizer: {path!r} {why}, and losses per byte would be undefined; use "
        "one like GPT-2's, Llama 3's or SmolLM2's"
    )


def unreadable(path: str, why: str, *, advice: str = "") -> errors.UserError:
    """Returns the error for a file that is no tokenizer.json."""
    why = textwrap.shorten(why, 300)  # the library quotes whole files
    return errors.UserError(
        f"data.tokenizer: {path!r} is not a readable tokenizer.json ({why}); "
        f"{advice or 'name another'}, or leave the field empty to train one"
    )


def _content(path: str) -> dict[str, Any]:
    """Returns the JSON of the file, changed as `read` says."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    whole = os.path.join(folder, "tokenizer.json")
    advice = f"name {whole!r}" if os.path.isfile(whole) and whole != path else ""
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_FILE_BYTES:
                raise unreadable(path, f"it has {size:,} bytes", advice=advice)
            content = json.loads(file.read().decode("utf-8-sig"))
        found = _other_file(content)
        if found:
            raise unreadable(path, found, advice=advice)
        split = _without_prefix_space(content.get("pre_tokenizer"))
    except errors.UserError:
        raise
    except OSError as error:
        found = error.strerror or str(error)
        raise unreadable(path, found, advice=advice) from error
    except RecursionError as error:
        raise unreadable(path, "it is nested too deeply", advice=advice) from error
    except UnicodeDecodeError as error:
        raise unreadable(path, "it is not UTF-8", advice=advice) from error
    except ValueError as error:
        raise unreadable(path, f"it is not JSON: {error}", advice=advice) from error
    model = content["model"]
    if model.get("dropout"):
        model = model | {"dropout": None}
    return content | {
        "added_tokens": content.get("added_tokens") or [],
        "model": model,
        "normalizer": None,
        "pre_tokenizer": split,
    }


def _check_ids(path: str, vocab: dict[str, int], added: list[dict[str, Any]]) -> None:
    tokens = {id_: token for token, id_ in vocab.items()}
    if len(tokens) < len(vocab):
        token, id_ = next(item for item in vocab.items() if tokens[item[1]] != item[0])
        raise unreadable(path, f"id {id_} is {token!r} and {tokens[id_]!r}")
    for entry in added:
        id_, token = entry["id"], entry["content"]
        # The library would give it another id, in silence.
        if tokens.setdefault(id_, token) != token:
            raise unreadable(path, f"id {id_} is {tokens[id_]!r} and {token!r}")
    # The library counts up to the largest id, which can be four billion.
    if max(tokens, default=0) > _LARGEST_ID_PER_TOKEN * max(len(tokens), 1000):
        raise unreadable(
            path, f"it has {len(tokens):,} tokens, and one with id {max(tokens):,}"
        )


def _other_file(content: Any) -> str:
    """Returns what JSON without a model is; "" for JSON with a model."""
    if not isinstance(content, dict):
        return "it is not a JSON object"
    if isinstance(content.get("model"), dict):
        return ""
    if "tokenizer_class" in content or "added_tokens_decoder" in content:
        return "it is a tokenizer_config.json"
    if content and all(isinstance(id_, int) for id_ in content.values()):
        return "it is a vocabulary alone, as in vocab.json"
    return "it has no 'model'"


def _without_prefix_space(split: Any) -> Any:
    """Returns a pre-tokenizer, possibly nested, that adds no space before the text."""
    if isinstance(split, list):
        return [_without_prefix_space(part) for part in split]
    if not isinstance(split, dict):
        return split
    return {
        key: False if key == "add_prefix_space" else _without_prefix_space(value)
        for key, value in split.items()
    }
