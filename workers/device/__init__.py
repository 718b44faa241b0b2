"""Accelerators: which one there is, its streams, and host memory that it reaches by itself.

``accelerator.py`` asks torch, ``streams.py`` orders copies behind the trainer's work, ``host_memory.py`` page-locks memory,
``byte_copies.py`` sees device memory as bytes.
They are written against ``torch.accelerator``, ``torch.Stream`` and ``torch.Event``, so CUDA, ROCm, XPU and a backend that
torch does not bring go the same way. What only CUDA and ROCm have stands in ``cuda.py``.
"""
