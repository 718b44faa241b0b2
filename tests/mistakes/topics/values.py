"""Values of the state."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "What is in the state",
    (
        python("The module itself as the state", "ckpt.save(3, model)"),
        python("The optimizer itself as the state", "ckpt.save(3, optimizer)"),
        python("A list as the state", "ckpt.save(3, [model, optimizer])"),
        python("A tensor as the state", "ckpt.save(3, torch.ones(3))"),
        python("None as the state", "ckpt.save(3, None)"),
        python("A function in the state", 'ckpt.save(3, {"model": model, "schedule": lambda step: 0.1})'),
        python("An open file in the state", 'ckpt.save(3, {"model": model, "log": open("log.txt", "w")})'),
        python("A lock in the state", 'import threading\n\nckpt.save(3, {"lock": threading.Lock()})'),
        python("A generator in the state", 'ckpt.save(3, {"data": (x for x in range(3))})'),
        python(
            "An iterator of a loader in the state",
            'loader = torch.utils.data.DataLoader(range(8), num_workers=0)\nckpt.save(3, {"data": iter(loader)})',
        ),
        python("A module of Python in the state", 'ckpt.save(3, {"config": os})'),
        python("A function that returns the state, not called", 'ckpt.save(3, {"model": model.state_dict})'),
        python("A tensor on the meta device", 'ckpt.save(3, {"w": torch.ones(3, device="meta")})'),
        python(
            "A tensor whose memory was freed",
            """
            weight = torch.ones(3)
            weight.untyped_storage().resize_(0)  # as FSDP1 does between forward passes
            ckpt.save(3, {"w": weight})
            """,
        ),
        python(
            "A tensor without values",
            """
            from torch._subclasses import FakeTensorMode

            with FakeTensorMode():
                weight = torch.ones(3)
            ckpt.save(3, {"w": weight})
            """,
        ),
        python(
            "A tensor inside torch.func",
            'torch.func.vmap(lambda x: ckpt.save(3, {"x": x}) and x)(torch.ones(2, 3))',
        ),
        python(
            "An object whose state_dict() fails",
            """
            class Loader:
                def state_dict(self):
                    return {"position": self.position}

                def load_state_dict(self, state):
                    self.position = state["position"]

            ckpt.save(3, {"loader": Loader()})
            """,
        ),
        python(
            "state_dict() that needs an argument",
            """
            class Loader:
                def state_dict(self, rank):
                    return {"position": 1}

                def load_state_dict(self, state):
                    pass

            ckpt.save(3, {"loader": Loader()})
            """,
        ),
        python(
            "An object of a class of yours",
            """
            class Settings:
                def __init__(self):
                    self.lr = 0.1

            ckpt.save(3, {"model": model, "settings": Settings()}).upload_completion.result()
            """,
        ),
        python(
            "An object that cannot be pickled",
            """
            class Tracker:
                def __init__(self):
                    self.callback = lambda: None

            ckpt.save(3, {"tracker": Tracker()})
            """,
        ),
        python(
            "A key that is no text, at the top, in the format torch",
            """
            config = {"persistence": {"format": "torch"}}
            with Checkpointer("runs/new", config) as ckpt:
                ckpt.save(3, {("a", 1): torch.ones(3)})
            """,
        ),
        python(
            "A state that is larger than the memory for it",
            """
            with Checkpointer("runs/new", {"arena": {"max_host_bytes": 1024}}) as ckpt:
                ckpt.save(3, {"w": torch.ones(10_000)})
            """,
        ),
        python(
            "PerRank without a value",
            'ckpt.save(3, {"rng": PerRank()})',
            "Give it the value of this rank: `PerRank(RngState())`.",
        ),
    ),
)
