"""The report of a distillation: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import PIL.ImageDraw
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from eval.files import write_text
from students.export import Credits

INK, TEACHER, STUDENT = "#1b1f24", "#5b7083", "#d1495b"
MARKERS = "os^vDPXph<>d8H"
FAITHFULNESS = ("class_consistency", "clip_score", "retrieval_accuracy")


def write_report(
    path: Path,
    *,
    method: Credits,
    summary: dict[str, Any],
    speed: list[dict[str, Any]],
    samples: dict[str, PIL.Image.Image],
    settings: dict[str, str],
    protocol: dict[str, Any],
) -> None:
    """Write the page: samples side by side, quality against evaluations, timings, settings, protocol, method.

    `summary` is the quickstart's, `speed` the rows of `measure_speed`, `settings` YAML texts by title.
    """
    environment = Environment(loader=PackageLoader(__package__, "."), undefined=StrictUndefined, autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        method=method,
        faithfulness=[name for name in FAITHFULNESS if name in summary["student"]],
        summary=summary,
        speed=speed,
        samples={title: _data_uri(image) for title, image in samples.items()},
        plot=_data_uri(quality_plot(summary)),
        settings=settings,
        protocol=protocol,
    )
    write_text(path, page)


def quality_plot(summary: dict[str, Any]) -> PIL.Image.Image:
    """FD against network evaluations: the teacher's curve and the student's point."""
    with matplotlib.rc_context({"font.size": 11, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        teacher = sorted(summary["teacher"], key=lambda row: row["nfe"])
        axes.plot(
            [row["nfe"] for row in teacher], [row["fd"] for row in teacher], "o-", color=TEACHER, label="teacher, tuned"
        )
        for row in teacher:
            label = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
            axes.annotate(label, (row["nfe"], row["fd"]), xytext=(6, 7), textcoords="offset points", fontsize=9)
        student, untrained = summary["student"], summary["untrained_student"]
        axes.plot(1, student["fd"], "*", markersize=17, color=STUDENT, label="one-step student")
        axes.plot(1, untrained["fd"], "x", markersize=8, color=STUDENT, label="student before distillation")
        axes.axhline(summary["real_vs_real_fd"], color=INK, linewidth=0.8, linestyle=":", label="real against real")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("network evaluations per image")
        axes.set_ylabel("FD (lower is better)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer)
    return PIL.Image.open(buffer)


def frontier_plot(rows: list[dict[str, Any]], distance: str, student: str) -> PIL.Image.Image:
    """Distance against evaluations and against speed: a colour for each sampler, the frontier, the student's point."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        samplers = list(dict.fromkeys(row["sampler"] for row in rows if row["sampler"] != student))
        for axes, cost, mark, label in [
            (panels[0], "nfe", "on_frontier", "network evaluations per image"),
            (panels[1], "images_per_second", "on_speed_frontier", "images per second"),
        ]:
            for number, sampler in enumerate(samplers):
                points = [row for row in rows if row["sampler"] == sampler]
                axes.plot(
                    [row[cost] for row in points],
                    [row[distance] for row in points],
                    MARKERS[number % len(MARKERS)],
                    color=matplotlib.colormaps["tab20"](2 * number % 20 + number // 10),
                    label=sampler,
                    alpha=0.8,
                )
            frontier = sorted((row[cost], row[distance]) for row in rows if row[mark])
            axes.plot(*zip(*frontier, strict=True), color=INK, linewidth=1, zorder=0, label="the teacher's frontier")
            (point,) = (row for row in rows if row["sampler"] == student)
            axes.plot(point[cost], point[distance], "*", markersize=18, color=STUDENT, label=student)
            axes.set_xscale("log", base=2 if cost == "nfe" else 10)
            if cost != "nfe":
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{distance.upper()} (lower is better)")
        panels[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        buffer = io.BytesIO()
        figure.savefig(buffer)
    return PIL.Image.open(buffer)


def write_frontier_page(
    path: Path, rows: list[dict[str, Any]], plot: PIL.Image.Image, distance: str, student: str, protocol: dict[str, Any]
) -> None:
    """Write the frontier as one page: the plot, a table of every setting, the protocol."""
    environment = Environment(loader=PackageLoader(__package__, "."), undefined=StrictUndefined, autoescape=True)
    page = environment.get_template("frontier.html.jinja").render(
        rows=sorted(rows, key=lambda row: row[distance]),
        plot=_data_uri(plot),
        distance=distance,
        student=student,
        protocol=protocol,
    )
    write_text(path, page)


def side_by_side(pictures: dict[str, PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures in a row, each under its title."""
    gap, line = 24, 24
    width = sum(picture.width + gap for picture in pictures.values()) - gap
    height = line + max(picture.height for picture in pictures.values())
    row = PIL.Image.new("RGB", (width, height), "white")
    draw, left = PIL.ImageDraw.Draw(row), 0
    for title, picture in pictures.items():
        draw.text((left, 4), title, fill=INK, font_size=14)
        row.paste(picture, (left, line))
        left += picture.width + gap
    return row


def text_column(texts: list[str], row_height: int, num_characters: int = 28) -> PIL.Image.Image:
    """Texts in rows of this height, broken into lines, to stand beside a grid of images."""
    column = PIL.Image.new("RGB", (7 * num_characters, row_height * len(texts)), "white")
    draw = PIL.ImageDraw.Draw(column)
    for row, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, num_characters))
        draw.text((0, row * row_height + row_height / 2), lines, fill=INK, font_size=13, anchor="lm")
    return column


def _data_uri(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
