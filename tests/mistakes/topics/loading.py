"""load(): which checkpoint, and what comes back."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "Choosing what to load",
    (
        python("A path in place of a step", 'ckpt.load("runs/gpt/step-00000100")'),
        python("A word for a step", 'ckpt.load(step="latest")'),
        python(
            "A checkpoint that has lost its manifest.json",
            'os.remove("runs/ddp/step-00000100/manifest.json")\nCheckpointer("runs/ddp", read_only=True).load()',
        ),
        python("The parent of a run", 'print(Checkpointer("runs", read_only=True).load())'),
        python("A directory with a file of torch.save", 'print(Checkpointer(".", read_only=True).load())'),
        python("A step that is not there", "ckpt.load(step=7)"),
        python("A negative step, as in a list", "ckpt.load(step=-1)"),
        python("A step with a fraction", "ckpt.load(step=1.5)"),
        python(
            "True as a step",
            "ckpt.load(step=True)",
            "True is 1 in Python.",
        ),
        python("A pattern that matches nothing", 'ckpt.load(keys="modle.*")'),
        python(
            "One pattern of two that matches nothing",
            'ckpt.load(keys=["model.*", "optimiser.*"])',
        ),
        python("No pattern at all", "ckpt.load(keys=[])"),
        python("A number as a pattern", "ckpt.load(keys=3)"),
        python("map_location, as torch.load has it", 'ckpt.load(map_location="cpu")'),
        python("weights_only, as torch.load has it", "ckpt.load(weights_only=False)"),
        python(
            "What load() returns, as a dict",
            'loaded = ckpt.load()\nloaded["model"]',
            'The state is an attribute: write `loaded.state["model"]`.',
        ),
        python(
            "What load() returns, as an object with the state's names",
            "loaded = ckpt.load()\nloaded.model",
            'The state is a mapping: write `loaded.state["model"]`.',
        ),
        python(
            "A loaded module as a module",
            'loaded = ckpt.load()\nloaded.state["model"].eval()',
            'What was saved is the module\'s `state_dict()`. Make the module, and `load(into={"model": model})`.',
        ),
        python(
            "None that was not expected",
            'resumed = Checkpointer("runs/new").load(into=state)\nstart = resumed.step + 1',
            "`load()` returns None if there is nothing to resume from: `resumed.step + 1 if resumed else 0`.",
        ),
        python(
            "Every checkpoint is damaged",
            """
            for file in Path("runs/gpt").glob("*/manifest.json"):
                file.write_text("{}")
            Checkpointer("runs/gpt", read_only=True).load()
            """,
        ),
        python(
            "The newest checkpoint is damaged",
            """
            os.truncate("runs/gpt/step-00000300/__0_0.distcp", 100)
            print(Checkpointer("runs/gpt", read_only=True).load().step)
            """,
        ),
        python(
            "The step that is asked for is damaged",
            """
            os.truncate("runs/gpt/step-00000300/__0_0.distcp", 100)
            Checkpointer("runs/gpt", read_only=True).load(step=300)
            """,
        ),
        python(
            "A file of yours in a checkpoint",
            """
            Path("runs/gpt/step-00000300/notes.txt").write_text("good one")
            print(Checkpointer("runs/gpt", read_only=True).load().step)
            """,
        ),
        python(
            "A file of a checkpoint was removed",
            """
            os.remove("runs/gpt/step-00000300/__0_objects.distcp")
            Checkpointer("runs/gpt", read_only=True).load(step=300)
            """,
        ),
    ),
)
