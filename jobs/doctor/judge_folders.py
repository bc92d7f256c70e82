"""Whether the folders of a run are there, shared by all nodes, and have room."""

from collections import Counter
from collections.abc import Iterator, Sequence

from moray.jobs.doctor.facts import Facts
from moray.jobs.doctor.verdict import GIB, Level, Verdict, check, listed

LITTLE_DISK, NO_DISK = 20 * GIB, GIB
SEEN_S = 2.0


def judge_folder(setting: str, path: str, nodes: Sequence[Facts]) -> list[Verdict]:
    """Of run.dir, which all nodes write to, and of data.path, which they read."""
    is_run = setting == "run.dir"
    findings = [*_access(setting, nodes, is_run), *_sharing(setting, nodes), *(_room(setting, nodes) if is_run else [])]
    is_bad = any(level == "bad" for level, _ in findings)
    findings += _locks(setting, nodes) if is_run and not is_bad else []
    said = [(level, f"{setting}={path}: {says}") for level, says in findings]
    seen = [node.meeting.seen_s[setting] for node in nodes if node.meeting and setting in node.meeting.seen_s]
    shared = f", what one writes all see within {max(seen):.2f} s" if seen else ""
    free = min(node.folders[setting].free_bytes for node in nodes) / GIB
    room = f", {free:.0f} GiB free" if is_run else ""
    return check(setting, f"{path}{shared}{room}", said)


def _access(setting: str, nodes: Sequence[Facts], must_write: bool) -> Iterator[tuple[Level, str]]:
    if missing := [node.host for node in nodes if not node.folders[setting].is_there]:
        yield "bad", f"not there on {listed(missing)}; mount the same storage on all nodes, or name another folder"
    for node in nodes:
        folder = node.folders[setting]
        if folder.is_there and must_write and not folder.is_writable:
            yield "bad", f"{node.host} cannot write there ({folder.problem}); change who may"
        elif folder.is_there and not must_write and folder.problem and not folder.is_writable and not folder.index:
            yield "bad", f"no dataset that {node.host} can read ({folder.problem})"


def _sharing(setting: str, nodes: Sequence[Facts]) -> Iterator[tuple[Level, str]]:
    for node in nodes:
        if node.folders[setting].is_there and node.meeting and (ranks := node.meeting.unseen.get(setting)):
            others = listed(nodes[rank].host for rank in ranks)
            yield "bad", f"{node.host} does not see what {others} wrote; mount the same storage on all nodes"
        elif node.meeting and (seconds := node.meeting.seen_s.get(setting, 0.0)) > SEEN_S:
            wait = f"{node.host} saw what others wrote after {seconds:.1f} s"
            yield "note", f"{wait}: each start waits so long; a shorter acdirmax, or actimeo, if it is NFS"
    found = Counter(node.folders[setting].index for node in nodes if node.folders[setting].is_there)
    if len(found) > 1:
        usual = found.most_common(1)[0][0]
        odd = [n.host for n in nodes if n.folders[setting].is_there and n.folders[setting].index != usual]
        yield "bad", f"{listed(odd)} has another index.json than the others; give all the same dataset"


def _room(setting: str, nodes: Sequence[Facts]) -> Iterator[tuple[Level, str]]:
    for node in nodes:
        folder = node.folders[setting]
        if folder.is_there and folder.free_bytes < LITTLE_DISK:
            level: Level = "bad" if folder.free_bytes < NO_DISK else "note"
            yield level, f"{node.host}: {folder.free_bytes / GIB:.1f} GiB free; commits need 12 bytes a parameter each"


def _locks(setting: str, nodes: Sequence[Facts]) -> Iterator[tuple[Level, str]]:
    then = "a second driver is not refused there, but takes the run over"
    if without := [node.host for node in nodes if not node.folders[setting].has_locks]:
        yield "note", f"files cannot be locked on {listed(without)}: {then}"
    elif apart := [node.host for node in nodes if node.meeting and node.meeting.shares_lock is False]:
        yield "note", f"a lock of {nodes[0].host} is none on {listed(apart)}: {then}"
