"""`moray doctor`."""

from pathlib import Path

from rich.console import Console

MARKS = {"ok": "OK", "note": "NOTE", "bad": "BAD"}


def doctor(
    *, cluster: bool = False, run_dir: Path | None = None, data_path: Path | None = None, json: bool = False
) -> int:
    """Tell whether this machine, or a whole cluster, is fit, and what to do if not.

    Exits with 1 if something is to be mended first.

    Args:
        cluster: Look at every node of the Ray of RAY_ADDRESS (without one, of a Ray started here), and between them.
        run_dir: A folder for runs, which all nodes must share and write to.
        data_path: A dataset, which all nodes must be able to read.
        json: Print verdicts and facts as one JSON object.
    """
    from moray.jobs.doctor.doctor import examine_all

    folders = {setting: path for setting, path in (("run.dir", run_dir), ("data.path", data_path)) if path is not None}
    report = examine_all(folders, in_cluster=cluster)
    if json:
        print(report.model_dump_json())
    else:
        console = Console(markup=False, highlight=False, soft_wrap=True)
        for verdict in report.verdicts:
            console.print(f"{MARKS[verdict.level]:<5} {verdict.check:<14} {verdict.says}")
    return 0 if report.is_fit else 1
