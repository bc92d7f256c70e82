"""What Ray itself runs on a node. Imports next to nothing: a node's start waits for it."""

import sys
from typing import Any

from moray.cluster.ray.agent import AgentProcess


class AgentActor:
    """Holds a node's slots in Ray and passes calls on to the agent, a process that is free of Ray."""

    def __init__(self, import_path: list[str]) -> None:
        # The agent sees what Ray lets a worker import, then what the driver could.
        self._agent = AgentProcess([*sys.path, *import_path])

    def call(self, method: str, *arguments: Any) -> Any:
        return self._agent.call(method, *arguments)
