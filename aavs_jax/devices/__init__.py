"""Devices and processes: meshes, meetings, signals, traces."""
