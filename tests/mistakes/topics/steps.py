"""Steps."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "The step of a save",
    (
        python("No step", "ckpt.save(state)"),
        python("Step and state in the wrong order", "ckpt.save(state, 3)"),
        python("A negative step", "ckpt.save(-1, state)"),
        python("A step that is no whole number", "ckpt.save(1.5, state)"),
        python("A step as text", 'ckpt.save("100", state)'),
        python("True as a step", "ckpt.save(True, state)"),
        python("None as a step", "ckpt.save(None, state)"),
        python("A tensor with several elements as a step", "ckpt.save(torch.tensor([1, 2]), state)"),
        python("No state", "ckpt.save(3)"),
        python("A keyword that does not exist", "ckpt.save(3, state, blocking=True)"),
        python("A step that is not a number", 'ckpt.save(float("nan"), state)'),
        python("A path in place of a step", 'ckpt.save("runs/gpt/step-3", state)'),
    ),
)
