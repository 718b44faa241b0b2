"""An object store as a storage: S3, Google Cloud Storage, Azure, and what speaks one of their protocols.

    client.py      the connection, and its errors
    keys.py        where the objects of a run lie
    decision.py    commit or removal: whichever is decided first
    object_entry.py, stripe_sink.py, striped_file.py    a directory, what is written into it, what is read from it
    object_store.py    all of it together
    run_lease.py     the run's lock

A checkpoint is there exactly when the object ``<run>/<name>/manifest.json`` is. Everything else of a save lies under
``<run>/<name>.data-<save_id>/``, a prefix that belongs to this save alone:

    <file>/<offset>       the bytes of a data file from that offset on; each is uploaded at once, by one request
    manifest.json         the manifest to come; save records and receipts, as in a directory; sidecars

Two more prefixes have one small object for each save that is being committed or removed, so that one request lists them:

    .stager.decisions/<name>.data-<save_id>    "commit" or "withdraw"
    .stager.removing/<name>.data-<save_id>     its removal has begun

NOTE [ Commit without a rename ]
    1. Every part is written. Whoever sees the last receipt puts the manifest under the save's own prefix.
    2. It creates the decision, "commit", if the object does not exist. Who withdraws or removes the save creates it
       with "withdraw". So one of them succeeds, as with a rename that takes the name from the other.
    3. It lists the save's prefix. Every data file must be there, to the byte. Who removes a save deletes its decision last.
       So if somebody who was stopped for an hour creates the decision after that, the list shows that the data are gone.
    4. It creates ``<name>/manifest.json`` if the object does not exist. If it does, it replaces the one that it has read
       (by its ETag), or leaves the one of a later save. Only now is there a checkpoint.
    5. It deletes the decision and the manifest under the save's prefix.
After a crash in 2 to 5 the next run goes on from there.

NOTE [ Why data are objects of their own, and not one upload in many parts ]
A multipart upload that a crash leaves is not seen in a list. It is there until somebody asks for uploads in particular, and
costs money. A stripe that was put with one request is whole or not there, and a worker that takes the task over can put it
again. Its key tells file and offset, and no request begins or completes it.
"""
