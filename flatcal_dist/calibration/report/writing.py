"""The report of one run: a page, metrics, records and figures."""

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
    sharpness: Mapping[str, Any] | None = None,
    bins: int = 15,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Evaluate `records`, write the report into the folder `output`, and return its metrics.

    This writes index.html (one file that needs no network), metrics.json, metrics.csv, table.csv,
    table.tex, records.parquet, figures/*.png, *.svg, *.pdf and, with `image_of`, errors/*.jpg. Each
    file appears whole or not at all. If the folder holds a shift.json, the page shows it.

    Args:
        records: The records of the evaluated images.
        output: The folder of the report.
        about: What was evaluated.
        all_classes: The records of the same images among all classes of the network, if `records`
            are among some of them.
        image_of: Returns the encoded image of an id, or None. The page shows pictures of the most
            confident errors.
        training: The records of the run's metrics.jsonl, for the curves over epochs.
        sharpness: The keys of `report.sharpness.Sharpness`, if it was measured.
        bins: The number of bins of ECE and related metrics.
        resamples: The number of resamples.
        seed: The seed of the resamples.
    """
    output = Path(output)
    m = summarize(
        records, about, all_classes=all_classes, training=training, sharpness=sharpness,
        bins=bins, resamples=resamples, seed=seed,
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
    """Write index.html and the figures again from the files of a report folder.

    The folder must hold metrics.json and records.parquet. It may hold shift.json and errors/*.jpg.
    """
    m, _ = read_report(Path(output))
    _write_page(m, Path(output))


def read_report(folder: Path) -> tuple[Report, Records]:
    """Read the metrics and records of a report.

    ValueError if a file is missing or has another schema version, or if the two do not belong
    together.
    """
    for name in ("metrics.json", "records.parquet"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no report: {name} is missing; run `flatcal evaluate`")
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
