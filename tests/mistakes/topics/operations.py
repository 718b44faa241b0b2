"""verify(), recover(), prune(), export_checkpoint(), export_weights()."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "verify(), recover(), prune(), export_checkpoint() and export_weights()",
    (
        python("verify() of a run", 'print(verify("runs/gpt").problems)'),
        python("verify() of what does not exist", 'print(verify("runs/gtp").problems)'),
        python("verify() of a file", 'print(verify("model.pt").problems)'),
        python("verify() of a checkpoint of dcp.save", 'print(verify("dcp").problems)'),
        python("recover() of a run that does not exist", 'recover("runs/gtp")'),
        python("recover() of a checkpoint", 'recover("runs/gpt/step-00000300")'),
        python(
            "recover() while the run is open",
            'with Checkpointer("runs/new"):\n    recover("runs/new")',
        ),
        python("prune() without a rule", 'prune("runs/gpt")'),
        python("prune() that keeps nothing", 'prune("runs/gpt", keep_latest=0)'),
        python("prune() of a run that does not exist", 'prune("runs/gtp", keep_latest=3)'),
        python("prune() of a checkpoint", 'prune("runs/gpt/step-00000300", keep_latest=3)'),
        python("Export of a step that the run does not have", 'export_checkpoint("runs/gpt", "all.pt", step=250)'),
        python(
            "Export of a step of what is one checkpoint",
            'export_checkpoint("runs/gpt/step-00000300", "all.pt", step=300)',
        ),
        python(
            "Export of a format to a file with the ending of another",
            'export_checkpoint("runs/gpt", "w.safetensors", file_format="torch")',
        ),
        python("Export to a file whose ending tells no format", 'export_checkpoint("runs/gpt", "model.h5")'),
        python(
            "Export of weights, with the model's name misspelt",
            'export_checkpoint("runs/gpt", "w.safetensors", keys="modle")',
        ),
        python(
            "Export of weights, with the prefix and without keys",
            'export_checkpoint("runs/gpt", "w.safetensors", strip_prefix="model.")',
        ),
        python(
            "Export of weights, with the prefix of a wrapper that was not saved",
            'export_checkpoint("runs/gpt", "w.safetensors", keys="model", strip_prefix="model.module.")',
        ),
        python("Export over a file", 'export_checkpoint("runs/gpt/step-00000300", "model.pt")'),
        python("Export into a directory", 'export_checkpoint("runs/gpt/step-00000300", "runs")'),
        python(
            "Export below a directory that does not exist",
            'export_checkpoint("runs/gpt/step-00000300", "out/model.pt")',
        ),
        python(
            "Export in a format that does not exist",
            'export_checkpoint("runs/gpt", "model.h5", file_format="hdf5")',
        ),
        python(
            "Export to safetensors of a state without tensors",
            """
            with Checkpointer("runs/new") as ckpt:
                info = ckpt.save(1, {"epoch": 3}).upload_completion.result()
            print(export_checkpoint(info.path, "a.safetensors", file_format="safetensors").left_out)
            """,
        ),
        python(
            "Export with a text for the memory",
            'export_checkpoint("runs/gpt/step-00000300", "a.pt", max_memory_bytes="much")',
        ),
        python(
            "Export with too little memory",
            'export_checkpoint("runs/gpt/step-00000300", "a.pt", max_memory_bytes="1 MB")',
        ),
        python(
            "Export of weights into a directory with other files",
            'export_weights("runs/gpt", "runs", keys="model", strip_prefix="model.", force=True)',
        ),
        python(
            "Export of weights in a dtype that is none",
            'export_weights("runs/gpt", "gpt-hf", keys="model", strip_prefix="model.", dtype="bf16")',
        ),
        python(
            "Export of weights with a new name for what is not there",
            'export_weights("runs/gpt", "gpt-hf", keys="model", strip_prefix="model.", rename={"haed": "head"})',
        ),
        python(
            "Export of weights, all under one name",
            'export_weights("runs/gpt", "gpt-hf", keys="model", rename=lambda name: "weight")',
        ),
        python(
            "Export of weights with a configuration that is not there",
            'export_weights("runs/gpt", "gpt-hf", keys="model", sidecars=["config.json"])',
        ),
        python("A path where save() takes an export of weights", 'ckpt.save(3, state, export="gpt-hf")'),
        python(
            "An export of weights at every save, to one directory",
            """
            with Checkpointer("runs/new") as ckpt:
                for step in (1, 2):
                    ckpt.save(step, state, export=WeightsExport("gpt-hf", keys="model")).export_completion.result()
            """,
            'With `{step}` in its name, as in `WeightsExport("gpt-hf-{step}", keys="model")`, each save has a directory '
            "of its own.",
        ),
        python("Export of what does not exist", 'export_checkpoint("runs/gtp/step-00000001", "a.pt")'),
    ),
)
