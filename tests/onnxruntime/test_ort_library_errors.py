"""Files and feeds that do not fit give an ONNX Runtime error with our text that names thing, reason and way out."""

import ctypes
import re

import numpy as np
import pytest
import torch
from support.ort_models import TensorProto, Weights, helper, initializer, library, model, node, ort, run, session, value

X = np.ones((2, 80), np.float32)


@pytest.fixture
def weights() -> Weights:
    return Weights("rf8", 10, 80)


def matmul(weights: Weights, inputs=("x", "codes", "scale"), kind: int = TensorProto.FLOAT, extra=(), **attributes):
    nodes = [node("RF8MatMul", inputs, **attributes)]
    return model(nodes, [value("x", kind)], [value("y", kind)], [*weights.initializers, *extra])


def conv(weights: Weights, **attributes):
    return model(
        [node("RF8Conv", ["x", "codes", "scale"], **attributes)],
        [value("x", 1)],
        [value("y", 1)],
        weights.initializers,
    )


def assert_refused(text: str, proto, **feeds: np.ndarray) -> None:
    """The session or its run fails with our text, which names the operator and the node."""
    with pytest.raises(Exception, match=re.escape(text)) as caught:
        run(proto, **feeds)
    assert re.search(r'\[ggpass\] \w+ node "here": ', str(caught.value))
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("kind", [np.int8, np.float32, np.int64, np.float16])
def test_codes_of_another_type(weights: Weights, kind: type) -> None:
    codes = initializer("codes", weights.codes.numpy().astype(kind))
    scale = weights.initializers[1]
    weights.initializers = [codes, scale]
    assert_refused("it must be uint8; export the model again with ggpass", matmul(weights), x=X)


@pytest.mark.parametrize("kind", ["DOUBLE", "BFLOAT16", "INT32", "STRING", "BOOL"])
def test_activations_of_another_type(weights: Weights, kind: str) -> None:
    assert_refused(
        f"the input x is {kind.lower()}; it must be float or float16; put a Cast before the node",
        matmul(weights, kind=getattr(TensorProto, kind)),
        x=X,
    )


def test_scale_codebook_and_bias_of_another_type(weights: Weights) -> None:
    scale = initializer("other", weights.scale.double().numpy())
    assert_refused("the input scale is double", matmul(weights, ["x", "codes", "other"], extra=[scale]), x=X)
    bias = initializer("other", torch.zeros(10).half().numpy())
    assert_refused("the input bias is float16", matmul(weights, ["x", "codes", "scale", "other"], extra=[bias]), x=X)
    book = initializer("book", np.zeros(256))
    nodes = [node("CodebookDequantize", ["codes", "scale", "book"])]
    assert_refused("the input codebook is double", model(nodes, [], [value("y", 1)], [*weights.initializers, book]))


@pytest.mark.parametrize("x", [X[:, :79], X[0, :0], np.array(1, np.float32), X[:, None, :1]])
def test_x_that_does_not_end_in_k(weights: Weights, x: np.ndarray) -> None:
    assert_refused("for codes (10, 80) it is (…, 80)", matmul(weights), x=x)


@pytest.mark.parametrize("shape", [(3,), (10, 1), (), (11,)])
def test_scale_of_another_shape(weights: Weights, shape: tuple[int, ...]) -> None:
    scale = initializer("other", np.ones(shape, np.float32))
    assert_refused(
        "for codes (10, 80) it is float (10) or (1)", matmul(weights, ["x", "codes", "other"], extra=[scale])
    )


@pytest.mark.parametrize("shape", [(9,), (1,), (10, 1)])
def test_bias_of_another_shape(weights: Weights, shape: tuple[int, ...]) -> None:
    bias = initializer("other", np.ones(shape, np.float32))
    proto = matmul(weights, ["x", "codes", "scale", "other"], extra=[bias])
    assert_refused("it is (10)", proto, x=X)


@pytest.mark.parametrize("shape", [(10, 4, 20), (800,), ()])
def test_codes_of_another_rank(weights: Weights, shape: tuple[int, ...]) -> None:
    codes = initializer("other", np.zeros(shape, np.uint8))
    assert_refused("they are uint8 (N, K)", matmul(weights, ["x", "other", "scale"], extra=[codes]))


def test_codebook_of_another_shape(weights: Weights) -> None:
    book = initializer("book", np.zeros(255, np.float32))
    nodes = [node("CodebookMatMul", ["x", "codes", "scale", "book"])]
    proto = model(nodes, [value("x", 1)], [value("y", 1)], [*weights.initializers, book])
    assert_refused("codebook is float (255); it is float (256)", proto, x=X)


def test_an_operator_of_a_later_version(weights: Weights) -> None:
    text = "the file asks for version 2 of the operator and this library runs version 1; upgrade ggpass"
    assert_refused(text, matmul(weights, op_version=2))
    assert_refused("versions begin at 1", matmul(weights, op_version=0))
    assert run(matmul(weights, op_version=1), x=X).shape == (2, 10)


@pytest.mark.parametrize("ids", [[0, 10], [-11], [2**40]])
def test_ids_out_of_range(weights: Weights, ids: list[int]) -> None:
    nodes = [node("RF8Gather", ["ids", "codes", "scale"])]
    proto = model(nodes, [value("ids", TensorProto.INT64)], [value("y", 1)], weights.initializers)
    assert_refused(f"ids holds {ids[-1]}, and codes have 10 rows: ids lie in [-10, 10)", proto, ids=np.array(ids))


def test_ids_of_another_type_and_a_result_of_another_type(weights: Weights) -> None:
    for kind, to, text in (
        (TensorProto.FLOAT, 1, "the input ids is float"),
        (TensorProto.INT64, 11, "attribute to is 11"),
    ):
        nodes = [node("RF8Gather", ["ids", "codes", "scale"], to=to)]
        assert_refused(text, model(nodes, [value("ids", kind)], [value("y", 1)], weights.initializers))


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({}, "kernel_shape has 0 entries"),
        ({"kernel_shape": [2, 2, 2]}, "kernel_shape has 3 entries; one or two spatial dimensions are supported"),
        ({"kernel_shape": [0, 8]}, "kernel_shape holds 0"),
        ({"kernel_shape": [2, 4], "strides": [1]}, "strides has 1 entries; kernel_shape asks for 2"),
        ({"kernel_shape": [2, 4], "strides": [1, 0]}, "strides holds 0; its entries are 1 or more"),
        ({"kernel_shape": [2, 4], "pads": [0, 0, 0, -1]}, "pads holds -1; its entries are 0 or more"),
        ({"kernel_shape": [2, 4], "dilations": [1, 2**40]}, "dilations holds"),
        ({"kernel_shape": [2, 4], "group": 0}, "group is 0; it is 1 or more"),
        ({"kernel_shape": [2, 4], "group": 3}, "group is 3, which does not divide"),
        (
            {"kernel_shape": [3, 3]},
            "codes are (10, 80); for x (1, 10, 6, 6) and this kernel_shape they have 90 columns",
        ),
        ({"kernel_shape": [2, 4], "dilations": [1, 2]}, "shorter than the kernel; use larger inputs or more padding"),
        ({"kernel_shape": [8]}, "it has 3 dimensions"),
    ],
)
def test_convolutions_that_do_not_fit(weights: Weights, attributes: dict, text: str) -> None:
    assert_refused(text, conv(weights, **attributes), x=np.ones((1, 10, 6, 6), np.float32))


def test_attributes_of_enormous_windows_do_not_overflow(weights: Weights) -> None:
    largest = 2**31 - 1
    attributes = {"kernel_shape": [largest, largest], "dilations": [largest] * 2, "pads": [largest] * 4}
    assert_refused("they have", conv(weights, **attributes), x=np.ones((1, 10, 6, 6), np.float32))


@pytest.mark.parametrize("inputs", [[], ["x"], ["x", "codes"], ["x", "", "scale"], ["x", *["codes", "scale"] * 3]])
def test_missing_and_surplus_inputs_are_found_by_onnx_runtime_itself(weights: Weights, inputs: list[str]) -> None:
    with pytest.raises(Exception, match=r"This is an invalid model.*RF8MatMul") as caught:
        session(matmul(weights, inputs))
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_an_optional_input_may_be_named_by_the_empty_string(weights: Weights) -> None:
    assert run(matmul(weights, ["x", "codes", "scale", ""]), x=X).shape == (2, 10)


def test_inputs_of_unknown_rank_and_unnamed_dimensions(weights: Weights) -> None:
    for shape in (None, [None, None], ["B", None]):
        nodes = [node("RF8MatMul", ["x", "codes", "scale"])]
        proto = model(nodes, [value("x", 1, shape)], [value("y", 1)], weights.initializers)
        assert run(proto, x=X).shape == (2, 10)


def test_a_domain_version_that_does_not_exist_is_found_by_onnx_runtime_itself(weights: Weights) -> None:
    for version in (0, 1001):
        proto = matmul(weights)
        proto.opset_import[1].version = version
        with pytest.raises(Exception, match=r"ai\.ggpass"):
            session(proto)


def test_a_name_that_is_too_long_for_a_message(weights: Weights) -> None:
    proto = matmul(weights)
    proto.graph.node[0].name = "n" * 1000
    with pytest.raises(Exception, match='node "with a long name": x is'):
        run(proto, x=X[:, :1])


def test_a_runtime_that_is_too_old_is_named_with_the_way_out() -> None:
    """A stand-in for ONNX Runtime 1.20: no table of version 21, and the first entries of the oldest one."""
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    said: list[tuple[int, str]] = []
    create_status = create(lambda code, text: said.append((code, text.decode())) or 1)
    table = ctypes.cast(create_status, ctypes.c_void_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 20 else None
    )
    text = ctypes.create_string_buffer(b"1.20.1")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    register = ctypes.CDLL(library()).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    needed = "the operators of ggpass need 1.21 or later: pip install -U onnxruntime"
    assert said == [(9, f"[ggpass] this ONNX Runtime is 1.20.1; {needed}")]


def test_registering_twice_is_an_error_of_onnx_runtime(weights: Weights) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library())
    options.register_custom_ops_library(library())
    with pytest.raises(Exception, match="Domain already set"):
        ort.InferenceSession(matmul(weights).SerializeToString(), options)


def test_an_operator_beside_ours_in_the_same_domain_is_not_taken(weights: Weights) -> None:
    proto = matmul(weights)
    proto.graph.node.append(helper.make_node("RF8Softmax", ["y"], ["z"], domain="ai.ggpass", name="other"))
    with pytest.raises(Exception, match="RF8Softmax"):
        session(proto)
