"""What a real bash offers once it has read the script."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a shell would read it when it starts."""
    path = tmp_path_factory.mktemp("completion") / "moray"
    command = [sys.executable, "-m", "moray", "--completion", "bash"]
    path.write_bytes(subprocess.run(command, capture_output=True, timeout=50, check=True).stdout)
    return path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moray pre", ["prepare", "pretrain"]),
        ("moray generate run --max", ["--max-new-tokens"]),
        ("moray pretrain --model.moe.top", ["--model.moe.top_k", "--model.moe.top_k_groups"]),
        ("moray pretrain --optimizer.schedule ", ["cosine", "wsd"]),
        ("moray pretrain --model.preset deepseek-v2", ["deepseek-v2-lite", "deepseek-v2"]),
        ("moray pretrain --model.tied_embeddings ", ["true", "false"]),
        ("moray submit --fol", ["--follow"]),
        ("moray prepare --max", ["--max-document-bytes", "--max-bad"]),
        ("moray prepare --dedup ", ["auto", "exact", "none"]),
        ("moray prepare --clean.li", ["--clean.lines"]),
    ],
)
def test_bash_completes(script: Path, line: str, offered: list[str]) -> None:
    words = line.split(" ")
    commands = f"""
        source {script}
        COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
        $(complete -p moray | grep -o '_[a-z_]*')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split() == offered
