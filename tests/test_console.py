import io
import math

import pytest
import rich.console

from sct_jax.training import console as console_lib


def console(*, terminal: bool) -> rich.console.Console:
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=100, color_system=None
    )


class Closed(io.StringIO):
    """Standard output whose reader has gone, in an encoding of its own."""

    encoding = "ascii"
    errors = "strict"

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_output_that_nobody_reads_stops_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdout", Closed())
    out = console_lib.standard_output()
    console_lib.say(out, "a € \udcff [b]")
    progress = console_lib.Progress(out, start_step=0, num_steps=2)
    progress.show(shown(2))
    progress.close()


def test_standard_output_prints_any_name(capsys):
    console_lib.say(console_lib.standard_output(), "a € \udcff [b]")
    assert capsys.readouterr().out == "a € \\udcff [b]\n"


def shown(row_step, loss=2.5):
    return {
        "step": row_step,
        "train/loss": loss,
        "learning_rate": 1e-3,
        "tokens_per_second": 12345.6,
    }


SUMMARY = {
    "parameters": 597_797_888,
    "dense_equivalent_parameters": 1_711_376_384,
    "flops_per_token": 5_000_000_000,
    "bytes": {
        "parameters": 2_391_191_552,
        "gradients": 2_391_191_552,
        "optimizer": 4_782_383_112,
        "activations": 1_000_000,
        "total": 9_564_766_216,
    },
}


@pytest.mark.parametrize("width", [80, 100])
def test_the_start_table_has_the_figures(width):
    out = rich.console.Console(file=io.StringIO(), width=width, color_system=None)
    out.print(
        console_lib.start_table(
            SUMMARY,
            devices="8 x cpu",
            mesh={"data": 2, "fsdp": 4, "tensor": 1},
            tokens_per_step=1000,
            num_steps=50,
            choices={"rematerialisation": "dots (auto: needs 3.1 GB of 24 GB)"},
        )
    )
    text = out.file.getvalue()
    for figure in (
        "597,797,888",
        "1,711,376,384",
        "2.86x",
        "2,391,191,552 (2.39 GB)",
        "4,782,383,112 (4.78 GB)",
        "9,564,766,216 (9.56 GB)",
        "5,000,000,000",
        "50,000",
        "8 x cpu",
        "data 2, fsdp 4, tensor 1",
        "1,000,000 (1 MB)",
        "dots (auto: needs",
    ):
        assert figure in text, figure


def test_progress_off_a_terminal_prints_plain_lines():
    out = console(terminal=False)
    progress = console_lib.Progress(out, start_step=10, num_steps=30)
    progress.advance(11)
    progress.show(shown(11))
    progress.show(shown(12))  # less than two seconds later: not shown
    progress.print("a [bold]note[/bold]")
    progress.advance(30)
    progress.show(shown(30, loss=1.25))
    progress.close()
    text = out.file.getvalue()
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 11/30  loss 2.5000  lr 1.00e-03  12,346 tokens/s")
    assert "ETA" in lines[0]
    assert lines[1] == "a [bold]note[/bold]"
    assert lines[2].startswith("step 30/30  loss 1.2500")
    assert "\x1b" not in text and "\r" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_utilisation_where_it_is_known(terminal):
    texts = []
    for row in (shown(2), shown(2) | {"mfu": 0.4126}):
        out = console(terminal=terminal)
        progress = console_lib.Progress(out, start_step=0, num_steps=2)
        progress.show(row)
        progress.close()
        texts.append(out.file.getvalue())
    assert "MFU" not in texts[0]
    assert "12,346 tokens/s  MFU 41.3%" in texts[1]


def test_the_compilers_bytes_stand_beside_the_estimate():
    out = rich.console.Console(file=io.StringIO(), width=80, color_system=None)
    out.print(
        console_lib.compiled_table(
            {"argument_bytes": 20_223_809, "output_bytes": 772},
            {"argument_bytes": 20_000_000},
        )
    )
    argument, output = (
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in out.file.getvalue().splitlines()
        if "bytes" not in line and "│" in line
    )
    assert argument == ["argument", "20,223,809 (20.2 MB)", "20,000,000 (20 MB)"]
    assert output == ["output", "772 (772 B)", ""]


def test_progress_on_a_terminal_is_a_bar():
    out = console(terminal=True)
    progress = console_lib.Progress(out, start_step=0, num_steps=30)
    progress.advance(3)
    progress.show(shown(3))
    progress.print("above")
    progress.close()
    text = out.file.getvalue()
    assert "step 3/30" in text and "loss 2.5000" in text and "12,346 tokens/s" in text
    assert "above" in text


def test_progress_survives_a_loss_that_is_no_number():
    out = console(terminal=False)
    progress = console_lib.Progress(out, start_step=0, num_steps=2)
    progress.show(shown(2, loss=math.nan))
    progress.close()
    assert "nan" in out.file.getvalue()
