"""load_checkpoint()."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "load_checkpoint(), and files of others",
    (
        python("A path that does not exist", 'load_checkpoint("runs/gtp/step-00000100")'),
        python("The run in place of a checkpoint", 'load_checkpoint("runs/gpt")'),
        python("A step", "load_checkpoint(300)"),
        python("A web address", 'load_checkpoint("https://example.com/model.pt")'),
        python("A text file", 'load_checkpoint("train.py")'),
        python("An empty file", 'Path("empty.pt").touch()\nload_checkpoint("empty.pt")'),
        python("An empty directory", 'os.mkdir("empty")\nload_checkpoint("empty")'),
        python("A file that is cut off", 'os.truncate("model.pt", 500)\nload_checkpoint("model.pt")'),
        python(
            "A safetensors file that is cut off",
            'os.truncate("weights.safetensors", 100)\nload_checkpoint("weights.safetensors")',
        ),
        python(
            "A zip that is not torch's", 'shutil.make_archive("code", "zip", "runs/ddp")\nload_checkpoint("code.zip")'
        ),
        python("numpy's file", 'np.savez("model.npz", w=np.ones(3))\nload_checkpoint("model.npz")'),
        python("Into a state with a name above the weights", 'load_checkpoint("model.pt", into={"model": model})'),
        python(
            "A safetensors file with a name above the weights",
            'load_checkpoint("weights.safetensors", into={"model": model})',
        ),
        python("A whole module in the file", 'torch.save(model, "whole.pt")\nload_checkpoint("whole.pt")'),
        python("A checkpoint of dcp.save without its index", 'os.remove("dcp/.metadata")\nload_checkpoint("dcp")'),
        python("A file of dcp.save is missing", 'os.remove("dcp/__0_0.distcp")\nload_checkpoint("dcp")'),
        python("One file of a checkpoint", 'load_checkpoint("runs/gpt/step-00000300/__0_0.distcp")'),
        python("dcp.save's checkpoint into another model", 'load_checkpoint("dcp", into={"model": nn.Linear(3, 3)})'),
        python(
            "dcp.save's checkpoint into other names, not strict",
            'load_checkpoint("dcp", into={"net": model}, strict=False)',
            "Load strictly, which names what is missing.",
        ),
        python(
            "A saved checkpoint by torch.load",
            'torch.load("runs/gpt/step-00000300")',
            'A checkpoint is a directory: write `load_checkpoint("runs/gpt/step-00000300").state`. '
            "`stager export runs/gpt/step-00000300 all.pt` makes a file of it that `torch.load` reads.",
        ),
    ),
)
