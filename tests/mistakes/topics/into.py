"""load(into=...)."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "Loading into a state",
    (
        python("A list", "ckpt.load(into=[model, optimizer])"),
        python("A tensor", "ckpt.load(into=torch.ones(3))"),
        python(
            "An empty dict",
            "ckpt.load(into={})",
        ),
        python("A value that was not saved", 'ckpt.load(into={"model": model, "ema": torch.ones(3)})'),
        python("Another name for a value", 'ckpt.load(into={"model": model, "optim": optimizer})'),
        python("A model of another size", 'ckpt.load(into={"model": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})'),
        python(
            "A model with a layer more",
            'ckpt.load(into={"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 1))})',
        ),
        python("A model with a layer less", 'ckpt.load(into={"model": nn.Sequential(nn.Linear(4, 4))})'),
        python(
            "A model of another dtype",
            'ckpt.load(into={"model": model.to(torch.bfloat16)})',
            "Values are converted to the dtype of the target, as `load_state_dict()` of a module does.",
        ),
        python("A wrapped model, saved without the wrapper", 'ckpt.load(into={"model": Wrapped(model)})'),
        python(
            "A model without the wrapper it was saved with",
            'Checkpointer("runs/ddp", read_only=True).load(into={"model": model})',
        ),
        python(
            "A model without the wrapper it was saved with, not strict",
            'Checkpointer("runs/ddp", read_only=True).load(into={"model": model}, strict=False)',
        ),
        python("A compiled model, saved before it was compiled", 'ckpt.load(into={"model": torch.compile(model)})'),
        python(
            "Two names of one tensor, and other values in the checkpoint",
            """
            with Checkpointer("runs/new") as new:
                new.save(1, {"weight": torch.ones(2), "average": torch.zeros(2)})
            weight = torch.zeros(2)
            Checkpointer("runs/new", read_only=True).load(into={"weight": weight, "average": weight})
            """,
        ),
        python(
            "Nothing that fits, not strict",
            'ckpt.load(into={"net": model}, strict=False)',
        ),
        python(
            "An optimizer of another kind",
            'ckpt.load(into={"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})',
            "torch's own `load_state_dict()` takes it, and then `step()` raises `KeyError: 'momentum'`.",
        ),
        python(
            "An optimizer with other groups",
            """
            groups = [{"params": [p]} for p in model.parameters()]
            ckpt.load(into={"optimizer": torch.optim.AdamW(groups)})
            """,
        ),
        python("A tensor where a module was saved", 'ckpt.load(into={"model": torch.ones(3)})'),
        python("A module where a number was saved", 'ckpt.load(into={"progress": model})'),
        python(
            "load_state_dict() that fails",
            """
            class Progress:
                def state_dict(self):
                    return {"epoch": 0}

                def load_state_dict(self, state):
                    self.epoch = state["epochs"]

            ckpt.load(into={"progress": Progress()})
            """,
        ),
        python(
            "A number, which cannot be changed in place",
            """
            epoch = 0
            with Checkpointer("runs/new") as ckpt:
                ckpt.save(3, {"epoch": 5}).upload_completion.result()
                ckpt.load(into={"epoch": epoch})
            print(epoch)  # 0
            """,
            'Keep the dict that you give, and read the number from it: `state = {"epoch": 0}`, then `state["epoch"]`.',
        ),
        python(
            "An object of a class of yours, without permission",
            """
            class Settings:
                lr = 0.1

            ckpt.save(3, {"settings": Settings()}).upload_completion.result()
            ckpt.load(step=3)
            """,
        ),
        python(
            "An object whose class is gone",
            """
            class Settings:
                lr = 0.1

            ckpt.save(3, {"settings": Settings()}).upload_completion.result()
            del Settings
            ckpt.load(step=3, allow_pickle=True)
            """,
        ),
    ),
)
