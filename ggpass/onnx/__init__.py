"""ONNX: files whose weights are codes. The operators' contract is `schema.py`."""
