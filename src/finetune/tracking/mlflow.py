"""MLflow: the tracking store that MLFLOW_TRACKING_URI names, or MLflow's own default, a local database."""

import time
from collections.abc import Mapping

from finetune.tracking.tracker import NOTHING, Tracked

_MOST_AT_ONCE = 100
_LONGEST = 5000
_OWN_TAG = "finetune.run"
_WATCHED = "train/loss"


class MLflow:
    """Writes one MLflow run, in the experiment that is called as the project is."""

    def __init__(self, tracked: Tracked) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(tracked.project)
        experiment = found.experiment_id if found else self._client.create_experiment(tracked.project)
        runs = self._client.search_runs([experiment], f"tags.`{_OWN_TAG}` = '{tracked.id}'") if tracked.resumed else []
        self.last_step = NOTHING
        if runs:
            self._id = runs[0].info.run_id
            steps = [point.step for point in self._client.get_metric_history(self._id, _WATCHED)]
            self.last_step = max(steps, default=NOTHING)
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {_OWN_TAG: tracked.id, "mlflow.runName": tracked.name}
            self._id = self._client.create_run(experiment, tags=tags).info.run_id
            params = [Param(key, str(value)[:_LONGEST]) for key, value in tracked.parameters.items()]
            for start in range(0, len(params), _MOST_AT_ONCE):
                self._client.log_batch(self._id, params=params[start : start + _MOST_AT_ONCE])
        self.place = f"{self._client.tracking_uri}, experiment {tracked.project}"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one step, all of it or nothing."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Write how the run ended as tags and metrics, and close the run."""
        from mlflow.entities import RunTag

        tags = [RunTag(name, value[:_LONGEST]) for name, value in words.items()]
        self._client.log_batch(self._id, tags=tags)
        for name, number in numbers.items():
            self._client.log_metric(self._id, name, number)
        self._client.set_terminated(self._id, "FINISHED" if complete else "FAILED")


TRACKER = MLflow
