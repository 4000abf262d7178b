"""Texts and windows of tokens for calibration and evaluation."""
