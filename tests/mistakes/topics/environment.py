"""Environment variables, and load_config()."""

from tests.mistakes.mistake import Topic, python

TOPIC = Topic(
    "Environment variables and overrides",
    (
        python("A misspelt key in the environment", 'os.environ["STAGER_ARENA__BUFERS"] = "3"\nload_config()'),
        python("A misspelt section in the environment", 'os.environ["STAGER_AREAN__BUFFERS"] = "3"\nload_config()'),
        python("A bad value in the environment", 'os.environ["STAGER_ARENA__BUFFERS"] = "many"\nload_config()'),
        python(
            "One underscore between section and key",
            'os.environ["STAGER_ARENA_BUFFERS"] = "3"\nprint(load_config().arena.buffers)',
        ),
        python(
            "One underscore, and a misspelt key",
            'os.environ["STAGER_ARENA_BUFERS"] = "3"\nload_config()',
        ),
        python("An override without a section", 'load_config(overrides=["buffers=3"])'),
        python("An override without a value", 'load_config(overrides=["arena.buffers"])'),
        python("An override of what does not exist", 'load_config(overrides=["arena.bufers=3"])'),
        python("A file that is a directory", 'load_config("runs")'),
        python(
            "A setting changed after it was loaded",
            "config = load_config()\nconfig.arena.buffers = 3",
            "Configurations are frozen: load one with `overrides`, or make a mapping.",
        ),
    ),
)
