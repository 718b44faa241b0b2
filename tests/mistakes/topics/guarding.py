"""guard()."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "guard()",
    (
        python("The module in place of the optimizer", "ckpt.guard(model)"),
        python(
            "A list of optimizers", "ckpt.guard([optimizer])", "It is taken: each optimizer of the list is guarded."
        ),
        python("A list with something else in it", "ckpt.guard([optimizer, model])"),
        python("The optimizer's state dict", "ckpt.guard(optimizer.state_dict())"),
        python("None", "ckpt.guard(None)"),
        python("After close()", "ckpt.close()\nckpt.guard(optimizer)"),
        python(
            "Weights changed by hand after save()",
            """
            large = torch.nn.Linear(2000, 2000)
            optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
            ckpt.guard(optimizer)
            save = ckpt.save(3, {"model": large})
            with torch.no_grad():
                large.weight.mul_(0.9)
            save.upload_completion.result()
            """,
        ),
    ),
)
