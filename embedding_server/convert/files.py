"""The files of a graph that lies on disk."""

from pathlib import Path

import onnx

from embedding_server.convert.errors import ConvertError


def bare(path: Path) -> onnx.ModelProto:
    """A graph without the weights that lie beside it; raises `ConvertError`."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as exc:  # protobuf's and onnx's exceptions share no base class
        raise ConvertError(f"{path}: {exc}") from exc


def loaded(path: Path) -> onnx.ModelProto:
    """A graph with all of its weights; raises `ConvertError`.

    onnx itself refuses weights that have hard links, which is how files of the hub are laid out.
    """
    model = bare(path)
    try:
        for tensor in model.graph.initializer:
            said = {one.key: one.value for one in tensor.external_data}
            if name := said.get("location"):
                with (path.parent / name).open("rb") as file:
                    file.seek(int(said.get("offset", 0)))
                    tensor.raw_data = file.read(int(said.get("length", -1)))
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
    except OSError as exc:
        raise ConvertError(f"{path}: {exc}") from exc
    return model


def extents(model: onnx.ModelProto) -> dict[str, int]:
    """Names of files beside a graph -> how many bytes of them it uses, counted from their start."""
    found: dict[str, int] = {}
    for tensor in model.graph.initializer:
        said = {one.key: one.value for one in tensor.external_data}
        if name := said.get("location"):
            end = int(said.get("offset", 0)) + int(said.get("length", 0))
            found[name] = max(end, found.get(name, 0))
    return found


def intact(path: Path) -> bool:
    """Whether a graph can be read and all of its weights are there."""
    try:
        beside = extents(bare(path))
        return all((path.parent / name).stat().st_size >= end for name, end in beside.items())
    except (ConvertError, OSError):
        return False
