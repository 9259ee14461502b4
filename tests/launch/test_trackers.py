"""`accelerator.log(weighter.log_values(), step)` into every tracker that is installed, and what it wrote read back.

Trackers that speak to a server run offline, and what they keep for it on disk is read.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from accel_weighting import GradNorm, Weighter
from tests.launch.launching import run_to_end
from tests.ranks import accelerator_for

TASKS = ("topic", "mood/day", "a b", "naïve", "日", "月", "..")  # names of every kind
STEPS = 3
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "comet_ml": "comet_ml"}
PACKAGES |= {"clearml": "clearml", "aim": "aim"}
ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "CLEARML_OFFLINE_MODE": "1",
    "COMET_START_ONLINE": "0",
    "COMET_API_KEY": "none",
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


def log_into(tracker, folder):
    """A few steps; what `log_values` gave at each."""
    import os

    os.chdir(folder)
    settings = {"mlflow": {"logging_dir": f"sqlite:///{folder}/mlflow.db"}, "wandb": {"dir": folder}}
    settings |= {"comet_ml": {"experiment_config": None}}
    if tracker == "comet_ml":
        import comet_ml

        settings["comet_ml"] = {
            "online": False,
            "experiment_config": comet_ml.ExperimentConfig(offline_directory=folder),
        }
    accelerator = accelerator_for("plain", log_with=tracker, project_dir=folder)
    accelerator.init_trackers("weights", init_kwargs={tracker: settings.get(tracker, {})})
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    weighter = Weighter(GradNorm(), TASKS, accelerator=accelerator)
    logged = []
    for step in range(STEPS):
        z = weighter.branch(layer(torch.randn(4, 2)))
        weighter.backward({task: (k + 1) * z[task].square().mean() for k, task in enumerate(TASKS)})
        layer.zero_grad()
        logged.append(weighter.log_values())
        accelerator.log(logged[-1], step=step)
    accelerator.end_training()
    return logged


def read(tracker, folder):
    """`{name: [values]}` of what a tracker wrote."""
    return {
        "tensorboard": read_tensorboard,
        "mlflow": read_mlflow,
        "wandb": read_wandb,
        "comet_ml": read_comet,
        "clearml": read_clearml,
        "aim": read_aim,
    }[tracker](folder)


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "weights")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "weights"]
    (run,) = client.search_runs([experiment.experiment_id])
    return {name: [m.value for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}


def read_wandb(folder):
    """Its records: a header of 7 bytes, then pieces of at most 32 KiB, each with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("run-*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(whole)
            for item in record.history.item:
                found.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
            whole = b""
    return found


def read_comet(folder):
    (file,) = folder.glob("*.zip")
    found = {}
    with zipfile.ZipFile(file) as archive:
        for line in archive.read("messages.json").splitlines():
            message = json.loads(line)
            if message["type"] == "metric_msg":
                metric = message["payload"]["metric"]
                found.setdefault(metric["metricName"], []).append(float(metric["metricValue"]))
    return found


def read_clearml(folder):
    found = {}
    for file in folder.rglob("metrics.jsonl"):
        for line in file.read_text().splitlines():
            for event in json.loads(line):
                found.setdefault(event["metric"], []).append(event["value"])
    return found


def read_aim(folder):
    from aim import Repo

    # Aim's server puts runs into its index as they end; without one its command does.
    aim = shutil.which("aim", path=Path(sys.executable).parent)
    subprocess.run([aim, "storage", "--repo", folder, "reindex", "-y"], check=True, timeout=120, capture_output=True)
    (run,) = Repo(str(folder)).iter_runs()
    return {metric.name: list(metric.values.values_list()) for metric in run.metrics() if "__" not in metric.name}


@pytest.mark.parametrize("tracker", PACKAGES)
def test_every_value_is_read_back(tracker, tmp_path):
    pytest.importorskip(PACKAGES[tracker], reason=f"{tracker} is not installed")
    code = f"from tests.launch.test_trackers import *; main({tracker!r}, {str(tmp_path)!r})"
    status, output = run_to_end(sys.executable, "-c", code, HOME=str(tmp_path), **ENVIRONMENT)
    assert status == 0, output
    logged, found = json.loads(re.findall(r"^FOUND (.*)$", output, re.M)[-1])
    # Accelerate writes by torch's writer, which keeps blanks in names, or by tensorboardX, which writes underscores.
    found = {re.sub("[ :]", "_", name) if tracker == "tensorboard" else name: values for name, values in found.items()}
    names = {name: re.sub("[ :]", "_", name) if tracker == "tensorboard" else name for name in logged[-1]}
    assert len(set(names.values())) == len(names) > 4 * len(TASKS)
    missing = set(names.values()) - found.keys()
    assert not missing, (missing, sorted(found))
    for name, seen in names.items():
        assert found[seen] == pytest.approx([values[name] for values in logged if name in values], rel=1e-6), name


def main(tracker, folder):
    """In a process of its own, since trackers leave threads and settings behind."""
    logged = log_into(tracker, folder)
    deadline = time.monotonic() + 60
    found = read(tracker, Path(folder))
    # W&B's service may still write when its run has finished.
    while sum(map(len, found.values())) < sum(map(len, logged)) and time.monotonic() < deadline:
        time.sleep(1)
        found = read(tracker, Path(folder))
    print("FOUND", json.dumps([logged, found]))


def test_names_of_tasks_are_made_plain():
    weighter = Weighter(GradNorm(), TASKS)
    weights = weighter.log_values()
    assert {name for name in weights if name.startswith("weight/")} == {
        *("weight/topic", "weight/mood/day", "weight/a b", "weight/naive", "weight/_", "weight/_2", "weight/_3")
    }
    assert list(weighter.weights) == list(TASKS)  # which keep their names
