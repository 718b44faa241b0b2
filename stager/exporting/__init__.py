"""A committed checkpoint for other programs: ``stager export``.

    export.py    one file, for ``torch.load`` or safetensors
    weights.py   a directory of weights, for ``from_pretrained()``

Both take a part (``part.py``) of a checkpoint (``source.py``) and copy its tensors (``tensor_copier.py``). For one file read
then ``whole.py`` (containers with recipes), ``file_format.py`` and ``output.py`` (the file). For weights read
``weight_names.py``, ``shards.py`` (which file has what), ``memory_budget.py``, ``shard_writer.py`` (threads),
``conversion.py`` (dtypes), ``sidecars.py`` and ``new_directory.py``.
"""
