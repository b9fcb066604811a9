"""The preprocessing of an encoder as nodes of an ONNX graph: uint8 pictures of any size → the encoder's input. The door to onnx.

`Preprocessing.resized` in the operators of opset 18: crop, `Resize` with `antialias` to twice the input where the crop is larger than that,
then `Resize` by the kernel of the training crops. "area" is no mode of `Resize`: it is two matrix products, as in `views.ops.crop_resize`.
A picture of the encoder's own size comes through unchanged, since each of these is then the identity.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from simclr.views.preprocessing import Preprocessing

_PREPARED = "prepared"
# Keys' cubic with a = −1/2; taps outside the picture are dropped and the others rescaled.
_CUBIC = {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}


def take_pixels(file: Path, source: str, preprocessing: Preprocessing) -> None:
    """Let the graph in `file`, whose input `source` is images (n, 3, size, size) in [0, 1], take uint8 pictures (n, H, W, 3) of any size by
    that name. Weights in a second file stay where they are."""
    model = onnx.load(str(file), load_external_data=False)
    graph, before = model.graph, _Nodes()
    _prepare(before, source, preprocessing)
    for node in graph.node:
        node.input[:] = [_PREPARED if name == source else name for name in node.input]
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before.nodes, *after])  # in the order in which they are computed
    graph.initializer.extend(before.constants)
    (given,) = graph.input
    given.CopyFrom(helper.make_tensor_value_info(source, TensorProto.UINT8, ["n", "height", "width", 3]))
    onnx.save(model, str(file))


def state(file: Path, preprocessing: Preprocessing, takes: str) -> None:
    """Write into a graph's metadata what it takes, and how pictures become an encoder's input, as config.json has it."""
    model = onnx.load(str(file), load_external_data=False)
    helper.set_model_props(model, {"takes": takes, "preprocessing": json.dumps(asdict(preprocessing))})
    onnx.save(model, str(file))


class _Nodes:
    """Nodes in the order of their making, each of one output, and their constants. Calling it makes one and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        name = named or f"preprocessing.{kind}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"preprocessing.constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


def _prepare(op: _Nodes, source: str, preprocessing: Preprocessing) -> None:
    """`Preprocessing.resized`: uint8 (n, H, W, 3) → (n, 3, size, size) in [0, 1]."""
    size, one, two = op.constant([preprocessing.size_px]), op.constant([1]), op.constant([2])
    shape = op("Shape", source)
    height, width = (op("Gather", shape, op.constant([axis])) for axis in (1, 2))
    # The box, as `views.draw.centre_boxes` has it. Round goes to the even neighbour of a half, as NumPy does.
    shorter = op("Cast", op("Min", height, width), to=TensorProto.DOUBLE)
    share = op("Round", op("Mul", shorter, op.constant([preprocessing.centre_crop], np.float64)))
    ready = op("And", op("Equal", height, size), op("Equal", width, size))
    side = op("Where", ready, size, op("Max", op("Cast", share, to=TensorProto.INT64), one))
    corner = [op("Div", op("Add", op("Sub", whole, side), one), two) for whole in (height, width)]
    begin = op("Concat", *corner, axis=0)
    crop = op("Slice", source, begin, op("Add", begin, side), op.constant([1, 2]))
    x = op("Cast", op("Transpose", crop, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    x = op("Div", x, op.constant(255, np.float32))
    # A crop of more than twice the size is reduced to twice the size.
    side = op("Min", side, op.constant([2 * preprocessing.size_px]))
    x = _clipped(op, _resized(op, x, side, antialias=1, **_CUBIC))
    if preprocessing.resize == "area":
        matrix = _area(op, side, preprocessing.size_px)
        x = op("MatMul", op("MatMul", matrix, x), op("Transpose", matrix, perm=[1, 0]))
    else:
        x = _resized(op, x, size, **(_CUBIC if preprocessing.resize == "bicubic" else {"mode": "linear"}))
    _clipped(op, x, named=_PREPARED)


def _resized(op: _Nodes, x: str, side: str, **attributes: Any) -> str:
    """x (n, 3, h, w) → (n, 3, side, side), with half-pixel centres."""
    outer = op("Slice", op("Shape", x), op.constant([0]), op.constant([2]))
    sizes = op("Concat", outer, side, side, axis=0)
    return op("Resize", x, "", "", sizes, coordinate_transformation_mode="half_pixel", **attributes)


def _clipped(op: _Nodes, x: str, named: str = "") -> str:
    return op("Clip", x, op.constant(0, np.float32), op.constant(1, np.float32), named=named)


def _area(op: _Nodes, side: str, size: int) -> str:
    """(size, side): which share of an output pixel each of the picture's covers, in one direction."""
    length = op("Cast", side, to=TensorProto.FLOAT)
    scale = op("Div", length, op.constant([size], np.float32))
    edge = op("Mul", op.constant(np.arange(size)[:, None], np.float32), scale)
    zero, one = op.constant(0, np.float32), op.constant(1, np.float32)
    pixel = op("Range", zero, op("Squeeze", length), one)
    last, first = op("Min", op("Add", edge, scale), op("Add", pixel, one)), op("Max", edge, pixel)
    return op("Div", op("Max", op("Sub", last, first), zero), scale)
