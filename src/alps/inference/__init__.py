"""Packed models that run: layers that stay packed, and the kernel that multiplies with them."""
