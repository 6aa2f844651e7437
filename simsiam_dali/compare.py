"""Compare encoder types by their best runs in MLflow: python -m simsiam_dali.compare

Finished runs on the same shards are grouped by the tag encoder_type. The best of each type by a score (never by a loss)
are shown side by side: a table in the terminal, a CSV and a plot.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.cli import add_config, add_setting, create_parser, given_settings, whole_number
from simsiam_dali.config.load import load_config
from simsiam_dali.evaluation import compare_report as report
from simsiam_dali.evaluation import compare_runs
from simsiam_dali.tracking.client import experiment_runs, metric_history, viewing_hints


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("compare", __doc__)
    add_setting(parser, "--tracking-uri", "mlflow.tracking_uri", "URI")
    add_setting(parser, "--experiment", "mlflow.experiment_name", "NAME")
    parser.add_argument(
        "--by", metavar="METRIC",
        help=f"metric that selects the runs (default: {' or, where no run has it, '.join(compare_runs.DEFAULT_BY)})",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=whole_number(0), default=1, metavar="N",
        help="best runs of each type, 0 = all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--include-trials", action="store_true", help="include nested runs, such as HPO's trials")
    parser.add_argument(
        "--shard-set", metavar="FINGERPRINT",
        help="compare the runs whose MLflow tag shards starts with this (default: the newest run's)",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="table to write (default: runs/compare.csv)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot to write (default: runs/compare.png)")
    set_help = "any setting by its dotted key; the two files are written to train.runs_dir"
    add_config(parser, "YAML settings, as for training", set_help)
    return parser


def reads(encoder_type: str, key: str) -> bool:
    """Whether encoders of a type read a setting, by its dotted key."""
    from simsiam_dali.models.registry import reads_setting  # torch takes seconds: only where settings differ

    return reads_setting(encoder_type, key)


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    given = given_settings(args)
    # The runs' own settings are in MLflow; of this config only mlflow's and train.runs_dir are read.
    config = load_config(args.config, os.environ, given | {"mlflow.enabled": True}, args.assignments)
    table = args.csv or config.train.runs_dir / "compare.csv"
    plot = args.png or config.train.runs_dir / "compare.png"
    for path in (table, plot):
        report.check_replaceable(path)
    if table.resolve() == plot.resolve():
        raise UserError(f"--csv and --png are both {table}: choose two files")
    metric = compare_runs.selection_metric(args.by) if args.by else None

    uri = config.mlflow.tracking_uri
    runs = experiment_runs(uri, config.mlflow.experiment_name)
    comparison = compare_runs.select(runs, metric, args.runs, args.include_trials, args.shard_set, reads)
    compare_runs.add_untrained(comparison, partial(metric_history, uri))

    print("", *report.table(comparison), "", *report.notes(comparison), "", sep="\n")
    report.write_csv(comparison, table)
    report.write_png(comparison, plot)
    filters = "\n       or  ".join(report.mlflow_filters(comparison))
    print(f"files      {table}, {plot}", *viewing_hints(config.mlflow), f"filter     {filters}", sep="\n")


if __name__ == "__main__":
    main()
