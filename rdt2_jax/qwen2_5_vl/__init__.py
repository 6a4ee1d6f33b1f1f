"""Qwen2.5-VL: a vision tower and a decoder as functions of (params, config, inputs)."""
