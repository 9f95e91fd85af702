"""Bits at equal quality: AdamW, proximal L1 and BackSlash, tuned alike; see ../rate_at_quality.py."""
