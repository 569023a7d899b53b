"""The run for TensorBoard, through TensorBoard's own library: no other framework is loaded for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distrust.errors import ConfigError
from distrust.reporting.scalars import scalars_of
from distrust.training.events import CheckpointStarted, Event, RunEnded, RunStarted

FOLDER = "tensorboard"


class TensorBoardWriter:
    """Writes event files into the run's folder ``tensorboard``.

    A run that goes on from a checkpoint says so in a way that TensorBoard knows: what was logged of later
    steps, which are made again, is not shown.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                f"--report-to tensorboard needs its library ({error}): pip install tensorboard"
            ) from None
        self._event, self._summary, self._writer = event_pb2, summary_pb2, EventFileWriter
        self._file: Any = None

    def __call__(self, event: Event) -> None:
        """Write what an event says."""
        match event:
            case RunStarted():
                self._file = self._writer(str(event.out / FOLDER))
                start = self._event.SessionLog(status=self._event.SessionLog.START)
                self._add(event.step + 1 if event.step else 0, session_log=start)
            case CheckpointStarted() if self._file is not None:
                self._file.flush()
            case RunEnded() if self._file is not None:
                self._file.close()
                self._file = None
            case _ if self._file is not None:
                step, values = scalars_of(event)
                if values:
                    self._add(step, summary=self._summarized(values))

    def _add(self, step: int, **what: Any) -> None:
        self._file.add_event(self._event.Event(wall_time=time.time(), step=step, **what))

    def _summarized(self, values: Mapping[str, float]) -> Any:
        return self._summary.Summary(
            value=[self._summary.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
