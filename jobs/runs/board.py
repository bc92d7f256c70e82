"""RUN/tensorboard/: the curves of a run, one record a step, in the file format of TensorBoard.

torch's SummaryWriter would write them, but in a thread that ends, with a traceback, at the first write that fails; from
then on each call raises. Here a full disk delays a record.
"""

import os
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb as text_summary
from tensorboard.summary.writer.record_writer import RecordWriter

from moray.cluster.json_lines import NO_ROOM


class Board:
    """Appends to a file of its own in `folder`, which it makes where it is missing."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Shows nothing that earlier files hold of `first_step` and the steps after it."""
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._waiting = b""
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Appends one step, at once or once the disk has room. Raises OSError for anything else that goes wrong.

        texts: Markdown.
        """
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        values += [value for name, text in texts.items() for value in text_summary(name, text).value]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Raises OSError while the disk has no room for all that was written."""
        self._append()
        if self._waiting:
            raise OSError(NO_ROOM[0], os.strerror(NO_ROOM[0]), str(self._path))

    def _add(self, event: Event) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting += record.getvalue()
        self._append()

    def _append(self) -> None:
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
