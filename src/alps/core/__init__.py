"""Errors, input statistics, devices, processes, progress and other foundations; imports nothing of the project."""
