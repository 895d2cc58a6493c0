"""What the benchmarks share: sides that take turns, figures with their spread, and the machine they were taken on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from speechbrain_mifuse.utils.progress import progress


class Figure(NamedTuple):
    """A quantity measured several times."""

    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def take_turns(sides: Mapping[str, Callable[[], float]], turns: int, desc: str, warm_up: int = 1) -> dict[str, list]:
    """Call each side in turn, `turns` times after `warm_up`; what each call returns, by side."""
    found = {name: [] for name in sides}
    for turn in progress(range(warm_up + turns), desc=desc, unit="turn"):
        for name, side in sides.items():
            value = side()
            if turn >= warm_up:
                found[name].append(value)
    return found


def ratio(above: list[float], below: list[float]) -> Figure:
    """Ratio of two sides turn by turn: what slows down both in one turn cancels."""
    return Figure("times", [a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict:
    """Processor, cores this process may use, threads of an operation, load before the start, versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """Name of the processor."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_json(name: str, about: dict, data: str, figures: Mapping[str, Figure]) -> dict:
    """Form described in `run.py`."""
    medians = {key: figure.median for key, figure in figures.items()}
    spread = {key: [min(figure.values), max(figure.values)] for key, figure in figures.items()}
    return {"name": name, "machine": about, "data": data, "figures": medians, "spread": spread}


def as_table(name: str, about: dict, data: str, figures: Mapping[str, Figure]) -> str:
    """Markdown table with a line on data and machine above it."""
    lines = [f"{name}, {data}; " + ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| figure | median | least | greatest | unit | turns |", "|---|---:|---:|---:|---|---:|"]
    for key, (unit, values) in figures.items():
        numbers = " | ".join(f"{value:.4g}" for value in (statistics.median(values), min(values), max(values)))
        lines.append(f"| {key} | {numbers} | {unit} | {len(values)} |")
    return "\n".join(lines)
