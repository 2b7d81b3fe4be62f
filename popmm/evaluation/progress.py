"""What people see while they wait, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def for_people() -> Console:
    """The console of figures, progress and advice: stderr."""
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar on stderr that is gone when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = for_people()
    return (Progress if console.is_terminal else _Lines)(*columns, console=console, transient=True)


class _Lines(Progress):
    """Progress where there is no terminal: a line for each tenth of the work."""

    def __init__(self, *columns, **settings) -> None:
        super().__init__(*columns, **settings, disable=True)
        self._told: dict[int, int] = {}

    def update(self, task_id, **changes) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id) -> None:
        task = self._tasks[task_id]
        tenth = int(10 * task.completed / task.total) if task.total else 0
        if tenth > self._told.get(task_id, 0):
            self._told[task_id] = tenth
            self.console.print(f"{task.description}: {task.completed:g} of {task.total:g}", soft_wrap=True)
