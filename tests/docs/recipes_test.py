"""Recipes for clusters: bash and SkyPilot can parse them."""

import pathlib
import subprocess

import pytest

from tests.support.paths import ROOT

RECIPES = pathlib.Path(ROOT) / "docs" / "recipes"


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh"])
def test_bash_parses_the_script(name):
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)


def test_the_yaml_has_all_fields_of_a_task():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text("utf-8"))
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "setup", "run"}
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID"):
        assert f"export JPAGED_{name}=" in task["run"]
    done = subprocess.run(["bash", "-n", "-c", task["run"]], check=False)
    assert done.returncode == 0


def test_skypilot_parses_the_yaml():
    sky = pytest.importorskip("sky", reason="needs skypilot")
    task = sky.Task.from_yaml(str(RECIPES / "skypilot.yaml"))
    assert task.num_nodes == 2
