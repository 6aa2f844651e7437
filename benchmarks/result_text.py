"""A result in words: its machine, its settings, and the table for the terminal."""

from collections.abc import Mapping
from typing import Any

Doc = Mapping[str, Any]

RATIOS = {
    "light_over_baseline": "loader/light over baseline/light",
    "all_over_full": "loader/all over baseline/full",
    "train_over_slower": "train over the slower of loader/train and model",
    "data_wait_share": "share of the training's time spent waiting for data",
}


def figure(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".")


def machine(doc: Doc) -> str:
    """What it was measured on, and when."""
    env = doc["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        f"{env['gpu'] or 'no GPU'}; {env['cpu']}, {env['cores']} cores, {env['memory_gb']:g} GB;"
        f" Python {env['python']}, {versions}; {env['date']}, commit {env['commit'] or 'unknown'}"
    )


def material(doc: Doc) -> str:
    """What was read, and what was trained."""
    about = doc["environment"]["settings"]
    rate = f"{about['sample_rate']} Hz" if about["sample_rate"] else "native rates"
    return (
        f"{about['segments']} segments of {about['segment_seconds']:g} s, {about['codec']}, {rate};"
        f" {about['model']}, precision {about['precision']}, compile {str(about['compile']).lower()}"
    )


def setting(entry: Doc) -> str:
    """A stage's settings in one cell."""
    words = {"batch_size": "batch {}", "view_seconds": "{:g} s", "threads": "{} threads", "workers": "{} workers"}
    return ", ".join(text.format(entry[key]) for key, text in words.items() if key in entry)


def named_ratios(doc: Doc) -> dict[str, str]:
    """The ratios that were measured, by what they are of."""
    known = {name: value for name, value in doc["ratios"].items() if value is not None}
    return {RATIOS[name]: f"{x:.1%}" if name == "data_wait_share" else f"{x:.2f}" for name, x in known.items()}


def terminal_table(doc: Doc) -> str:
    """The results for the terminal."""
    lines = [*machine(doc).split("; "), material(doc), "one sample = one segment = two views", ""]
    heads = ("stage", "samples/s", "low", "high", "audio h/s", "x realtime", "host GB", "GPU GB", "MB to GPU")
    rows = [
        (
            name,
            *(figure(e[key]) for key in ("samples_per_s", "low", "high", "audio_hours_per_s", "x_realtime")),
            *(f"{e[key] / 1e9:.2f}" for key in ("host_peak_bytes", "gpu_bytes")),
            f"{e['bytes_to_device'] / 1e6:.2f}",
        )
        for name, e in doc["stages"].items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    if known := named_ratios(doc):
        lines += ["", *(f"{label}: {text}" for label, text in known.items())]
    about = doc["environment"]["settings"]
    if about["soak"]:
        host = doc["stages"]["loader/all"]["host_bytes"]
        lines += ["", f"host GB, each {about['soak'] // len(host)} batches: {' '.join(f'{b / 1e9:.2f}' for b in host)}"]
    return "\n".join(lines)
