"""What was measured on GPUs: the table of docs/gpu.md, and the step's memory for RESULTS.md."""

from collections.abc import Callable, Iterator, Mapping

from result_text import Doc, figure, machine

BASELINES = ("baseline/full", "baseline/gpu_full")
NEEDED = {"loader/decode", "loader/all", "loader/train", "model", "train", "baseline/gpu_train", *BASELINES}
EXPECTED: dict[str, tuple[str, Callable[[Doc, Mapping[str, float]], str]]] = {
    "`loader/decode`: FLAC of 16 kHz, 16 cores": ("2,800", lambda _, rate: figure(rate["loader/decode"])),
    "`loader/all`: the data graph with all augmentations": (
        "1,800, its operators on the CPU", lambda _, rate: figure(rate["loader/all"])),
    "`model`: forward, backward and step": ("322; wanted: 386", lambda _, rate: figure(rate["model"])),
    "`train`: both, as the trainer runs them": ("322", lambda _, rate: figure(rate["train"])),
    "`train` over the slower of `loader/train` and `model`": (
        "wanted: 0.95", lambda doc, _: f"{doc['ratios']['train_over_slower']:.2f}"),
    "time spent waiting for data": ("wanted: at most 2%", lambda doc, _: f"{doc['ratios']['data_wait_share']:.1%}"),
    "`loader/all` over `model`": ("5; wanted: 1.5", lambda _, rate: f"{rate['loader/all'] / rate['model']:.2f}"),
    "`loader/train` over `model`": ("", lambda _, rate: f"{rate['loader/train'] / rate['model']:.2f}"),
    "`loader/all` over the best baseline of all augmentations": (
        "wanted: 10", lambda _, rate: f"{rate['loader/all'] / max(rate[name] for name in BASELINES):.1f}"),
    "`train` over `baseline/gpu_train`": ("", lambda _, rate: f"{rate['train'] / rate['baseline/gpu_train']:.1f}"),
    "GPU memory of `train`, beside the CUDA context": (
        "68 to 83 GB", lambda doc, _: f"{doc['stages']['train']['gpu_bytes'] / 1e9:.1f} GB"),
}  # fmt: skip
"""What was expected of configs/gpu.yaml on an H200, or wanted, before any GPU had run it, and how a result tells."""


def gpu_table(docs: Mapping[str, Doc]) -> Iterator[str]:
    """What was expected beside what whole runs of configs/gpu.yaml gave; rates in samples/s."""
    measured = {
        name: doc
        for name, doc in docs.items()
        if doc["environment"]["gpu"]
        and doc["stages"].keys() >= NEEDED
        and not doc["environment"]["settings"]["compile"]
    }
    yield f"| | expected or wanted | {' | '.join(measured)} |"
    yield "|---" * (2 + len(measured)) + "|"
    for what, (expected, told) in EXPECTED.items():
        cells = [told(doc, {k: e["samples_per_s"] for k, e in doc["stages"].items()}) for doc in measured.values()]
        yield f"| {what} | {' | '.join([expected, *cells])} |"


def step_section(name: str, doc: Doc) -> Iterator[str]:
    """A result of benchmarks/gpu_step.py on a GPU."""
    yield from ("", f"## The step's memory: {name}", "", f"{machine(doc)}.", "")
    if waits := doc["waits"]:
        yield f"In {waits['steps']} steps of training and loading, no call of torch made the host wait for the GPU."
        yield ""
    parameters = max(e.get("parameter_bytes", 0) for e in doc["sizes"]) / 1e9
    yield f"Weights, gradients and momentum take {parameters:.2f} GB; the shares are of what torch has beside them."
    yield ""
    yield "| batch | samples/s | activations, GB | allocated at the peak, GB | share | reserved, GB | share |"
    yield "|---|---|---|---|---|---|---|"
    for e in doc["sizes"]:
        if "failed" in e:
            yield f"| {e['batch_size']} | {e['failed']} | | | | | |"
            continue
        cells = [f"{e['kept_bytes'] / 1e9:.1f}"]
        for key in ("peak_bytes", "reserved_bytes"):
            cells += [f"{e[key] / 1e9:.1f}", f"{(e[key] - e['parameter_bytes']) / e['kept_bytes']:.2f}"]
        yield f"| {e['batch_size']} | {figure(e['samples_per_s'])} | {' | '.join(cells)} |"
