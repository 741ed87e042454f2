"""W&B workspaces and reports for one run, for SGD, SAM and CSAM side by side, or for a study.

    python launch/dashboard.py rules --dry-run             # print the specifications, no network
    python launch/dashboard.py run NAME --push --entity TEAM
    python launch/dashboard.py study FILE --push --entity TEAM

A panel shows what a run writes to metrics.jsonl, which a test checks. Runs that differ in their
seed alone are grouped. Lines are means with a band of one standard deviation.
"""

import argparse
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this code, wherever another copy is installed

import wandb_workspaces.reports.v2 as wr  # noqa: E402
import wandb_workspaces.workspaces as ws  # noqa: E402
from wandb_workspaces import expr  # noqa: E402

from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS  # noqa: E402
from flatcal_dist.config import Config, ConfigError  # noqa: E402
from flatcal_dist.files import write_text  # noqa: E402
from flatcal_dist.printing import never_fail  # noqa: E402
from flatcal_dist.studies.file import Study, load_study  # noqa: E402
from flatcal_dist.urls import hide  # noqa: E402

# The metrics that comparisons test, by name. W&B shows their values without a factor.
COMPARED_NAMES = {key: METRICS[key].name.removesuffix(" × 1000") for key in COMPARED}
# Lines over the steps: for each section its panels, each with title and metrics.
LINES = {
    "Validation": {
        name: [f"val/{key}"] for key, name in COMPARED_NAMES.items() if METRICS[key].running
    },
    "Training": {
        "Loss, and where the weights are perturbed": ["train/loss", "train/perturbed_loss"],
        "Sharpness": ["train/sharpness"],
        "Learning rate": ["optim/learning_rate"],
        "Perturbation asked for and taken": ["optim/rho", "optim/effective_rho"],
        "Gradient norms": ["optim/gradient_norm", "optim/ascent_gradient_norm"],
        "Cosine of the two gradients": ["optim/gradient_cosine"],
        "Steps left out": ["optim/skipped_steps"],
    },
    "Speed": {
        "Images per second": ["perf/images_per_second"],
        "Seconds per step": ["perf/step_seconds"],
        "Share of time that waits for data": ["perf/data_wait_fraction"],
    },
}
# Values of the report at the end of a run.
BARS = {
    **{name: f"calibration/{key}" for key, name in COMPARED_NAMES.items()},
    "Temperature": "calibration/temperature",
}
MEDIA = [
    "report/reliability_before", "report/reliability_after", "report/risk_coverage",
]  # fmt: skip
KINDS = {
    "run": "One run",
    "rules": "SGD, SAM and CSAM",
    "study": "Study",
}


def metrics_shown() -> set[str]:
    """Return every metric that a panel shows, by its name in metrics.jsonl."""
    lines = (name for panels in LINES.values() for names in panels.values() for name in names)
    return {"step", *lines, *BARS.values()}


def sections(kind: str, grid: list[str]) -> dict[str, list[Any]]:
    """Return panels by section. `grid` holds the keys that differ in a study."""
    grouping = {} if kind == "run" else _by_setting()
    found: dict[str, list[Any]] = {
        name: [wr.LinePlot(title=title, x="step", y=list(metrics), **grouping)
               for title, metrics in panels.items()]
        for name, panels in LINES.items()
    }  # fmt: skip
    bars = {} if kind == "run" else {"groupby": wr.Config("setting")}
    found = {
        "Report": [wr.BarPlot(title=title, metrics=[name], **bars) for title, name in BARS.items()]
    } | found
    if kind == "run":
        found["Reliability"] = [wr.MediaBrowser(media_keys=MEDIA)]
    if kind == "study":
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in grid]
        for name in ("accuracy", "nll", "ece"):
            metric = wr.SummaryMetric(f"calibration/{name}")
            columns.append(wr.ParallelCoordinatesPlotColumn(metric))
        scatter = [
            wr.ScatterPlot(
                title=f"{name.upper()} by {key}",
                x=wr.Config(key),
                y=wr.SummaryMetric(f"calibration/{name}"),
            )
            for key in grid
            if _is_number(key)
            for name in ("nll", "ece")
        ]
        found = {"Grid": [wr.ParallelCoordinatesPlot(columns=columns), *scatter]} | found
    return found


def workspace(
    kind: str, title: str, name: str | None, grid: list[str], entity: str, project: str
) -> ws.Workspace:
    """Return a workspace.

    Args:
        kind: A key of KINDS.
        title: The title of the workspace.
        name: The run or the study to show; None shows the whole project.
        grid: The keys that differ in a study.
        entity: The user or team; "" if nothing is sent.
        project: The project in W&B.
    """
    runs = ws.RunsetSettings(
        query=name if kind == "run" and name else "",
        filters=_of_group(name) if kind == "study" else "",
        groupby=[] if kind == "run" else [expr.Config("setting")],
    )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            ws.Section(name=section, panels=panels, is_open=True)
            for section, panels in sections(kind, grid).items()
        ],
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=runs,
    )


def report(
    kind: str, title: str, name: str | None, grid: list[str], entity: str, project: str
) -> wr.Report:
    """Return a report with the same panels, from the same arguments as `workspace`.

    With an entity, the server is asked for the project.
    """
    where = {"entity": entity, "project": project} if entity else {}
    runs = wr.Runset(
        **where,
        name=name or "all runs",
        query=name if kind == "run" and name else "",
        filters=_of_group(name) if kind == "study" else "",
        groupby=[] if kind == "run" else ["config.setting"],
    )
    blocks: list[Any] = []
    for section, panels in sections(kind, grid).items():
        blocks += [wr.H2(section), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")


def _of_group(name: str) -> str:
    """Return a filter for the runs of a group.

    The library parses it as text, and changes `<` and `=` even within quotation marks. So these and
    all other signs are written as escapes.
    """
    letters = (c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in name)
    return f"Metric('Group') == '{''.join(letters)}'"


def plain(title: str) -> str:
    """Return a title that W&B takes. It refuses symbols such as `<` and `+` as emojis."""
    symbols = ("So", "Sk", "Sm", "Sc", "Cs")
    return "".join("_" if unicodedata.category(letter) in symbols else letter for letter in title)


def specification(view: ws.Workspace | wr.Report) -> dict[str, Any]:
    """Return what would be sent, as plain JSON."""
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def main() -> None:
    never_fail()
    arguments = _parser().parse_args()
    try:
        name, grid, project = _subject(arguments.kind, arguments.subject)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    project = arguments.project or project
    title = plain(f"{KINDS[arguments.kind]}{f': {name}' if name else ''}")
    if arguments.push and not arguments.entity:
        sys.exit("error: --push needs --entity, the W&B user or team that owns the project")
    entity = arguments.entity if arguments.push else ""
    views = {
        "workspace": workspace(arguments.kind, title, name, grid, entity, project),
        "report": report(arguments.kind, title, name, grid, entity, project),
    }
    if not arguments.push:
        text = json.dumps({key: specification(view) for key, view in views.items()}, indent=1)
        if arguments.output:
            try:
                write_text(arguments.output, text + "\n")
            except OSError as error:
                sys.exit(f"error: --output {arguments.output}: {error}")
        else:
            print(text)
        return
    for key, view in views.items():
        try:
            view.save()
        except Exception as error:  # of W&B, requests, urllib, gql: each has its own
            server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
            sys.exit(
                f"error: the {key} was not made: {hide(str(error))} ({type(error).__name__}). It "
                f"needs {server}, a login there (`wandb login`) and the right to write into "
                f"{entity}/{project}; --dry-run shows what would be sent"
            )
        print(f"{key}: {view.url}")


def _subject(kind: str, subject: str | None) -> tuple[str | None, list[str], str]:
    """Return the name to look for, the keys of the grid, and the project."""
    project = Config().wandb.project
    if kind == "rules":
        return None, [], project
    if subject is None:
        raise ConfigError(f"{kind} needs the name of a run" if kind == "run"
                          else "study needs the study's file")  # fmt: skip
    if kind == "run":
        return Path(subject).name, [], project
    study: Study = load_study(subject)
    axes = [f"run.axes.{axis}" for axis in study.axes]
    return study.name, [*axes, *study.grid], study.set.get("wandb.project", project)


def _by_setting() -> dict[str, Any]:
    return {
        "groupby": wr.Config("setting"),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
    }


def _is_number(key: str) -> bool:
    section, _, name = key.partition(".")
    return isinstance(getattr(getattr(Config(), section), name, None), float | int)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kind", choices=tuple(KINDS))
    add("subject", nargs="?", metavar="NAME|FILE", help="run: its name or directory; study: file")
    add("--project", help="by default the configuration's wandb.project")
    add("--entity", help="W&B user or team")
    add("--output", type=Path, metavar="FILE", help="write the specifications there")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only print or write; the default")
    what.add_argument("--push", action="store_true", help="make them on the server")
    return parser


if __name__ == "__main__":
    main()
