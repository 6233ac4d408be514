import pytest

from utils.errors import InputError, RunError, run_command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("bad\nflag"), 2, "error: bad flag\n"),
        (RunError("nan"), 3, "error: nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_code(error, code, line, capsys):
    def command():
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == line


def test_success_is_zero_and_bugs_are_not_hidden():
    assert run_command(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
