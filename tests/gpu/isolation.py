"""No test spoils those after it: a lost CUDA context, or a hang, ends its process, and xdist starts another.

An illegal address, say, sticks to the process in which it happened: every later call there fails too.
"""

import faulthandler
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
STATUS = 70  # of a process that has lost its context
# Of a trace: what runs the tests, and modules by the hundred.
OF_NO_INTEREST = re.compile(r'  File ".*/(_pytest|pluggy|xdist|execnet)/|  File "<string>"|Extension modules')
# The op in the id of a smoke test.
OP = re.compile(r".*test_smoke\.py::\w+\[(\w+) ")


def why_lost() -> str:
    """The error that sticks to this process, or nothing."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0] or repr(error)
    return ""


class Isolation:
    """In every process: those that run tests end with the test that spoils them; the first one hears of it.

    ``hang``: seconds after which a test's process ends, with the lines in which its threads are; 0 for never.
    """

    def __init__(self, config: pytest.Config, hang: float) -> None:
        worker = getattr(config, "workerinput", {})
        self.hang, self.is_worker = hang, bool(worker)
        self.lost = ""
        self.told: set[str] = set()
        # What a process that dies leaves to the first one.
        self.folder = None if worker else tempfile.TemporaryDirectory(prefix="fastvit-tests-")
        self.traces = None
        if shared := worker.get("isolation"):
            self.traces = open(Path(shared, worker["workerid"]), "w")  # noqa: SIM115
        elif not worker:
            self.traces = os.dup(2)  # past what captures a test's output

    def pytest_sessionstart(self):
        if self.is_worker and self.traces:  # a crash is told there too, and not on a terminal of many workers
            faulthandler.enable(self.traces)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self):
        if not self.hang or self.traces is None:
            return (yield)
        faulthandler.dump_traceback_later(self.hang, exit=True, file=self.traces)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        # Tests beside these play with torch.cuda.
        if item.path.parent == FOLDER and not self.lost and (reason := why_lost()):
            self.lost = report.lost = f"{report.nodeid} lost the CUDA context: {reason}"
            report.outcome = "failed"
            if hasattr(report.longrepr, "addsection"):
                report.longrepr.addsection("CUDA", self.lost)
            else:
                report.longrepr = self.lost
        return report

    def pytest_runtest_logfinish(self):
        if self.lost and self.is_worker:
            os._exit(STATUS)
        if self.lost:
            pytest.exit(self.lost, returncode=STATUS)

    def pytest_runtest_logreport(self, report):
        if hasattr(report, "lost"):
            self.told.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        return _by_op()(config, log) if config.getvalue("dist") == "loadgroup" else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["isolation"] = self.folder.name

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem, report):
        """The end of a process: its test has failed, unless that was told before."""
        if crashitem in self.told:
            report.outcome, report.when = "passed", "setup"  # which nobody counts
            return
        trace = Path(self.folder.name, report.node.gateway.id).read_text().splitlines()
        telling = [line for line in trace if not OF_NO_INTEREST.match(line)]
        report.longrepr = "\n".join([report.longrepr, *telling])


def _by_op() -> type:
    """A scheduler of groups, and of smoke tests by their op, that outlives the workers.

    pytest-xdist 3.8 marks no id with its group where pytest is 9.2, runs what ended a worker again and again,
    and waits for ever for a worker that waits for the test after its only one.
    """
    from xdist.scheduler import LoadGroupScheduling

    class ByOp(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            smoke = OP.match(nodeid)
            return smoke[1] if smoke else super()._split_scope(nodeid)

        def remove_node(self, node):
            units = self.assigned_work.pop(node)
            left = [(unit, test) for unit in units.values() for test, done in unit.items() if not done]
            if not left:
                return None
            unit, ended_it = left[0]
            unit[ended_it] = True
            self.workqueue.update({scope: unit for scope, unit in units.items() if not all(unit.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return ended_it

        def _reschedule(self, node):
            if node not in self.registered_collections:  # it comes when it has collected
                return
            super()._reschedule(node)
            mine = self.assigned_work[node]
            while self.workqueue and self._pending_of(mine) < 2 and not node.shutting_down:
                self._assign_work_unit(node)

    return ByOp
