"""A registered encoder as MLflow loads and serves it: code over safetensors, nothing pickled. A version carries this module with what it
imports (`pipelines.tracking.carried`); the MLmodel files of older versions name it here."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simclr.data.depth import Rule
from simclr.data.pixels import Unreadable
from simclr.data.raster import opened_file
from simclr.encoder.directory import read_encoder
from simclr.encoder.pictures import Picture, Pictures
from simclr.errors import UserError

_DATA_URI = re.compile(r"data:[\w/.+;=-]*;base64,")
_SPACES = re.compile(r"\s+")


class Refused(MlflowException):
    """An input that is no picture: MLflow's server answers 400. The sentence stays as it is: the server would put all that was sent before
    it, pixels too."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._sentence

    @message.setter
    def message(self, text: str) -> None:
        pass


class EncoderModel:
    """`predict(pictures)` → float32 features (n, d)."""

    def __init__(self, path: Path, *, paths: bool = False, device: str = "cpu") -> None:
        self.encoder, self.paths = read_encoder(path, device), paths

    def predict(self, images: object, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Features (n, d) of what people send.

        uint8 (n, H, W, 3) or (H, W, 3), pictures of Pillow's, bytes of image files, `Path`s, base64; lists of these, or a table of one
        column of them. Text is base64, and a path only where the model was loaded with `model_config={"paths": True}`: a server that opens
        what a stranger names would give away its files. Raises Refused.
        """
        try:
            return self.encoder.embed(self._pictures(images)).numpy()
        except UserError as error:
            raise Refused(str(error)) from None

    def _pictures(self, given: Any) -> Pictures:
        if hasattr(given, "iloc"):  # pandas, which is not imported for its readers' sake: a table, or a column of one
            given = {str(name): given.iloc[:, i].tolist() for i, name in enumerate(given.columns)} if given.ndim == 2 else given.tolist()
        if isinstance(given, Mapping):
            if len(given) != 1:
                raise UserError(f"got {len(given)} columns ({', '.join(map(str, [*given][:5]))}); expected one, of pictures")
            (given,) = given.values()
        if isinstance(given, np.ndarray) and given.dtype.kind not in "OUS":
            return _bytes_of(given)
        if isinstance(given, np.ndarray):
            given = given.reshape(-1).tolist()
        if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray):
            if given and all(isinstance(one, Sequence) and not isinstance(one, str | bytes | bytearray) for one in given):
                arrays = [_array(one) for one in given]  # of JSON
                return arrays if any(one.ndim != 2 for one in arrays) or not arrays else [_bytes_of(_array(given))]
            return [self._picture(one, f"picture {i + 1:,} of {len(given):,}") for i, one in enumerate(given)]
        return [self._picture(given, "what was sent")]

    def _picture(self, one: Any, name: str) -> Picture:
        if isinstance(one, Mapping) and len(one) == 1:  # {"b64": …} and {"image": …}
            (one,) = one.values()
        if isinstance(one, np.ndarray) and one.ndim == 0:
            one = one.item()
        if isinstance(one, str):
            return self._file(one, name)
        if isinstance(one, Sequence | np.ndarray) and not isinstance(one, bytes | bytearray):
            return _array(one)
        if isinstance(one, bytes | bytearray | memoryview | os.PathLike | Image.Image | Tensor):
            return one
        raise UserError(f"{name} is of type {type(one).__name__}; expected base64 of an image file, or uint8 pixels (H, W, 3)")

    def _file(self, text: str, name: str) -> bytes | Path:
        """The content of an image file in base64, or its path where those are read: what is both is a picture."""
        try:
            data = base64.b64decode(_SPACES.sub("", _DATA_URI.sub("", text, count=1)), validate=True)
            opened_file(data, Rule())
            return data
        except (binascii.Error, ValueError, Unreadable) as error:
            if self.paths:
                return Path(text)
            if isinstance(error, Unreadable):
                raise UserError(f"{name} is base64 of no image that can be read ({error}); send that of a JPEG's bytes") from None
        raise UserError(
            f"{name} is a text of {len(text):,} characters that is no base64 of an image file; send that, or have the model read paths: "
            'load_model(…, model_config={"paths": True})'
        )


def _array(nested: Any) -> NDArray[np.uint8]:
    """Nested lists of whole numbers → uint8."""
    try:
        return _bytes_of(np.asarray(nested))
    except ValueError:
        raise UserError("the rows of a picture have different lengths; expected pixels (H, W, 3)") from None


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """JSON has no uint8: other whole numbers are taken where they are from 0 to 255. What else it is, the encoder says."""
    if array.dtype.kind not in "iufb":
        raise UserError("the pixels of a picture are no numbers; expected uint8 (H, W, 3)")
    if array.dtype.kind in "iu" and array.dtype != np.uint8 and (not array.size or (array.min() >= 0 and array.max() <= 255)):
        return array.astype(np.uint8)
    return array


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> EncoderModel:
    """MLflow's entry point; `path` is the encoder's directory."""
    config = model_config or {}
    return EncoderModel(Path(path), paths=config.get("paths") is True, device=str(config.get("device", "cpu")))
