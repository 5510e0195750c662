"""The results as one page of Markdown."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_summary(results: Path, page: Path) -> None:
    """Write the page again from the JSON lines so far."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    blocks = ["# GPU run", machine(rows), parts(rows), op(rows), steps(rows), others(rows)]
    page.write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def of(rows: list[Row], part: str) -> list[Row]:
    """Return the rows of a part."""
    return [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part]


def machine(rows: list[Row]) -> str:
    """Return the machine's lines."""
    return "\n".join(f"- {k}: {v}" for row in of(rows, "machine") for k, v in row.items())


def parts(rows: list[Row]) -> str:
    """Return how each part ended."""
    found = of(rows, "part")
    cells = [[r["name"], str(r["outcome"]), f"{r['seconds']:.0f}"] for r in found]
    return table(["part", "exit code", "seconds"], cells)


def op(rows: list[Row]) -> str:
    """Return the op's times, with the speed over the definition of the same inputs."""
    found = of(rows, "op")
    timed = [r for r in found if "case" in r]
    keys = ("case", "batch", "dtype", "what")

    def base(row: Row) -> float:
        fused = "fused" in row["implementation"] or "softmax" in row["implementation"]
        name = "definition, softmax and locations" if fused else "definition"
        same = (
            r for r in timed
            if all(r[k] == row[k] for k in keys) and r["implementation"] == name
        )  # fmt: skip
        return float(next(same, {}).get("ms", float("nan")))

    cells = [
        [*(str(r[k]) for k in keys), r["implementation"],
         *([r["error"], "", "", ""] if "error" in r else
           [f"{r['ms']:.3f}", f"{r['graph_ms']:.3f}" if "graph_ms" in r else "",
            f"{base(r) / r['ms']:.1f}", f"{r['copied']:.0%}"])]
        for r in timed
    ]  # fmt: skip
    header = [*keys, "implementation", "ms", "graph ms", "times the definition", "of copy speed"]
    notes = "\n".join(f"- {k}: {v}" for r in found if "case" not in r for k, v in r.items())
    return f"## Op\n\n{notes}\n\n{table(header, cells)}" if found else ""


def steps(rows: list[Row]) -> str:
    """Return the training steps, with the speed over Hugging Face's in the same setting."""
    found = of(rows, "steps")
    keys = ("two_stage", "batch_size", "precision")

    def theirs(row: Row) -> float:
        same = (
            r for r in found
            if all(r[k] == row[k] for k in keys) and r["who"] == "hugging_face"
        )  # fmt: skip
        return float(next(same, {}).get("ms", float("nan")))

    cells = [
        ["two-stage" if r["two_stage"] else "plain", str(r["batch_size"]), r["precision"], r["who"],
         ", ".join(k for k in ("compiled", "checkpointing") if r[k]),
         *([r["error"], "", "", ""] if "error" in r else
           [f"{r['ms']:.1f}", f"{theirs(r) / r['ms']:.2f}", str(r.get("peak_gib", "")),
            str(r["first_steps_s"])])]
        for r in found
    ]  # fmt: skip
    header = ["model", "batch", "precision", "who", "with", "ms", "times Hugging Face",
              "peak GiB", "first steps s"]  # fmt: skip
    return f"## Training step\n\n{table(header, cells)}" if found else ""


def others(rows: list[Row]) -> str:
    """Return the remaining parts as lists."""
    blocks = []
    for part, title in (("training", "Training"), ("processes", "Processes"),
                        ("profile", "Profile")):  # fmt: skip
        lines = [", ".join(f"{k} {v}" for k, v in row.items()) for row in of(rows, part)]
        if lines:
            blocks.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(blocks)
