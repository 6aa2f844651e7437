"""What a command prints when it ends early: one line, for a mistake and for Ctrl-C."""

import pytest

from simsiam_dali.common.errors import UserError, one_line_errors


@pytest.mark.parametrize(
    ("ending", "status", "line"),
    [(UserError("no such\x1b folder"), 1, "error: no such\ufffd folder\n"), (KeyboardInterrupt(), 130, "stopped\n")],
)
def test_a_command_ends_with_one_line(
    ending: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @one_line_errors
    def command() -> None:
        raise ending

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == status
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    @one_line_errors
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()
