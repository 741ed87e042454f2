"""The report of one run: a page, metrics, records and figures, rendered from a few files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.confident_errors import save_thumbnails
from flatcal_dist.calibration.report.metrics_csv import metrics_csv
from flatcal_dist.calibration.report.model import Report, read_metrics
from flatcal_dist.calibration.report.summary import About, summarize
from flatcal_dist.calibration.report_page.main_table import table_csv, table_tex
from flatcal_dist.calibration.report_page.page import report_html
from flatcal_dist.calibration.shift.report import read_shift
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES
from flatcal_dist.files import write_json, write_text


def write_report(
    records: Records,
    output: Path,
    about: About | None = None,
    *,
    all_classes: Records | None = None,
    image_of: Callable[[str], bytes | None] | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    bins: int = 15,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Evaluate `records` and write the report into the folder `output`; return its metrics.

    Writes index.html (one file, needs no network), metrics.json, metrics.csv, table.csv, table.tex,
    records.parquet, figures/*.png, *.svg, *.pdf and, with `image_of`, errors/*.jpg; each appears
    whole or not at all. A shift.json that lies in the folder already becomes part of the page.

    image_of: gives the encoded image of a record's id, or None; for pictures of the most confident
    errors. training: the records of the run's metrics.jsonl, for the curves over epochs.
    all_classes: where the records are among a part of the network's classes, those of the same
    images among all of them.
    """
    output = Path(output)
    m = summarize(
        records, about, all_classes=all_classes, training=training, bins=bins,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    records.save(output / "records.parquet")
    write_text(output / "metrics.csv", metrics_csv(m))
    write_text(output / "table.csv", table_csv(m))
    write_text(output / "table.tex", table_tex(m))
    write_json(output / "metrics.json", m.as_json())
    save_thumbnails(m.confident_errors, image_of, output)
    _write_page(m, output)
    return m


def render_report(output: Path) -> None:
    """Write index.html and the figures again from what lies in the report folder.

    Needs metrics.json and records.parquet; takes shift.json and errors/*.jpg where they are.
    """
    m, _ = read_report(Path(output))
    _write_page(m, Path(output))


def read_report(folder: Path) -> tuple[Report, Records]:
    """The metrics and records of a report. ValueError if it is not whole or of another version."""
    for name in ("metrics.json", "records.parquet"):
        if not (folder / name).is_file():
            raise ValueError(f"no report in {folder}: {name} is missing; run `flatcal evaluate`")
    m = read_metrics(folder / "metrics.json")
    records = Records.load(folder / "records.parquet")
    if len(records) != m.images:
        raise ValueError(
            f"metrics.json and records.parquet of {folder} belong to different evaluations: "
            f"{m.images} and {len(records)} images; evaluate the run again"
        )
    return m, records


def _write_page(m: Report, output: Path) -> None:
    write_text(output / "index.html", report_html(m, read_shift(output), output))
