"""Making a Checkpointer."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "Opening a run",
    (
        python("A misspelt setting", 'Checkpointer("runs/new", {"arena": {"bufers": 3}})'),
        python("A section that does not exist", 'Checkpointer("runs/new", {"memory": {"buffers": 3}})'),
        python("A setting without its section", 'Checkpointer("runs/new", {"buffers": 3})'),
        python("A setting as a keyword argument", 'Checkpointer("runs/new", keep_latest=3)'),
        python("A setting in place of the configuration", 'Checkpointer("runs/new", "arena.buffers=3")'),
        python("A configuration file that does not exist", 'Checkpointer("runs/new", config="settings.yaml")'),
        python("A number as the configuration", 'Checkpointer("runs/new", 3)'),
        python("A list as the configuration", 'Checkpointer("runs/new", ["arena", {"buffers": 3}])'),
        python("read_only without its name", 'Checkpointer("runs/gpt", None, True)'),
        python("A misspelt keyword argument", 'Checkpointer("runs/gpt", readonly=True)'),
        python(
            "A file of events in a directory that does not exist",
            'Checkpointer("runs/new", {"telemetry": {"events": "logs/events.jsonl"}})',
        ),
        python("None as the directory", "Checkpointer(None)"),
        python("A step as the directory", "Checkpointer(100)"),
        python("No directory", "Checkpointer()"),
        python("A file in the place of the directory", 'Checkpointer("model.pt")'),
        python("A directory below a file", 'Checkpointer("model.pt/run")'),
        python("A directory that nobody may make", 'Checkpointer("/proc/runs/gpt")'),
        python(
            "A checkpoint in place of the run's directory",
            'Checkpointer("runs/gpt/step-00000300")',
        ),
        python(
            "The URL of an object store in a Path, which makes one slash of two",
            'from pathlib import Path\nCheckpointer(Path("s3://bucket/run"))',
        ),
        python(
            "An address of a storage that stager does not know",
            'Checkpointer("hdfs://name/run")',
        ),
        python(
            "A second Checkpointer in the same program",
            """
            first = Checkpointer("runs/new", {"persistence": {"lock_timeout_secs": 0}})
            try:
                second = Checkpointer("runs/new", {"persistence": {"lock_timeout_secs": 0}})
            finally:
                first.close()
            """,
        ),
        python(
            "All ranks together, without a process group", 'Checkpointer("runs/new", {"ranks": {"together": True}})'
        ),
        python("Replicas without other ranks", 'Checkpointer("runs/new", {"replication": {"partners": 1}}).close()'),
        python(
            "Saving with a Checkpointer that only reads",
            'Checkpointer("runs/gpt", read_only=True).save(1, state)',
        ),
        python("Reading from a run that does not exist", 'print(Checkpointer("runs/gtp", read_only=True).load())'),
        python(
            "Reading one step from a run that does not exist", 'Checkpointer("runs/gtp", read_only=True).load(step=3)'
        ),
        python(
            "The class of a configuration with a wrong field",
            'Checkpointer("runs/new", stager.StagerConfig(arena={"buffers": 1}))',
            "This is pydantic's own message: `load_config` gives stager's.",
        ),
    ),
)
