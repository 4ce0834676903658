"""Reads the results of a folder and writes their page."""

from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig

from common.files import write_atomically
from common.log import get_logger
from evaluation.report_page.content import read_parts
from evaluation.report_page.page import page
from evaluation.report_page.view import VIEW_NAME, write_view
from evaluation.results.results import Beside

REPORT_NAME = "report.html"


def write_report(cfg: DictConfig) -> None:
    """The page of a `ReportConfig`. UserError: there are no results, they or their pictures are damaged."""
    folder = Path(cfg.input_dir)
    output = folder / REPORT_NAME if cfg.output is None else Path(cfg.output)
    parts = read_parts(folder)
    volumes = [
        Beside(f"{part.results.kind.capitalize()}: {entry.name}", entry.volumes)
        for part in parts
        for entry in part.results.volumes
    ]
    if volumes:
        write_view(output.with_name(VIEW_NAME), volumes, cfg.title, folder)
    text = page(parts, title=cfg.title, made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    write_atomically(output, text.encode(errors="replace"))  # a command line can hold halves of characters
    get_logger().info("wrote %s", output)
