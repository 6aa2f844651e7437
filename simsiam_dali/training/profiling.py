"""`--profile N`: where N steps spend their time, as a trace for Perfetto (or chrome://tracing) and a table.

The parts of a step are named by `throughput.mark`. For Nsight Systems the same names are NVTX ranges, beside DALI's:
`nsys profile -t cuda,nvtx python -m simsiam_dali.train ...` needs no --profile.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 4
"""Steps before the traced ones, for cuDNN's tuning, torch.compile and the first fill of DALI's queue."""


class Profiler:
    """Traces `steps` steps after the warm-up, once, into `trace.json.gz` and `profile.txt` in the run's folder."""

    def __init__(self, steps: int, run_dir: Path, device: torch.device) -> None:
        self.run_dir, self.device = run_dir, device
        self.left = WARM_UP + steps if steps else 0
        if self.left:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self.profile.start()

    def step(self) -> None:
        """One training step is done."""
        if self.left:
            self.profile.step()
            self.left -= 1
            if not self.left:
                self.profile.stop()

    def stop(self) -> None:
        """The run ends, perhaps before all steps were traced."""
        if self.left:
            self.left = 0
            self.profile.stop()

    def _write(self, traced: profile) -> None:
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=by, row_limit=40)
        (self.run_dir / "profile.txt").write_text(table)
        traced.export_chrome_trace(str(self.run_dir / "trace.json.gz"))
