"""What `kustomize build` makes of a directory, as far as deploy/kubernetes uses kustomize.

It knows resources, components, strategic merge patches, image tags and generated ConfigMaps. Where
`kubectl` is installed, a test compares it with the real one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
_MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
"""Lists whose elements are merged one by one; all others are replaced."""
_KNOWN = {
    "apiVersion", "kind", "resources", "components", "configMapGenerator", "images", "patches",
}  # fmt: skip


def render(directory: Path) -> list[Object]:
    """The objects of a kustomization."""
    objects = _objects(directory, [])
    _point_to_config_maps(objects)
    return objects


def documents(path: Path) -> list[Object]:
    """The YAML documents of a file."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def _objects(directory: Path, objects: list[Object]) -> list[Object]:
    (said,) = documents(directory / "kustomization.yaml")
    assert said.keys() <= _KNOWN, f"{directory}: {said.keys() - _KNOWN}"
    for name in said.get("resources", []):
        path = directory / name
        objects = objects + (_objects(path, []) if path.is_dir() else documents(path))
    objects = objects + [_config_map(one) for one in said.get("configMapGenerator", [])]
    for name in said.get("components", []):
        objects = _objects(directory / name, objects)
    for patch in said.get("patches", []):
        for document in documents(directory / patch["path"]):
            objects = _patched(objects, document)
    for image in said.get("images", []):
        for container in _containers(objects):
            if container["image"].rpartition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
    return objects


def _patched(objects: list[Object], patch: Object) -> list[Object]:
    (target,) = [one for one in objects if _name(one) == _name(patch)]
    if patch.get("$patch") == "delete":
        return [one for one in objects if one is not target]
    target.update(merge(target, patch))
    return objects


def _name(one: Object) -> tuple[str, str, str]:
    return one["apiVersion"], one["kind"], one["metadata"]["name"]


def merge(old: Any, new: Any, key: str | None = None) -> Any:
    """`old` with the strategic merge patch `new`; `key` tells elements of a list apart."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = {
            name: merge(old.get(name), value, _MERGE_KEYS.get(name)) for name, value in new.items()
        }
        return old | merged
    if not key or not isinstance(old, list) or not all(key in one for one in [*old, *new]):
        return new
    names = [one[key] for one in old]
    changed = {one[key]: one for one in new}
    kept = [merge(one, changed[one[key]]) if one[key] in changed else one for one in old]
    return [one for one in new if one[key] not in names] + kept


def _config_map(generator: Object) -> Object:
    data = dict(literal.split("=", 1) for literal in generator["literals"])
    kind = {"apiVersion": "v1", "kind": "ConfigMap"}
    name = f"{generator['name']}-{_digest(data)}"
    return kind | {"data": data, "metadata": {"name": name}}


def _digest(data: dict[str, str]) -> str:
    """Ten letters that change with the data, as kustomize makes them, before there is a name."""
    text = json.dumps(
        {"data": data, "kind": "ConfigMap", "name": ""}, sort_keys=True, separators=(",", ":")
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return digest.translate(str.maketrans("013ae", "ghkmt"))


def _point_to_config_maps(objects: list[Object]) -> None:
    names = [one["metadata"]["name"] for one in objects if one["kind"] == "ConfigMap"]
    full = {name.rpartition("-")[0]: name for name in names}
    for container in _containers(objects):
        for source in container.get("envFrom", []):
            reference = source["configMapRef"]
            reference["name"] = full[reference["name"]]


def _containers(objects: list[Object]) -> Iterator[Object]:
    for one in objects:
        if one["kind"] == "Deployment":
            yield from one["spec"]["template"]["spec"]["containers"]


def walk(value: Any, see: Callable[[str, Any], None], path: str = "") -> None:
    """Call `see` with the path and value of every leaf."""
    if isinstance(value, dict):
        for name, inner in value.items():
            walk(inner, see, f"{path}/{name}")
    elif isinstance(value, list):
        for inner in value:
            walk(inner, see, path)
    else:
        see(path, value)
