"""What a test needs of the machine, by its marker; where that is not there, it is left out by name.

    @pytest.mark.needs(gpus=2)              so many GPUs
    @pytest.mark.needs(gigabytes=20)        of the GPU's memory, all told
    @pytest.mark.needs(capability=(9, 0))   exactly this compute capability
    @pytest.mark.needs(library=True)        the compiled CUDA library
    @pytest.mark.needs(cutlass=True)        built with CUTLASS
    @pytest.mark.needs(package="timm")      installed
    @pytest.mark.needs(runtime=True)        CUDA itself: streams, graphs, the allocator, the profiler

Nothing here may differ from process to process: pytest-xdist's are to collect the same tests.
"""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch


def _gpus(count):
    found = torch.cuda.device_count()
    return None if found >= count else f"needs {count} GPUs, and there is {found}"


def _gigabytes(size):
    found = torch.cuda.get_device_properties(0).total_memory / 1e9
    return None if found >= size else f"needs {size} GB of GPU memory, and there are {found:.0f}"


def _capability(wanted):
    found = torch.cuda.get_device_capability()
    if found == wanted:
        return None
    has, needed = (".".join(map(str, pair)) for pair in (found, wanted))
    return f"needs compute capability {needed}, and {torch.cuda.get_device_name()} has {has}"


def _library(_):
    from fastvit import extension

    return (reason := extension.why_no_ops("cuda")) and str(reason)


def _cutlass(_):
    from fastvit import extension

    if reason := _library(_):
        return reason
    info = extension.build_info()
    return f"the library is built without CUTLASS: {info}" if info.cutlass == "none" else None


def _package(name):
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


KINDS = {
    "gpus": _gpus,
    "gigabytes": _gigabytes,
    "capability": _capability,
    "library": _library,
    "cutlass": _cutlass,
    "package": _package,
}


FOLDER = Path(__file__).parent


class LeftOut:
    """Deselects the tests whose needs are not met, and says which they are and why.

    ``gpu``: there is one to ask. ``runtime``: there is CUDA itself, and no stand-in.
    """

    def __init__(self, gpu: bool, runtime: bool) -> None:
        self.gpu, self.runtime = gpu, runtime
        self.tests: Counter[str] = Counter()

    def unmet(self, item: pytest.Item) -> str | None:
        """The first reason why this test can show nothing here, or None."""
        needs = {kind: value for mark in item.iter_markers("needs") for kind, value in mark.kwargs.items()}
        if needs.pop("runtime", False) and not self.runtime:
            return "--no-runtime"
        reasons = (KINDS[kind](value) for kind, value in needs.items() if self.gpu)
        return next(filter(None, reasons), None)

    def pytest_collection_modifyitems(self, config, items):
        self.interleave(items)
        reasons = {item: self.unmet(item) for item in items}
        left_out = [item for item, reason in reasons.items() if reason]
        if not left_out:
            return
        items[:] = [item for item in items if not reasons[item]]
        config.hook.pytest_deselected(items=left_out)
        self.tests.update(f"{item.nodeid.partition('[')[0]}: {reasons[item]}" for item in left_out)

    def interleave(self, items):
        """Some of every file first: a run that is cut off has then looked at all of them.

        Of these tests alone: others' fixtures would be made once more for each that comes between.
        """
        if any(item.path.parent != FOLDER for item in items):
            return
        sizes, places = Counter(item.path for item in items), Counter()
        shares = {}
        for item in items:
            shares[item] = places[item.path] / sizes[item.path]
            places[item.path] += 1
        items.sort(key=shares.get)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = dict(self.tests)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.tests = Counter(getattr(node, "workeroutput", {}).get("left_out")) or self.tests

    def pytest_terminal_summary(self, terminalreporter):
        if self.tests:
            terminalreporter.section("left out: this machine cannot show it")
        for test, count in self.tests.items():
            terminalreporter.line(f"{test} ({count})" if count > 1 else test)
