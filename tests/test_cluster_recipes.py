"""What lies in `examples/cluster` is read by the programs it is for, as far as they can read it without a cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
MANIFESTS = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.29", kubernetes_validate.latest_version()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_every_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["prolog.sh", "epilog.sh"])
def test_a_prologue_never_takes_a_node_out_of_service(script: str, tmp_path: Path) -> None:
    """Slurm does that to a node whose prologue or epilogue fails; here perseus itself does."""
    broken = tmp_path / "perseus"
    broken.write_text('#!/bin/sh\necho called >> "$0.log"\nexit 1\n')
    broken.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PERSEUS": str(broken), "SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0,1"}
    path = CLUSTER / "slurm" / script
    subprocess.run(["bash", str(path)], env=environment, capture_output=True, timeout=60, check=True)
    assert (tmp_path / "perseus.log").read_text() == "called\n"
    missing = environment | {"PERSEUS": str(tmp_path / "nowhere")}
    subprocess.run(["bash", str(path)], env=missing, capture_output=True, timeout=60, check=True)


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_would_take_every_manifest(manifest: Path, version: str) -> None:
    documents = list(yaml.safe_load_all(manifest.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_manifest_with_a_fault_is_not_taken() -> None:
    document = yaml.safe_load((CLUSTER / "kubernetes" / "job.yaml").read_text())
    document["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capability"] = ["SYS_ADMIN"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, OLDEST_KUBERNETES, strict=True)


def test_systemd_would_take_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    unit = (CLUSTER / "systemd" / "zeusd.service").read_text()
    assert "/usr/local/bin/zeusd" in unit
    (tmp_path / "zeusd.service").write_text(unit.replace("/usr/local/bin/zeusd", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "zeusd.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "zeusd.service" not in done.stderr
