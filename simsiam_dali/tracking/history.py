"""The runs of one MLflow experiment, from a database file or a server."""

from typing import TYPE_CHECKING, Any

from simsiam_dali.common.errors import UserError
from simsiam_dali.tracking.client import connect, database_file

if TYPE_CHECKING:
    from mlflow.entities import Run

ADVICE = "correct --tracking-uri, MLFLOW_TRACKING_URI or mlflow.tracking_uri"


class Experiment:
    """Reads an experiment. Raises UserError where it does not exist; every call does where MLflow is unreachable."""

    def __init__(self, uri: str, name: str) -> None:
        path = database_file(uri)
        if path and not path.exists():  # MLflow would create an empty one
            raise UserError(f"there is no MLflow database {path}: train first, or name another with --tracking-uri")
        self.uri = uri
        with connect(uri, ADVICE) as client:
            ids = {e.name: e.experiment_id for e in all_pages(client.search_experiments)}
        if name not in ids:
            raise UserError(
                f"{uri} has no experiment {name!r}; it has {', '.join(sorted(ids)) or 'none'}: choose one with"
                " --experiment, or train first"
            )
        self.id: str = ids[name]

    def runs(self) -> "list[Run]":
        """All runs, newest first."""
        with connect(self.uri, ADVICE) as client:
            runs = all_pages(client.search_runs, experiment_ids=[self.id])
        return sorted(runs, key=lambda run: run.info.start_time, reverse=True)

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every value that was logged."""
        with connect(self.uri, ADVICE) as client:
            return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def all_pages(search: Any, **arguments: Any) -> list[Any]:
    """All results of an MLflow search, which returns them in pages."""
    page = search(**arguments)
    found = list(page)
    while page.token:
        page = search(**arguments, page_token=page.token)
        found += page
    return found
