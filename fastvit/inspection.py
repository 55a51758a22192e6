"""What `fastvit info` shows: versions, hardware, what is built, and each op's backend here."""

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from . import backends
from .errors import ExtensionMismatch, ExtensionNotBuilt

PEERS = ("timm", "transformers", "torchvision", "open_clip_torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Inspection:
    """Facts by name, in the order shown; absent things say so in words."""

    versions: dict[str, str]
    hardware: dict[str, str]
    extension: dict[str, Any]
    environment: dict[str, str]
    ops: list[dict[str, str]]

    @classmethod
    def here(cls) -> Self:
        """This machine, this process."""
        rows = [
            {"op": op, "backend": backend, "reason": reason} for op, backend, reason in backends.describe()
        ]
        environment = {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTVIT_")
        }
        return cls(_versions(), _hardware(), _extension(), environment, rows)

    def to_json(self) -> str:
        """All of it, indented."""
        return json.dumps(asdict(self), indent=2)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for group in (self.versions, self.hardware, self.extension, self.environment):
            for name, value in group.items():
                facts.add_row(Text(name, style="bold"), Text(str(value)))
        table = Table("op", "backend here", "why")
        for row in self.ops:
            table.add_row(row["op"], Text(row["backend"], style="bold"), Text(row["reason"]))
        return Group(facts, "", table)


def _versions() -> dict[str, str]:
    versions = {
        "fastvit": _version("fastvit"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {"triton": _version("triton"), "cuda": torch.version.cuda or "torch is built without CUDA"}
    return versions | {peer: _version(peer) for peer in PEERS}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> dict[str, str]:
    hardware = {"platform": platform.platform(), "threads": str(torch.get_num_threads())}
    if not torch.cuda.is_available():
        return hardware | {"gpu": "none that torch can use: the ops run on the CPU"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        hardware[f"gpu {index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
    return hardware


def _extension() -> dict[str, Any]:
    from .extension import build_info

    try:
        return {"extension": str(build_info())}
    except (ExtensionNotBuilt, ExtensionMismatch) as error:
        return {"extension": str(error)}
