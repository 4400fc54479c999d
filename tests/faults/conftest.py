"""The fault table: what was done to a run, what happened, what was lost."""

import pytest
from rich.console import Console
from rich.table import Table

ROW = "fault"


@pytest.fixture
def fault(record_property):
    """Call it with (fault, what happened, what was lost) when a test has shown it."""

    def tell(what, happened, lost="nothing"):
        record_property(ROW, (what, happened, lost))

    return tell


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter, config):
    if "faults" not in (config.option.markexpr or ""):
        return
    table = Table("fault", "what happened", "lost", title="Faults")
    for report in terminalreporter.stats.get("passed", []):
        for name, row in report.user_properties:
            if name == ROW:
                table.add_row(*row)
    for report in terminalreporter.stats.get("failed", []):
        table.add_row(report.nodeid, "FAILED", "?")
    Console(file=terminalreporter._tw._file, width=150).print(table)
