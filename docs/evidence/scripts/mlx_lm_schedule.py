"""mlx-lm: does the warm-up take as many steps as it is told?"""

from mlx_lm.tuner.utils import build_schedule

rate = build_schedule({"name": "linear_schedule", "warmup": 2, "arguments": [3e-4, 0.0, 3]})
print("expected: after two steps of warm-up the peak of 3.0e-04 is had once, then the rate falls")
print("got:", ", ".join(f"{float(rate(step)):.1e}" for step in range(5)))
