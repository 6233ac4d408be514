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


def test_removed_channels_are_timed_beside_the_dense_network():
    """At this size a step is calls, not arithmetic, so only what is printed is looked at; the target is for 32x32 images."""
    command = [sys.executable, "benchmarks/slimming.py", "--quick", "--repeats", "1", "--device", "cpu", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    names = ["dense", "channels 0.5", "channels 0.35", "channels 0.2"]
    assert list(record["ms"]) == [f"{name}: {what}" for name in names for what in ("step", "inference")]
    assert sorted(record["flops"].values(), reverse=True) == [record["flops"][name] for name in names]
    assert record["flops"]["dense"] > 2 * record["flops"]["channels 0.5"]
