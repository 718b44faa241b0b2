"""The command line."""

from tests.mistakes.mistake import Topic, command

TOPIC = Topic(
    "The command line",
    (
        command("A command that does not exist", "stager list runs/gpt"),
        command("A command without its directory", "stager ls"),
        command("A directory that does not exist", "stager ls runs/gtp"),
        command("A file in place of a directory", "stager ls model.pt"),
        command("An option that does not exist", "stager verify runs/gpt --full"),
        command("A step that is not there", "stager verify runs/gpt --step 7"),
        command("A step of a checkpoint", "stager verify runs/gpt/step-00000300 --step 300"),
        command("One step and all", "stager verify runs/gpt --all --step 300"),
        command("A run without checkpoints", "stager inspect runs"),
        command("inspect of what does not exist", "stager inspect runs/gtp"),
        command("inspect of a text file", "stager inspect train.py"),
        command("Export without a file", "stager export runs/gpt"),
        command("Export over a file", "stager export runs/gpt model.pt"),
        command("Export with a size that is none", "stager export runs/gpt a.pt --max-memory much"),
        command("Export in a format that does not exist", "stager export runs/gpt a.h5 --format hdf5"),
        command(
            "Export of weights without the layout", "stager export runs/gpt a.safetensors --keys model --dtype bfloat16"
        ),
        command(
            "Export of weights with names from a module that is not there",
            "stager export runs/gpt gpt-hf --layout hf --keys model --rename nmaes:rename",
        ),
        command("prune without a rule", "stager prune runs/gpt"),
        command("prune that keeps nothing", "stager prune runs/gpt --keep-latest 0"),
        command("prune of what does not exist", "stager prune runs/gtp --keep-latest 3"),
        command("recover of what does not exist", "stager recover runs/gtp"),
        command("plan without a state", "stager plan"),
        command("plan with two states", "stager plan runs/gpt --params 7B"),
        command("plan for a number that is none", "stager plan --params seven"),
        command("plan for a dtype that does not exist", "stager plan --params 7B --dtype float12"),
        command("plan with a module that cannot be imported", "stager plan --module trian:build"),
        command("plan with a callable that does not exist", "stager plan --module train:bild"),
        command("plan with a file name", "stager plan --module train.py"),
        command("plan with a value that cannot be called", "stager plan --module train:value"),
        command(
            "plan with more ranks on a host than in the job", "stager plan --params 7B --ranks 2 --local-world-size 8"
        ),
        command("plan with shards that do not divide the ranks", "stager plan --params 7B --ranks 8 --shards 3"),
        command("plan for a host that is too small", "stager plan --params 7B --memory 16GiB --cores 8"),
        command("A setting that does not exist", "stager plan --params 1M --set arena.bufers=3"),
        command("A setting without a value", "stager plan --params 1M --set arena.buffers"),
        command("A configuration that does not exist", "stager doctor . --config settings.yaml"),
        command("init over a file", "stager init stager.yaml"),
        command("init with a state that is no callable", "stager init new.yaml --state train"),
    ),
)
