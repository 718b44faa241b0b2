"""Tests that need a CUDA device.

Each takes the device as an argument: ``tests/house/test_gpu_on_cpu.py`` runs them on the CPU, so that they stay in step with
the code on machines without a GPU.
"""
