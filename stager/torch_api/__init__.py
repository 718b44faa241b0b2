"""torch's names over stager's engine, for programs that were written for ``torch.distributed.checkpoint``.

``staging/`` has the signatures of ``torch.distributed.checkpoint.staging`` and of its experimental successor: stagers, which
copy a state dict. ``storage/`` has a writer and a reader for ``dcp.save``, ``dcp.async_save`` and ``dcp.load``. The rest of
stager never imports this package.
"""
