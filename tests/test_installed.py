import ast
import subprocess
import sys
from pathlib import Path

import pytest

from utils.installed import OLDEST, complaint

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / "main_adv.py", *sorted((ROOT / "Robust-Bird").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
SCRIPTS = [script for script in SCRIPTS if script.name != "flags.py"]  # which is for developers: it writes a page of docs/


def test_what_is_wrong_with_a_python():
    assert complaint(OLDEST, lambda name: True) is None
    assert complaint((3, 10), lambda name: True) == "Python 3.11 or newer is needed, this is 3.10"
    assert complaint((3, 12), lambda name: name != "torch") == "this Python has no torch"


def test_it_says_so_before_anything_else_is_imported(tmp_path):
    """A Python without site packages has no torch."""
    for script in SCRIPTS:
        result = subprocess.run([sys.executable, "-E", "-S", script, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, ""), script
        assert result.stderr.startswith("error: this Python has no torch"), script
        assert len(result.stderr.splitlines()) == 1, script


@pytest.mark.parametrize("path", [ROOT / "utils/installed.py", ROOT / "utils/__init__.py", *SCRIPTS], ids=lambda path: path.name)
def test_old_pythons_can_read_what_says_so(path):
    """All of a script is compiled before its first line runs, so it must keep to old syntax as far as Python 3.8 goes."""
    ast.parse(path.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("flag", ["--help", "--no-such-flag"])
def test_help_and_refusals_do_not_wait_for_libraries_that_they_do_not_need(script, flag):
    """A program that starts in a second because it imports them where it draws, downloads or writes events."""
    heavy = "matplotlib torchvision sklearn tensorboard torch.utils.tensorboard onnx onnxruntime advertorch pyautoattack".split()
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, {flag!r}]
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, [name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    expected = "0 []" if flag == "--help" else "2 []"
    assert result.stdout.splitlines()[-1] == expected, result.stderr
