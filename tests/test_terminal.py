"""What a command prints beside a progress bar."""

import io
import sys

import pytest

from simsiam_dali.common.terminal import print_line


def test_a_line_reaches_a_file_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    print_line("epoch 1")
    assert file.getvalue() == b"epoch 1\n"
