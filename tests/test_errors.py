import signal
import subprocess
import sys
import warnings
from pathlib import Path

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
    script = (
        "from utils.errors import run_command; import sys; sys.exit(run_command(lambda: [print('x'"
        " * 1000) for _ in range(1000)]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.fixture(autouse=True)
def _handlers():
    handler, form = signal.getsignal(signal.SIGINT), warnings.formatwarning
    yield
    signal.signal(signal.SIGINT, handler)
    warnings.formatwarning = form


HASTY = """
import os, signal, sys, time
from utils.errors import run_command, Stopped
from utils.execution.interruption import Interruption
def press(): os.kill(os.getpid(), signal.SIGINT)
class Err:
    def __init__(self, err): self.err = err
    def write(self, text): press(); return self.err.write(text)
    def flush(self): self.err.flush()
def command():
    sys.stderr = Err(sys.stderr)
    try:
        if sys.argv[1] == "plain":
            press()
        with Interruption() as interruption:
            press()
            if sys.argv[1] == "twice":
                press()
            raise interruption.asked()
    finally:
        if sys.argv[1] != "once":
            press()
code = run_command(command)
press()
sys.exit(code)
"""


@pytest.mark.parametrize("when", ["plain", "once", "twice"])
def test_ctrl_c_again_and_again_ends_quietly(when):
    """Pressed in the command, in its cleanup, while its last line is printed, and afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", HASTY, when], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130
    assert set(done.stderr.split()) == {"interrupted"}


def test_a_warning_is_one_line():
    script = (
        "import warnings; from utils.errors import run_command; run_command(lambda:"
        " warnings.warn('stripped\\n module.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "warning: stripped module.\n"


def test_help_and_refusals_do_not_wait_for_libraries_that_they_do_not_need():
    """Libraries for plots, downloads and events are imported only where they are used."""
    root = Path(__file__).parents[1]
    scripts = [root / "main_adv.py", *root.glob("Robust-Bird/*.py"), *root.glob("scripts/*.py")]
    heavy = "matplotlib torchvision sklearn tensorboard onnx onnxruntime advertorch pyautoattack"
    code = f"""
import runpy, sys
for script in {[str(script) for script in scripts]}:
    for flag in ("--help", "--no-such-flag"):
        sys.argv = [script, flag]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert end.code == (0 if flag == "--help" else 2), (script, flag)
assert not [name for name in {heavy.split()} if name in sys.modules]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
