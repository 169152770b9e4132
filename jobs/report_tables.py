"""A report's tables, for people (Markdown) and for programs (CSV)."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

RATES = {  # what stands above the column, and what that is
    "bitstream": ("bpp (files)", "the sizes of files, each decoded and compared"),
    "tables": ("bpp (ideal)", "ideal code lengths, by the tables that drove the search"),
}
LIMITS = (
    "An under-trained codec exaggerates what finetuning gives: look at the difference to the controls, and believe a "
    "number once longer training no longer moves it."
)
RELATIONS = {  # of a pair -> the title of its table
    "base": "Over the base of the same quantizer",
    "control": "Over the controls of the same recipe",
    "first base": "Over the base of the first quantizer",
    "first quantizer": "Over the same arm of the first quantizer",
}
GAINS_TITLE = "Gains at each λ"
GAINS_SHOWN = ("base", "control")
NAMED_IMAGES = 4  # that cannot be compared, in a line; all are in report.json
Row = Mapping[str, Any]


def as_csv(table: Sequence[Row]) -> bytes:
    """Rows under the names of the first one's columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def flat(row: Row) -> dict[str, Any]:
    """A row of `bd_rates` or `gains` without nested values.

    An interval becomes its ends, the seeds the least and the most of them, images their number.
    """
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if "interval" in name:
            cells[name.replace("interval", "low")], cells[name.replace("interval", "high")] = value or (
                "",
                "",
            )
        elif "seeds" in name:
            cells[name.replace("seeds", "seeds_min")] = min(value, default="")
            cells[name.replace("seeds", "seeds_max")] = max(value, default="")
        elif name == "per_image":
            cells["images"] = len(value)
        else:
            cells[name] = len(value) if name == "not_comparable" else value
    return cells


def as_markdown(
    name: str, tables: Mapping[str, Sequence[Row]], images: Mapping[str, str], rate: str, files: Sequence[str]
) -> str:
    """The report as a person reads it.

    Args:
        name: of the experiment.
        tables: `table`, `bd_rate`, `gains` and `references`.
        images: digest -> name of the test images.
        rate: what the rate is; a key of `RATES`.
        files: the other files of the report.
    """
    lines = [f"# {name}", "", f"{len(images)} test images; rate: {RATES[rate][1]}.", ""]
    lines += _arms(tables["table"], RATES[rate][0])
    if tables["bd_rate"]:
        lines += ["", "## BD-rate", "", *_bd_rates(tables["bd_rate"], images)]
    if tables.get("references"):
        lines += ["", "## Over curves from elsewhere", "", *_references(tables["references"])]
    lines += ["", LIMITS]
    if any(row["relation"] in GAINS_SHOWN for row in tables["gains"]):
        lines += ["", f"## {GAINS_TITLE}", "", *_gains(tables["gains"])]
    lines += ["", "## Files", "", *(f"- {file}" for file in [*files, "report.md"]), ""]
    return "\n".join(lines)


def _arms(table: Sequence[Row], bpp: str) -> list[str]:
    over = [column for column in table[0] if column.startswith("over_")]
    head = ["λ", "quantizer", "arm", "seed", bpp, "PSNR dB", "MS-SSIM", "ΔJ over base"]
    head += [f"ΔPSNR over {column.removeprefix('over_').removesuffix('_db')}" for column in over]
    return [
        *_table(head, [_cells(row, over) for row in _over_seeds(table)]),
        "",
        "Means over seeds and images. ΔPSNR is in dB, at equal indices and bits; — where those, or the arms' recipes, "
        "differ. J is bpp + λ · 255² · MSE: negative is better, also where indices differ.",
    ]


def _over_seeds(table: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per λ, quantizer and arm; a number is None where any seed's is, and `seed` names all."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in table:
        groups.setdefault((row["lmbda"], row["quantizer"], row["arm"]), []).append(row)
    merged = []
    for rows in groups.values():
        names = [name for name in rows[0] if name not in {"lmbda", "quantizer", "arm", "seed"}]
        columns = {name: [row[name] for row in rows] for name in names}
        means = {
            name: None if None in column else sum(column) / len(rows) for name, column in columns.items()
        }
        seeds = ", ".join(str(row["seed"]) for row in rows if row["seed"] is not None)
        merged.append(dict(rows[0]) | means | {"seed": seeds})
    return merged


def _cells(row: Row, over: Sequence[str]) -> list[str]:
    return [
        f"{row['lmbda']:g}",
        row["quantizer"],
        row["arm"],
        row["seed"],
        f"{row['bpp']:.4f}",
        f"{row['psnr_db']:.3f}",
        "—" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}",
        _number(row["cost_over_base_percent"], "+z.2f", " %"),
        *(_number(row[column], "+z.3f") for column in over),
    ]


def _bd_rates(bd: Sequence[Row], images: Mapping[str, str]) -> list[str]:
    """A table for each relation, and who is missing in them."""
    lines = [
        "PCHIP of log rate over PSNR where curves overlap, per image, then averaged over seeds and images; negative is "
        "better. Curves that overlap by less than a quarter of the shorter one's range of PSNR are not compared. The "
        "interval is a paired bootstrap over images. Mean curves: BD-rate of mean bpp and mean PSNR."
    ]
    for relation, title in RELATIONS.items():
        rows = [row for row in bd if row["relation"] == relation]
        if rows:
            head = ["quantizer", "arm", "over", "BD-rate", "95 % interval", "seeds", "mean curves", "images"]
            lines += ["", f"### {title}", "", *_table(head, [_bd_cells(row) for row in rows])]
    missing = [_missing(row, images) for row in bd if row["not_comparable"]]
    if missing:
        lines += ["", "Not compared, the reasons in full in report.json:", "", *missing]
    return lines


def _bd_cells(row: Row) -> list[str]:
    compared = len(row["per_image"])
    return [
        row["quantizer"],
        row["arm"],
        _anchor(row),
        _number(row["bd_rate_percent"], "+z.2f", " %"),
        _range(row["interval_percent"], "+z.2f", " %"),
        _seeds(row["seeds_percent"], "+z.2f", " %"),
        _number(row["mean_curves_percent"], "+z.2f", " %"),
        f"{compared} of {compared + len(row['not_comparable'])}",
    ]


def _missing(row: Row, images: Mapping[str, str]) -> str:
    """Which images a comparison lacks, and why the first of them."""
    digests = sorted(row["not_comparable"], key=lambda digest: images.get(digest, digest))
    named = ", ".join(images.get(digest, digest) for digest in digests[:NAMED_IMAGES])
    more = f" and {len(digests) - NAMED_IMAGES} more" if len(digests) > NAMED_IMAGES else ""
    why = textwrap.shorten(row["not_comparable"][digests[0]], 160, placeholder=" …")
    first = "" if len(digests) == 1 else "the first: "
    return f"- {row['quantizer']} {row['arm']} over {_anchor(row)}: {named}{more} ({first}{why})"


def _references(table: Sequence[Row]) -> list[str]:
    """Mean curves of the bases over those that the experiment file names."""
    cells = [
        [row["reference"], row["quantizer"], _number(row["bd_rate_percent"], "+z.2f", " %")] for row in table
    ]
    missing = [
        f"- base of {row['quantizer']} over {row['reference']}: {row['reason']}"
        for row in table
        if row["bd_rate_percent"] is None
    ]
    return [
        *_table(["over", "base of", "BD-rate of the mean curves"], cells),
        *(["", "Not compared:", "", *missing] if missing else []),
    ]


def _gains(gains: Sequence[Row]) -> list[str]:
    head = ["λ", "quantizer", "arm", "over", "ΔJ", "95 % interval", "ΔPSNR dB", "95 % interval"]
    head += ["seeds", "worth in rate", "95 % interval"]
    rows = [row for row in gains if row["relation"] in GAINS_SHOWN]
    return [
        "Averaged over seeds; intervals are paired bootstraps over images. ΔPSNR at equal indices and bits, with its "
        "seeds; what it is worth in rate follows from the slope of the base's mean curve at this λ, which takes four "
        "λ. The other pairs are in gains.csv.",
        "",
        *_table(head, [_gain_cells(row) for row in sorted(rows, key=lambda row: row["lmbda"])]),
    ]


def _gain_cells(row: Row) -> list[str]:
    return [
        f"{row['lmbda']:g}",
        row["quantizer"],
        row["arm"],
        row["anchor_arm"],
        _number(row["cost_percent"], "+z.2f", " %"),
        _range(row["cost_percent_interval"], "+z.2f", " %"),
        _number(row["psnr_db"], "+z.3f"),
        _range(row["psnr_db_interval"], "+z.3f"),
        _seeds(row["psnr_db_seeds"], "+z.3f"),
        _number(row["rate_percent"], "+z.2f", " %"),
        _range(row["rate_percent_interval"], "+z.2f", " %"),
    ]


def _anchor(row: Row) -> str:
    same = row["anchor_quantizer"] == row["quantizer"]
    return row["anchor_arm"] if same else f"{row['anchor_quantizer']} {row['anchor_arm']}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "—" if value is None else f"{value:{form}}{unit}"


def _range(ends: Sequence[float] | None, form: str, unit: str = "") -> str:
    return "—" if ends is None else f"{ends[0]:{form}} … {ends[1]:{form}}{unit}"


def _seeds(values: Sequence[float], form: str, unit: str = "") -> str:
    """The least and the most of several seeds, and how many they are."""
    if len(values) < 2:
        return "—"
    return f"{_range((min(values), max(values)), form, unit)} ({len(values)})"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are aligned for a terminal too."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    drawn = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [head, *body]
    ]
    return [drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:]]
