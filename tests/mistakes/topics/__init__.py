"""The table of mistakes: a file for each section of the page, in this order."""

from tests.mistakes.topics import (
    commands,
    environment,
    files,
    guarding,
    into,
    loading,
    opening,
    operations,
    saving,
    settings,
    staging,
    steps,
    values,
    workers,
)

TOPICS = tuple(
    module.TOPIC
    for module in (
        opening,
        steps,
        values,
        saving,
        guarding,
        loading,
        into,
        files,
        operations,
        settings,
        environment,
        commands,
        staging,
        workers,
    )
)
