"""The numbers of a benchmark as tables."""

from collections.abc import Mapping
from typing import Any


def as_text(report: Mapping[str, Any]) -> str:
    """Return the numbers as tables."""
    facts = report["machine"]
    height, width = report["size"]
    lines = [
        f"{height}x{width} pixels on {facts['device']} ({facts['processor']}), "
        f"{facts['threads']} threads, attention backend {facts['attention_backend']}",
        f"torch {facts['torch']}, python {facts['python']}, deformable_detr "
        f"{facts['deformable_detr']}; {report['runs']} runs after {report['warm_up']}",
        *_parts(report["parts"]),
        "",
        f"{'stage, one image, ' + report['stages']['precision']:30}{'median ms':>12}{'p95 ms':>12}",
        *(
            f"{name:30}{stage['median_ms']:>12.2f}{stage['p95_ms']:>12.2f}"
            for name, stage in report["stages"].items()
            if name != "precision"
        ),
        "",
        f"{'precision':10}{'batch':>6}{'median ms':>12}{'p95 ms':>12}{'images/s':>11}"
        f"{'peak MB':>10}",
        *(
            f"{row['precision']:10}{row['batch_size']:>6}{row['median_ms']:>12.1f}"
            f"{row['p95_ms']:>12.1f}{row['images_per_second']:>11.2f}{_megabytes(row):>10}"
            for row in report["forward"]
        ),
    ]
    if "exported" in report:
        width = max(len(name) for row in report["exported"] for name in row["files"])
        width = max(width, len("checkpoint")) + 2
        lines += [
            "",
            f"{'in turn':{width}}{'batch':>6}{'median ms':>12}{'p95 ms':>12}"
            f"{'times as fast':>15}{'scores apart':>14}",
        ]
        for row in report["exported"]:
            own, batch = row["checkpoint"], row["batch_size"]
            lines.append(
                f"{'checkpoint':{width}}{batch:>6}{own['median_ms']:>12.1f}{own['p95_ms']:>12.1f}"
            )
            lines += [
                f"{name:{width}}{batch:>6}{file['median_ms']:>12.1f}{file['p95_ms']:>12.1f}"
                f"{file['times_as_fast']:>15.2f}{file['largest_difference_of_scores']:>14.1e}"
                f"  {file['runtime']}"
                for name, file in row["files"].items()
            ]
    if "hugging_face" in report:
        lines += [
            "",
            f"{'in turn':10}{'batch':>6}{'ours ms':>12}{'theirs ms':>12}{'times as fast':>15}"
            f"{'scores apart':>14}",
            *(
                f"{row['precision']:10}{row['batch_size']:>6}{row['ours']['median_ms']:>12.1f}"
                f"{row['theirs']['median_ms']:>12.1f}{row['times_as_fast']:>15.2f}"
                f"{row['largest_difference_of_scores']:>14.1e}"
                for row in report["hugging_face"]
            ),
        ]
    return "\n".join(lines)


def _parts(parts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the table of a model's parts, nothing for an exported file."""
    if not parts:
        return []
    whole = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "flops")}
    return [
        "",
        f"{'part':22}{'parameters':>14}{'GFLOPs per image':>20}",
        *(
            f"{name:22}{part['parameters']:>14,}{part['flops'] / 1e9:>20.2f}"
            for name, part in {**parts, "all": whole}.items()
        ),
    ]


def _megabytes(row: Mapping[str, Any]) -> str:
    peak = row["peak_memory_bytes"]
    return "n/a" if peak is None else f"{peak / 1e6:.0f}"
