import json
import subprocess
import sys


def test_masks_cost_little_beside_a_step():
    """The targets of benchmarks/masking.py: masks on at most 3 % of a step, an update at most two steps."""
    command = [sys.executable, "benchmarks/masking.py", "--quick", "--device", "cpu", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ms = json.loads(result.stdout)["ms"]
    step = ms.pop("training step")
    assert ms.pop("masks on") < 0.03 * step
    assert max(ms.values()) < 2 * step
