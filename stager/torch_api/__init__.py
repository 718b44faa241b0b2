"""torch's names over stager's engine, for programs that were written for ``torch.distributed.checkpoint``.

``staging/``, with the signatures of ``torch.distributed.checkpoint.staging`` and its experimental successor:

- ``AsyncStager``: the protocol of what ``dcp.async_save(async_stager=...)`` takes.
- ``BlockingAsyncStager``: copies to the CPU in the calling thread.
- ``DefaultStager``: copies in a background thread, over pinned or shared memory. Configured by ``StagingOptions``.
- ``CheckpointStager``, ``CheckpointStagerConfig``: the same two under the names of
  ``torch.distributed.checkpoint._experimental``.
- ``ReplicationStager``: exchanges states between ranks, so that each is also in another rank's memory and on its disk.
- ``StateDictStager``: the deep copy itself.

``storage/``, for ``dcp.save``, ``dcp.async_save`` and ``dcp.load``:

- ``StagerStorageWriter``: writes hashed files, and commits them by one rename.
- ``StagerStorageReader``: reads straight into the tensors, and checks each hash.

The rest of stager never imports this package.
"""
