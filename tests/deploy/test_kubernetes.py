"""deploy/kubernetes, rendered: against Kubernetes' schemas, the restricted profile and the server.

No cluster is there to prove that it runs; this proves that an API server would take it, and that
its numbers fit one another.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedding_server.settings import Settings, load
from tests.deploy import DEPLOY, tool
from tests.deploy.render import Object, documents, render

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
VERSIONS = ("1.30", "1.37")
"""The oldest that knows `sleep` before a container ends, and the newest there are schemas of."""


def with_component(component: str, directory: Path) -> Path:
    """A kustomization of the CPU overlay with this component, under `directory`."""
    shutil.copytree(KUBERNETES, directory / "kubernetes")
    own = directory / "kubernetes" / "overlays" / "test"
    own.mkdir()
    said = {"resources": ["../cpu"], "components": [f"../../components/{component}"]}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(said))
    return own


def every(directory: Path) -> dict[str, list[Object]]:
    """All overlays, and the CPU one with each component, rendered."""
    found = {name: render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
    for name in COMPONENTS:
        found[name] = render(with_component(name, directory / name))
    return found


def of_kind(kind: str, objects: list[Object]) -> Object:
    """The only object of a kind."""
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def pod(objects: list[Object]) -> Object:
    """The Deployment's pod."""
    found: Object = of_kind("Deployment", objects)["spec"]["template"]["spec"]
    return found


def settings(objects: list[Object]) -> Settings:
    """What the server makes of the Deployment's environment; raises `SettingsError`."""
    (container,) = pod(objects)["containers"]
    fixed = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    return load(of_kind("ConfigMap", objects)["data"] | fixed, {})


@pytest.mark.full
@pytest.mark.parametrize("version", VERSIONS)
def test_schemas(tmp_path: Path, version: str) -> None:
    """Every object of Kubernetes' own kinds is valid, strictly; the others are named."""
    unknown = set()
    files = []
    for name, objects in every(tmp_path).items():
        own = [one for one in objects if "." not in one["apiVersion"].removesuffix(".k8s.io/v1")]
        unknown |= {one["kind"] for one in objects if one not in own}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(own))
        files.append(str(tmp_path / f"{name}.yaml"))
    command = [tool("kubernetes-validate"), "--strict", "--kubernetes-version", version]
    said = subprocess.run(
        [*command, *files, str(KUBERNETES / "secret-example.yaml")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert "WARN" not in said.stdout + said.stderr
    assert unknown == {"ServiceMonitor", "ScaledObject"}


def test_rendered_as_kustomize_does(tmp_path: Path) -> None:
    """The test's renderer gives what kustomize gives, names with hashes included."""
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed")
    directories = [KUBERNETES / "overlays" / name for name in OVERLAYS]
    directories += [with_component(name, tmp_path / name) for name in COMPONENTS]
    for directory in directories:
        real = subprocess.run([kubectl, "kustomize", directory], check=True, stdout=subprocess.PIPE)
        expected = list(yaml.safe_load_all(real.stdout))
        assert sorted(map(canonical, render(directory))) == sorted(map(canonical, expected))


def canonical(one: Object) -> str:
    """One text per object, whatever its order."""
    return json.dumps(one, sort_keys=True)


def test_own_kinds(tmp_path: Path) -> None:
    """Kinds that no schema is there for have fields that their operators' documents name."""
    rendered = every(tmp_path)
    shapes: dict[str, Any] = {
        "ServiceMonitor": {"jobLabel": str, "selector": dict, "endpoints": list},
        "ScaledObject": {
            "scaleTargetRef": dict, "minReplicaCount": int, "maxReplicaCount": int,
            "pollingInterval": int, "advanced": dict, "triggers": list,
        },
    }  # fmt: skip
    for objects in rendered.values():
        for one in objects:
            shape = shapes.get(one["kind"], {})
            for name, value in one["spec"].items() if shape else ():
                assert isinstance(value, shape[name]), f"{one['kind']}.spec.{name}"
    scaled = of_kind("ScaledObject", rendered["keda"])["spec"]
    hpa = of_kind("HorizontalPodAutoscaler", rendered["cpu"])["spec"]
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    assert all(
        isinstance(value, str) for one in scaled["triggers"] for value in one["metadata"].values()
    )
    assert not [one for one in rendered["keda"] if one["kind"] == "HorizontalPodAutoscaler"]
    endpoints = of_kind("ServiceMonitor", rendered["tls"])["spec"]["endpoints"]
    assert [one["scheme"] for one in endpoints] == ["https"]


def test_settings_and_drain(tmp_path: Path) -> None:
    """The server takes its environment, and has the time to drain in that it is told to take."""
    for name, objects in every(tmp_path).items():
        taken, spec = settings(objects), pod(objects)
        (container,) = spec["containers"]
        drain = taken.drain_grace_ms + taken.drain_timeout_ms
        asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert asleep * 1000 + drain + 5000 < spec["terminationGracePeriodSeconds"] * 1000, name
        assert spec["enableServiceLinks"] is False
        scheme = "HTTPS" if taken.ssl_enabled else None
        for kind, path in (("startup", "live"), ("liveness", "live"), ("readiness", "ready")):
            probe = container[f"{kind}Probe"]
            assert probe["httpGet"].get("scheme") == scheme
            assert probe["httpGet"]["path"] == f"/health/{path}"
            assert probe["timeoutSeconds"] >= 2
        mounts = {one["mountPath"] for one in container["volumeMounts"]}
        assert {"/cache", "/tmp"} <= mounts  # noqa: S108 - the container's
        assert {str(Path(one).parent) for one in files_of(taken)} <= mounts
    assert settings(render(KUBERNETES / "overlays" / "air-gapped")).hf_hub_offline


def files_of(taken: Settings) -> list[str]:
    """The files that settings name."""
    keys = [key.removeprefix("@") for key in taken.api_keys]
    return keys + [str(path) for path in (taken.tls_cert_path, taken.tls_key_path) if path]


def test_restricted_profile(tmp_path: Path) -> None:
    """Pods keep to the restricted Pod Security Standard, on a read-only root file system."""
    for objects in every(tmp_path).values():
        spec = pod(objects)
        (container,) = spec["containers"]
        own = container["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        kinds = {key for one in spec["volumes"] for key in one if key != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}
        assert (
            container["resources"]["requests"]["memory"]
            == container["resources"]["limits"]["memory"]
        )


def test_selectors_meet(tmp_path: Path) -> None:
    """Everything that selects, selects this Deployment's pods, or the Service."""
    for objects in every(tmp_path).values():
        deployment = of_kind("Deployment", objects)["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["selector"]["matchLabels"] == labels
        assert of_kind("Service", objects)["spec"]["selector"] == labels
        assert of_kind("PodDisruptionBudget", objects)["spec"]["selector"]["matchLabels"] == labels
        assert of_kind("NetworkPolicy", objects)["spec"]["podSelector"]["matchLabels"] == labels
        monitor = of_kind("ServiceMonitor", objects)["spec"]
        assert (
            monitor["selector"]["matchLabels"] == of_kind("Service", objects)["metadata"]["labels"]
        )
        for spread in deployment["template"]["spec"]["topologySpreadConstraints"]:
            assert spread["labelSelector"]["matchLabels"] == labels


def test_autoscaler_and_adapter_agree(tmp_path: Path) -> None:
    """What an autoscaler asks prometheus-adapter for, that knows."""
    (adapter,) = documents(KUBERNETES / "prometheus-adapter.yaml")
    known = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    for objects in every(tmp_path).values():
        for one in objects:
            if one["kind"] == "HorizontalPodAutoscaler":
                metrics = [
                    m["pods"]["metric"]["name"] for m in one["spec"]["metrics"] if "pods" in m
                ]
                assert "inference_queue_wait_p90_seconds" in metrics
                assert set(metrics) <= known
