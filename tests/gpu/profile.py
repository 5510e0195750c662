"""Where a training step's time goes on the GPU, by kernel."""

import argparse

import torch
from torch.profiler import ProfilerActivity

from tests.gpu.results import emit, remaining
from tests.gpu.step_times import PUBLISHED, SMALL, Setting, Steps

TOP = 20  # kernels


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    device, size = torch.device("cuda"), PUBLISHED
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    if parser.parse_args().dry:
        device, size, activities = torch.device("cpu"), SMALL, activities[:1]
    for precision in ("bf16", "fp32"):
        if remaining() < 10:
            return
        steps = Steps(size, Setting("ours", False, precision, 2), device)
        for _ in range(size.warm_up):
            steps()
        with torch.profiler.profile(activities=activities) as profiler:
            steps()
        times = {}
        for event in profiler.key_averages():
            spent = event.self_cpu_time_total
            if device.type == "cuda":  # kernels alone, not the calls that start them
                on_gpu = event.device_type.name == "CUDA" and not event.is_user_annotation
                spent = event.self_device_time_total if on_gpu else 0
            if spent:
                times[event.key] = (spent / 1e3, event.count)
        total = sum(ms for ms, _ in times.values())
        emit("profile", precision=precision, kernels_ms=round(total, 2), kernels=len(times))
        for name, (ms, count) in sorted(times.items(), key=lambda item: -item[1][0])[:TOP]:
            emit(
                "profile", precision=precision, kernel=name[:120], ms=round(ms, 3), calls=count,
                share=round(ms / total, 4),
            )  # fmt: skip


if __name__ == "__main__":
    main()
