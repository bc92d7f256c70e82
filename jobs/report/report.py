"""`moray report`: a run as one HTML page, from the files in its folder.

The page needs nothing but itself, and its policy (CSP) lets a browser load nothing else and run no script but page.js.
The same run gives the same page: nothing in it is the time at which it was made.
"""

import tomllib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import ValidationError

from moray import UserError
from moray.cluster.events import read_events
from moray.jobs.config.load import flatten
from moray.jobs.config.sections import DataSection
from moray.jobs.models.describe import describe
from moray.jobs.models.inspect_model import find_config
from moray.jobs.models.units import short
from moray.jobs.report.config_table import changed_settings
from moray.jobs.report.curves import LEARNING, SPEED, Curve, curves, curves_of_layers, marks
from moray.jobs.report.experts import busiest_map, device_rows, layer_maps, own_time_map, sent_maps
from moray.jobs.report.mishaps import Mishap, mishaps
from moray.jobs.report.record import Record, read_record
from moray.jobs.report.samples import draw_samples
from moray.jobs.runs.files import replace_file
from moray.jobs.runs.show_status import span
from moray.jobs.runs.status import Status, status_of
from moray.model.accounting.cost import count_parameters

MOST_MISHAPS = 300


def write_report(run: Path, out: Path | None, samples: int) -> Path:
    """Draws the page and returns where it lies: RUN/report.html where `out` names no other file.

    Raises UserError for a folder that is no run, an `out` that is a folder, and less than no samples.
    """
    path = out or run / "report.html"
    if samples < 0:
        raise UserError(f"samples={samples} must be 0 (none) or more")
    status = status_of(run)
    if path.is_dir():
        raise UserError(f"out={path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(run, status, samples)
    # Any locale can write ASCII, and a browser reads references in any encoding.
    replace_file(path, page.encode("ascii", "xmlcharrefreplace").decode())
    return path


def render(run: Path, status: Status, samples: int) -> str:
    """The page of a run that has such a status."""
    toml, config, no_config = _config(run)
    folders = _folders(config)
    by_source = [f"validation_loss/{name}" for name in folders if name]
    record = read_record(run, by_source)
    events = [*read_events(run / "events.jsonl")] if (run / "events.jsonl").exists() else []
    found = mishaps(events, record.undone)
    files = resources.files("moray.jobs.report")
    script = (files / "page.js").read_text()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    written, told = draw_samples(run, folders, samples)
    return page.from_string((files / "page.html").read_text()).render(
        style=Markup((files / "page.css").read_text()),
        script=Markup(script),
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        folder=run.resolve(),
        status=status,
        facts=_facts(record, events, status),
        model=_model(run),
        data=", ".join(folders.values()),
        record=record,
        charts=_charts(record, found, by_source) if len(record.steps) else None,
        mishaps=found[-MOST_MISHAPS:],
        left_out=max(len(found) - MOST_MISHAPS, 0),
        toml=toml,
        changed=changed_settings(config),
        no_config=no_config,
        samples=written,
        told=told,
    )


def _charts(record: Record, found: Sequence[Mishap], by_source: Sequence[str]) -> dict[str, Any]:
    """All that is drawn of a run with a step at least. by_source: columns of its sources' validation losses."""
    of_sources = [Curve(name.replace("_loss/", ", "), "nats a token", "auto", [(name, "loss")]) for name in by_source]
    return {
        "marks": marks(record, found),
        "learning": curves(record, [*LEARNING, *of_sources]),
        "balance": curves_of_layers(record),
        "speed": curves(record, SPEED),
        "busiest": busiest_map(record),
        "layers": layer_maps(record),
        "sent": sent_maps(record),
        "devices": device_rows(record),
        "own_time": own_time_map(record),
    }


def _facts(record: Record, events: Sequence[Mapping[str, Any]], status: Status) -> list[tuple[str, str, str]]:
    """What a run is at a glance: a name, the fact, and what else there is to it."""
    of_steps = f"of {status.steps:,}" if status.steps else ""
    facts = [("steps", f"{status.step or 0:,}", of_steps)]
    for name, what in (("loss", "nats a token"), ("validation_loss", "the whole split, at last")):
        known = record.columns[name][np.isfinite(record.columns[name])]
        facts += [(name.replace("_", " "), f"{known[-1]:.3f}", what)] if len(known) else []
    facts.append(("tokens", short(_sum(record, "tokens"), "kMBT"), "that teach"))
    times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
    if times:
        facts.append(("time", span(max(times) - min(times)), f"{span(_sum(record, 'seconds'))} of it in steps"))
    again = f"{span(status.fault_seconds)}, {status.steps_again:,} steps computed again"
    return [*facts, ("faults", f"{status.faults:,}", again if status.faults or status.steps_again else "")]


def _sum(record: Record, name: str) -> float:
    known = record.columns[name]
    return float(known[np.isfinite(known)].sum(dtype=float))


def _model(run: Path) -> list[str]:
    """The architecture in lines, parameters first; or why nothing is known of it."""
    try:
        config = find_config(str(run.resolve()))  # which is no preset's name
    except (UserError, OSError, KeyError) as error:
        return [f"not known: {error}"]
    total, active = count_parameters(config)
    passes = f", of which a token passes {short(active, 'kMBT')}" if active < total else ""
    return [f"{short(total, 'kMBT')} parameters{passes}", *describe(config)]


def _folders(config: Mapping[str, Any]) -> dict[str, str]:
    """Where the data are, by the sources' names, as far as the settings say."""
    try:
        named = {name: config[f"data.{name}"] for name in ("path", "mix", "phases") if f"data.{name}" in config}
        return DataSection.model_validate(named).folders
    except ValidationError:
        return {"": ""}


def _config(run: Path) -> tuple[str, dict[str, Any], str]:
    """The text of config.toml, its settings by dotted name, and why there are none."""
    try:
        text = (run / "config.toml").read_text(errors="replace")
        return text, dict(flatten(tomllib.loads(text))), ""
    except FileNotFoundError:
        return "", {}, "the folder has no config.toml"
    except tomllib.TOMLDecodeError as error:
        return text, {}, f"config.toml is not TOML: {error}"
