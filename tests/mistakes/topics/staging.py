"""torch's names."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "torch's staging API",
    (
        python(
            "A stager that was closed",
            'stager_ = DefaultStager()\nstager_.close()\nstager_.stage({"w": torch.ones(3)})',
        ),
        python(
            "A lock in a state that workers stage",
            """
            import threading

            with WorkerStager({"workers": {"count": 1}}) as stager_:
                stager_.stage({"loader": {"lock": threading.Lock()}})
            """,
        ),
        python(
            "A function in a state that is to be written to a file",
            """
            with WorkerStager({"workers": {"count": 1}}) as stager_:
                stager_.stage({"hooks": [lambda: 1]}, persist_to="runs/state.pt")
            """,
        ),
        python(
            "More results than there may be memory for",
            """
            with WorkerStager({"workers": {"count": 1}, "arena": {"max_host_bytes": "2MiB"}}) as stager_:
                results = [stager_.stage({"w": torch.ones(3)}).result() for _ in range(3)]
            """,
        ),
        python("A dict of options", 'DefaultStager({"use_shared_memory": True})'),
        python(
            "An option that does not exist",
            "StagingOptions(use_pinned=True)",
            "Write `StagingOptions(use_pinned_memory=True)`. As torch's class of this name, it has `use_pinned_memory`, "
            "`use_shared_memory`, `use_async_staging` and `use_non_blocking_copy`.",
        ),
        python("Pinned memory without CUDA", "DefaultStager(StagingOptions(use_pinned_memory=True)).close()"),
        python("An abstract stager", "CheckpointStager()", "Make a `DefaultStager`."),
        python(
            "Replication without a process group",
            "ReplicationStager()",
            "As torch's class, it takes a process group. Write `ReplicationStager(dist.group.WORLD)`, or "
            "`ReplicationStager(None)`, which takes the default group, too. The job must have called "
            "`dist.init_process_group()` first.",
        ),
        python(
            "A writer without a path",
            "StagerStorageWriter()",
            'Give the directory of the checkpoint: `StagerStorageWriter("runs/gpt/step-00000400")`.',
        ),
        python(
            "A writer for None",
            'dcp.save({"w": torch.ones(3)}, storage_writer=StagerStorageWriter(None), no_dist=True)',
        ),
        python(
            "A reader of what does not exist",
            'dcp.load({"w": torch.ones(3)}, storage_reader=StagerStorageReader("runs/gtp"), no_dist=True)',
        ),
        python(
            "A reader of the run",
            'dcp.load({"w": torch.ones(3)}, storage_reader=StagerStorageReader("runs/gpt"), no_dist=True)',
        ),
        python(
            "A name that was not saved",
            'dcp.load({"w": torch.ones(3)}, storage_reader=StagerStorageReader("dcp"), no_dist=True)',
        ),
        python(
            "A tensor of another shape",
            'dcp.load({"model": {"0.weight": torch.ones(9)}}, storage_reader=StagerStorageReader("dcp"), no_dist=True)',
        ),
        python(
            "Over a checkpoint that is there",
            """
            writer = StagerStorageWriter("dcp", overwrite=False)
            dcp.save({"w": torch.ones(3)}, storage_writer=writer, no_dist=True)
            """,
        ),
    ),
)
