"""The files of a graph that lies on disk."""

from collections.abc import Iterator
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
    for tensor, name, offset, length in list(_outside(model)):
        try:
            with (path.parent / name).open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length or -1)
        except OSError as exc:
            raise ConvertError(f"{path}: {exc}") from exc
        if len(tensor.raw_data) < length:
            raise ConvertError(f"{path}: {name} ends within {tensor.name}")
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def beside(path: Path) -> list[Path]:
    """The files that hold a graph's weights; raises `ConvertError`."""
    return [path.parent / name for name in sorted({name for _, name, *_ in _outside(bare(path))})]


def intact(path: Path) -> bool:
    """Whether a graph can be read and all of its weights are there."""
    try:
        return all(
            (path.parent / name).stat().st_size >= offset + length
            for _, name, offset, length in _outside(bare(path))
        )
    except (ConvertError, OSError):
        return False


def _outside(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str, int, int]]:
    """Tensors that lie in other files, with the file's name, offset and length (0: to its end).

    Raises:
        ConvertError: a name leads out of the graph's directory.
    """
    for tensor in model.graph.initializer:
        said = {one.key: one.value for one in tensor.external_data}
        if name := said.get("location"):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ConvertError(f"weights in {name}, which is not beside the graph")
            yield tensor, name, int(said.get("offset", 0)), int(said.get("length", 0))
