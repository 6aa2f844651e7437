"""Compare encoder types by their best runs in MLflow: python -m simsiam_dali.compare

Finished runs on the same shards, grouped by the tag encoder_type, and the best of each by a score (never by a loss)
side by side: a table here, a CSV and a picture.
"""

import argparse
import os
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.cli import add_setting, program
from simsiam_dali.config.load import load_config
from simsiam_dali.evaluation import compare_report as comparison_report
from simsiam_dali.evaluation import compare_runs as comparison
from simsiam_dali.evaluation.compare_runs import SIDES
from simsiam_dali.tracking import history as mlflow_runs


def count(text: str) -> int:
    """A whole number, 0 or more, of the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("compare"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_setting(parser, "--tracking-uri", "mlflow.tracking_uri", "URI")
    add_setting(parser, "--experiment", "mlflow.experiment_name", "NAME")
    parser.add_argument(
        "--by", metavar="METRIC",
        help=f"what the best runs are chosen by (default: {' or, where no run has it, '.join(comparison.DEFAULT_BY)})",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=count, default=1, metavar="N", help="best runs of each type, 0 = all (default: %(default)s)"
    )
    parser.add_argument("--include-trials", action="store_true", help="take nested runs too, such as HPO's trials")
    parser.add_argument(
        "--shard-set", metavar="FINGERPRINT",
        help="compare the runs on these shards, by the beginning of the tag shards (default: those of the newest run)",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="table to write (default: runs/compare.csv)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture to write (default: runs/compare.png)")
    parser.add_argument("--config", type=config_file, metavar="FILE", help="YAML settings, as for training")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="assignments",
        help="any setting by its dotted key; train.runs_dir is where the two files go",
    )  # fmt: skip
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    given = {key: value for key, value in vars(args).items() if "." in key}
    # What a run was made with is in MLflow; of the settings only where that is and where files go are read here.
    config = load_config(args.config, os.environ, given | {"mlflow.enabled": True}, args.assignments)
    table = args.csv or config.train.runs_dir / "compare.csv"
    picture = args.png or config.train.runs_dir / "compare.png"
    for path in (table, picture):
        comparison_report.check_replaceable(path)
    if table.resolve() == picture.resolve():
        raise UserError(f"--csv and --png are both {table}: choose two files")
    if args.by:
        comparison.chosen_metric(args.by)

    store = mlflow_runs.Store(config.mlflow.tracking_uri, config.mlflow.experiment_name)
    found = comparison.choose(store.runs(), args.by, args.runs, args.include_trials, args.shard_set)
    found = store.with_untrained(found)

    print()
    for line in comparison_report.table(found):
        print(line)
    print()
    for line in comparison_report.remarks(found):
        print(line)
    if len(found.types) == 1:
        (one,) = found.types
        other = next(t for t in SIDES if t != one)
        print(f"only {one} so far; for the other side: python -m simsiam_dali.train --encoder-type {other}")
    print()
    comparison_report.write_csv(found, table)
    comparison_report.write_png(found, picture)
    print(f"files      {table}, {picture}")
    from simsiam_dali.tracking.run import how_to_look

    for line in how_to_look(config):
        print(line)
    these, *types = comparison_report.filters(found)
    print(f"filter     {these}")
    for line in types:
        print(f"       or  {line}")


if __name__ == "__main__":
    main()
