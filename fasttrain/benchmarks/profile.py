"""What runs on the device during a few steps, by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

TINY = 4.0
"microseconds below which a kernel's launch takes longer than it"
LAYOUT = ("nchwToNhwc", "nhwcToNchw")
"In the names of cuDNN's conversions between contiguous and channels-last."
HEAVIEST = 12


class Profile(NamedTuple):
    """Of a step."""

    launches: float  # kernels and copies on a GPU; on a CPU the operations that Python or autograd calls
    tiny: float  # kernels of less than 4 us
    busy: float  # seconds in which the device did anything
    layout: float  # seconds of conversions between memory formats
    heaviest: list[tuple[str, float, float]]  # name, seconds, times


class Profiler:
    """From its making to :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        activity = ProfilerActivity.CUDA if self._gpu else ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(activities=[activity])
        self._profiler.start()

    def stop(self, steps: int) -> Profile:
        """What ``steps`` steps came to; the device has to be done with them."""
        self._profiler.stop()
        events = self._profiler.events() or []
        if self._gpu:
            events = [event for event in events if _ran_on_gpu(event)]
        else:
            events = [event for event in events if _is_operation(event) and not _is_operation(event.cpu_parent)]
        spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
        return of_spans(spans, steps)


def of_spans(spans: Iterable[tuple[str, float, float]], steps: int) -> Profile:
    """Of (name, begin, end) in microseconds, which may overlap, as those of several streams do."""
    spans = sorted(spans, key=lambda span: span[1])
    busy, until = 0.0, float("-inf")
    seconds: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for name, begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
        seconds[name] += (end - begin) / 1e6 / steps
        times[name] += 1
    return Profile(
        len(spans) / steps,
        sum(end - begin < TINY for _, begin, end in spans) / steps,
        busy / 1e6 / steps,
        sum(taken for name, taken in seconds.items() if any(part in name for part in LAYOUT)),
        [(name[:100], taken, times[name] / steps) for name, taken in seconds.most_common(HEAVIEST)],
    )


def _ran_on_gpu(event: Any) -> bool:
    """A kernel or a copy, and not the span of several that a name was given to."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _is_operation(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


__all__ = ["Profile", "Profiler", "of_spans"]
