import subprocess
import sys

import pytest

from utils.errors import InputError, RunError, run_command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("bad\nflag"), 2, "error: bad flag\n"),
        (RunError("nan"), 3, "error: nan\n"),
        (OSError(28, "No space left on device"), 3, "error: [Errno 28] No space left on device\n"),
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


def test_a_closed_pipe_is_quiet():
    script = "from utils.errors import run_command; import sys; sys.exit(run_command(lambda: [print('x' * 1000) for _ in range(1000)]))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
