"""After save() was called."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "Saving, and what save() returns",
    (
        python("Saving after close()", "ckpt.close()\nckpt.save(3, state)"),
        python(
            "Saving after the with block",
            'with Checkpointer("runs/new") as ckpt:\n    pass\nckpt.save(3, state)',
        ),
        python(
            "Waiting for the handle itself",
            "ckpt.save(3, state).result()",
            "A handle has two Futures: `staging_completion` and `upload_completion`. To wait for the commit, write "
            "`ckpt.save(3, state).upload_completion.result()`.",
        ),
        python(
            "Calling a Future",
            "ckpt.save(3, state).upload_completion()",
            "A Future is not called. Write `ckpt.save(3, state).upload_completion.result()`.",
        ),
        python(
            "A Future's result as a path",
            "torch.load(ckpt.save(3, state).upload_completion.result())",
            "The result is a `CheckpointInfo`. Its `path` is a directory: `stager.load_checkpoint(info.path)` reads it.",
        ),
        python(
            "The path of the handle",
            "ckpt.save(3, state).path",
            "There is none before the commit. Write `ckpt.save(3, state).upload_completion.result().path`, which waits for "
            "the commit.",
        ),
        python(
            "Saving in a callback of a save",
            """
            problems = []

            def callback(future):
                try:
                    ckpt.save(4, state)
                except Exception as error:
                    problems.append(error)

            ckpt.save(3, state).upload_completion.add_done_callback(callback)
            ckpt.close()
            raise problems[0]
            """,
        ),
        python(
            "Closing in a callback of a save",
            """
            problems = []

            def callback(future):
                try:
                    ckpt.close()
                except Exception as error:
                    problems.append(error)

            ckpt.save(3, state).upload_completion.add_done_callback(callback)
            ckpt.close()
            raise problems[0]
            """,
        ),
        python(
            "The run's directory is removed while it is open",
            """
            with Checkpointer("runs/new") as ckpt:
                shutil.rmtree("runs/new")
                ckpt.save(3, state).upload_completion.result()
            """,
        ),
        python(
            "A file has the name of the checkpoint",
            """
            with Checkpointer("runs/new") as ckpt:
                Path("runs/new/step-00000003").write_text("mine")
                ckpt.save(3, state).upload_completion.result()
            """,
            "The file is kept, as `step-00000003.not-a-checkpoint-...`.",
        ),
        python("Closing with a text", 'Checkpointer("runs/new").close("10 s")'),
        python("Waiting with a text", 'ckpt.wait_for_staging("10 s")'),
        python("Protecting a name", 'ckpt.protect("best")'),
        python("Protecting a negative step", "ckpt.protect(-1)"),
        python("Pruning with rules as arguments", "ckpt.prune(keep_latest=3)"),
        python("Pruning a run that is only read", 'Checkpointer("runs/gpt", read_only=True).prune()'),
        python("on_preemption() twice", "ckpt.on_preemption()\nckpt.on_preemption()"),
        python(
            "on_preemption() with a signal that cannot be handled",
            "import signal\n\nckpt.on_preemption([signal.SIGKILL])",
        ),
        python("on_preemption() with a signal that does not exist", "ckpt.on_preemption(99)"),
        python("on_preemption() with a deadline that is over", "ckpt.on_preemption(deadline_secs=-1)"),
        python(
            "on_preemption() outside of the main thread",
            """
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor() as executor:
                executor.submit(ckpt.on_preemption).result()
            """,
        ),
        python("warmup() without a state", "ckpt.warmup()"),
        python("warmup() with the module", "ckpt.warmup(model)"),
        python(
            "A method of other libraries",
            "ckpt.async_save(3, state)",
            "Write `ckpt.save(3, state)`: `save()` is asynchronous, and returns when the snapshot is taken.",
        ),
        python(
            "The newest checkpoint as an attribute",
            "print(ckpt.latest.step)",
            "`latest()` is a method. `latest_step()` returns the step alone.",
        ),
    ),
)
