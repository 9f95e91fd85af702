"""DeepShape as published and scale-compensated: what it costs and saves on trained models; see ../deepshape.py."""
