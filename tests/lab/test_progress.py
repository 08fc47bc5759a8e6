"""The one line of a training: all its numbers in 80 columns on a terminal, and few lines in a file."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from contextlib import contextmanager, suppress

import pytest
import torch
from transformers import Trainer, TrainingArguments

from flora_lab import lines
from flora_lab.lines import Line
from flora_lab.run.progress import Progress, numbers
from flora_lab.tasks.data.records import Records, check_each


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, labels):
        return {"loss": (self.weight * labels).square().mean()}


def trained(folder, steps=6, **keys):
    """A Trainer whose steps have losses near 4, 6 steps of 2 examples, evaluated twice."""
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant", per_device_train_batch_size=2,
        report_to="none", save_strategy="no", use_cpu=True, logging_steps=3, eval_strategy="steps", eval_steps=3,
        remove_unused_columns=False, dataloader_pin_memory=False, **keys,
    )  # fmt: skip
    data = [{"labels": torch.ones(1)}] * 4
    return Trainer(Square(), arguments, train_dataset=data, eval_dataset=data)


@contextmanager
def terminal(monkeypatch):
    """A terminal of 80 columns in place of stderr; the list that it yields has at the end what stood on it in turn."""
    screen, keyboard = pty.openpty()
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    states: list[str] = []
    with os.fdopen(keyboard, "w", encoding="utf-8") as file, monkeypatch.context() as patch:
        patch.setattr(lines, "ON_TERMINAL", 0.0)
        patch.setattr(sys, "stderr", file)
        yield states
    with os.fdopen(screen, "rb", buffering=0) as output, suppress(OSError):  # Linux ends what is read by an error
        text = b""
        while part := output.read(4096):
            text += part
    states += [state.rstrip() for state in re.split(r"[\r\n]+", text.decode()) if state.strip()]


def test_any_trainer_shows_all_numbers_in_one_line(tmp_path, monkeypatch, capsys):
    with terminal(monkeypatch) as states:
        trainer = trained(tmp_path)
        Progress("flora-activations").attach(trainer)
        trainer.train()
    expected = r"flora-act… \S+ 6/6 00:00 left, loss 3\.\d\d, lr 1\.0e-3, \d+\.\d GiB, val 3\.\d{3}"
    assert re.fullmatch(expected, states[-1]), states[-1]
    assert all(len(state) < 80 for state in states)
    assert capsys.readouterr().out == ""  # Trainer prints no logs beside it


def test_an_evaluation_that_takes_long_has_a_line_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    with terminal(monkeypatch) as states:
        trainer = trained(tmp_path, per_device_eval_batch_size=1)
        Progress("flora").attach(trainer)
        trainer.train()
        trainer.evaluate()
    own = [number for number, state in enumerate(states) if re.search(r"evaluating \S+ 4/4 00:00 left", state)]
    (trained_at,) = [number for number, state in enumerate(states) if "6/6 00:00 left, loss" in state][-1:]
    assert own[0] < trained_at < own[-1]


def test_a_long_line_still_fits_into_80_columns(monkeypatch):
    with terminal(monkeypatch) as states:
        line = Line("flora-activations", 40000, 0, shown=True)
        line.bar.start_t -= 2000  # for 15,000 steps: 3,333 s more
        line.draw(15000, numbers(0.4123, 8.13e-4, 79 << 30, 0.9124))
        line.close()
    shown = states[1]
    assert len(shown) < 80
    for part in ("15000/40000", "55:33 left", "loss 0.412", "lr 8.1e-4", "79 GiB", "val 0.912"):
        assert part in shown


def test_a_file_gets_a_line_per_minute_and_one_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = [0.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock[0])
    trainer = trained(tmp_path, steps=13)
    shown = Progress("flora-activations")
    step = trainer.training_step

    def slow(*args, **kwargs):
        clock[0] += 25.0
        loss = step(*args, **kwargs)
        shown.add(loss)
        return loss

    monkeypatch.setattr(trainer, "training_step", slow)
    shown.attach(trainer)
    trainer.train()
    text = sys.stderr.getvalue()
    states = text.splitlines()
    assert [line.split()[1] for line in states] == ["0/13", "3/13", "6/13", "9/13", "12/13", "13/13"]
    assert "\r" not in text and "\x1b" not in text
    assert all(re.search(r"left, loss [34]\.\d\d, lr 1\.0e-3, \d+\.\d GiB", line) for line in states[1:]), text


def test_the_loss_is_the_mean_of_the_steps_since_the_line_was_drawn(monkeypatch):
    with terminal(monkeypatch) as states:
        shown = Progress()
        shown.line = Line("lora", 4, 0, shown=True)
        for step, loss in enumerate((1.0, 2.0, 4.0), start=1):
            shown.add(torch.tensor(loss))
            if step > 1:
                shown._draw(step)
        shown.close()
    assert "loss 1.50," in states[1] and "loss 4.00," in states[2]


def test_numbers_that_are_not_known_are_left_out():
    assert numbers(None, 1e-2, None, 0.5) == "lr 1.0e-2, val 0.500"
    assert numbers(12.345, 0.0, 1 << 29) == "loss 12.3, lr 0, 0.5 GiB"


def of_numbers(*lengths):
    return [Records(list(range(length)), str) for length in lengths]


def test_a_check_that_takes_long_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    with terminal(monkeypatch) as states:
        check_each(of_numbers(4, 2), lambda records, index: None)
    assert [re.sub(r" \S+ ", " ", state, count=1) for state in states[-2:]] == ["checking 6/6 00:00 left"] * 2
    check_each(of_numbers(4), lambda records, index: None)
    assert capsys.readouterr().err.splitlines()[-1] == "checking 4/4 00:00 left"


def test_a_short_check_and_that_of_another_process_say_nothing(monkeypatch, capsys):
    check_each(of_numbers(4), lambda records, index: None)
    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    check_each(of_numbers(4), lambda records, index: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(Line, "hidden", True)
    check_each(of_numbers(4), lambda records, index: None)
    assert capsys.readouterr().err == ""


def test_a_check_that_fails_ends_its_line(monkeypatch, capsys):
    def look(records, index):
        if index == 3:
            raise ValueError("row 3")

    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    with pytest.raises(ValueError, match="row 3"):
        check_each(of_numbers(5), look)
    assert re.fullmatch(r"checking 3/5 \S+ left", capsys.readouterr().err.splitlines()[-1])
