"""kubectl as it is called here: its answers as values, its refusals in one line."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from moray import UserError


@dataclass(frozen=True)
class Kubectl:
    """Calls in one namespace, or in the one of kubectl's own context."""

    namespace: str

    def words(self, *words: str) -> list[str]:
        return ["kubectl", *(["--namespace", self.namespace] if self.namespace else []), *words]

    def run(self, *words: str) -> str:
        """What it prints. Raises UserError where it is not there, or refuses."""
        if shutil.which("kubectl") is None:
            raise UserError(
                "kubectl is not installed here (https://kubernetes.io/docs/tasks/tools); --print shows the manifest, "
                "for `kubectl apply -f -` wherever it is"
            )
        done = subprocess.run(self.words(*words), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"`kubectl {words[0]}` refuses: {_in_one_line(done.stderr)}")
        return done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object as the cluster has it; None where it has none."""
        text = self.run("get", kind, name, "--output", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None


def _in_one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or "without a word"
