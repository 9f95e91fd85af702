"""packed: the container, a safetensors file whose tensors are stored at their entropy; it knows no modules."""
