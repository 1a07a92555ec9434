"""What a machine offers, and whether the numerics that everything rests on work there: `rpg doctor`.

Two numeric self-tests: the chunked scan against the recurrence written out, always; the CUDA kernels against their
plain-torch twins, where they can run.
"""

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rpgcli import __version__, kernels, rng
from rpgcli.tasks import find_datasets

PACKAGES = ("torch", "torchvision", "timm", "safetensors", "mamba-ssm", "causal-conv1d")
SCAN_TOLERANCE = 1e-4
"""Largest relative difference between the two scans; float32 gives about 1e-6."""
KERNEL_TOLERANCE = 1e-3
"""Largest relative difference between a kernel and its twin; TF32 products give about 3e-4."""
LITTLE_DISK = 2**30
"""Bytes; less free disk is worth a warning."""
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where a Linux container is told its share of the memory."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    facts: dict[str, Any]
    rows: list[list[str]]
    """(what, found) for people."""
    problems: list[str] = field(default_factory=list)
    """What works less well than it could."""
    broken: list[str] = field(default_factory=list)
    """What does not work."""

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {**self.facts, "problems": self.problems, "broken": self.broken}


def examine(device: torch.device, run_folder: Path, data_root: Path | None) -> Diagnosis:
    """Look at versions, device, kernels, numerics, threads, disk and data sets.

    Args:
        device: What would be computed on.
        run_folder: Where the run lies, or would lie; nothing is left there.
        data_root: Where data sets are looked for besides their usual places.
    """
    versions = {"rpg": __version__, "python": platform.python_version()} | {p: installed(p) for p in PACKAGES}
    available, reason = kernels.kernels_available(device)
    place = nearest_folder(run_folder)
    facts: dict[str, Any] = {
        "versions": versions, "device": str(device), "device_name": device_name(device),
        "device_memory_bytes": memory(device), "memory_bytes": memory(torch.device("cpu")),
        "kernels": {"available": available, "reason": reason, "install": kernels.INSTALL},
        "kernel_difference": kernels.compare_backends(device) if available else None,
        "scan_difference": compare_scans(), "threads": torch.get_num_threads(), "cores": num_cores(),
        "free_disk_bytes": shutil.disk_usage(place).free, "run": str(run_folder), "run_writable": is_writable(place),
        "data_sets": find_datasets(data_root),
    }  # fmt: skip
    problems, broken = judge(facts, device)
    return Diagnosis(facts, describe(facts), problems, broken)


def judge(facts: dict[str, Any], device: torch.device) -> tuple[list[str], list[str]]:
    """What works less well than it could, and what does not work."""
    problems, broken = [], []
    if device.type == "cuda" and not facts["kernels"]["available"]:
        problems.append(f"Mamba2 runs in plain torch on this GPU, which is slower. {kernels.INSTALL}")
    if facts["threads"] > facts["cores"]:
        problems.append(f"{facts['threads']} threads on {facts['cores']} cores: pass --threads {facts['cores']}.")
    if facts["free_disk_bytes"] < LITTLE_DISK:
        problems.append(f"only {gib(facts['free_disk_bytes'])} of disk are free where the run lies.")
    if not facts["run_writable"]:
        broken.append(f"{facts['run']} cannot be written: choose another --run.")
    for name, tolerance in (("scan", SCAN_TOLERANCE), ("kernel", KERNEL_TOLERANCE)):
        difference = facts[f"{name}_difference"]
        if difference is not None and not difference <= tolerance:  # NaN is broken as well.
            broken.append(f"the {name} self-test differs by {difference:.1e}, more than {tolerance:.0e}.")
    return problems, broken


def describe(facts: dict[str, Any]) -> list[list[str]]:
    """The facts as (what, found)."""
    found, difference = facts["kernels"], facts["kernel_difference"]
    kernel = found["reason"] if found["available"] else f"none: {found['reason']}"
    rows = [[name, found or "not installed"] for name, found in facts["versions"].items()]
    rows += [
        ["device", f"{facts['device']} ({facts['device_name']}), {gib(facts['device_memory_bytes'])}"],
        ["memory", gib(facts["memory_bytes"])],
        ["threads", f"{facts['threads']} on {facts['cores']} cores"],
        ["CUDA kernels", kernel],
        ["to install them", f"on a CUDA machine: {found['install']}"] if not found["available"] else
        ["kernels against plain torch", f"differ by {difference:.1e}"],
        ["chunked scan against recurrence", f"differ by {facts['scan_difference']:.1e}"],
        ["run", f"{facts['run']} ({'can' if facts['run_writable'] else 'cannot'} be written)"],
        ["free disk", gib(facts["free_disk_bytes"])],
    ]  # fmt: skip
    return rows + [[f"data set {name}", where] for name, where in facts["data_sets"].items()]


# --- what is looked at ------------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def memory(device: torch.device) -> int:
    """Bytes of memory that a process may use on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else ""
    return min(physical, int(limit)) if limit.isdecimal() else physical


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compare_scans() -> float:
    """Largest difference between the chunked scan and the recurrence, in units of the largest output."""
    generator = rng.stream(0, "doctor", "scan")

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, B, C = draw(1, 150, 4, 16), draw(1, 150, 2, 16), draw(1, 150, 2, 16)  # (B, L, H, P), (B, L, G, N)
    dt, A, D = F.softplus(draw(1, 150, 4) - 3), -draw(4).exp(), draw(4)
    expected = kernels.scan_reference(x, dt, A, B, C, D)
    return float((kernels.chunked_scan(x, dt, A, B, C, D) - expected).abs().max() / expected.abs().max())


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.is_dir())


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in `folder`; nothing is left."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def gib(num_bytes: int) -> str:
    """`31.4 GiB`."""
    return f"{num_bytes / 2**30:.1f} GiB"
