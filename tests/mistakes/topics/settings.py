"""Configuration files."""

from tests.mistakes.mistake import Topic, settings

TOPIC = Topic(
    "Configuration files",
    (
        settings("A misspelt key", "arena:\n  bufers: 3"),
        settings("A misspelt section", "arenas:\n  buffers: 3"),
        settings("A key in the wrong section", "staging:\n  buffers: 3"),
        settings("A key without a section", "buffers: 3"),
        settings("Too few buffers", "arena:\n  buffers: 1"),
        settings("A number in quotes", 'arena:\n  buffers: "3"'),
        settings("yes for true", 'persistence:\n  fsync: "yes"'),
        settings("1 for true", "persistence:\n  fsync: 1"),
        settings("A size without a known unit", "arena:\n  max_host_bytes: 8 gigs"),
        settings("A size with a comma", 'arena:\n  max_host_bytes: "1,5GiB"'),
        settings("A share above 100 %", "arena:\n  max_host_bytes: 150%"),
        settings("A limit of nothing", "arena:\n  max_host_bytes: 0"),
        settings("A negative size", "arena:\n  max_host_bytes: -8GiB"),
        settings("A word that is not allowed", "arena:\n  when_full: drop"),
        settings("A format that does not exist", "persistence:\n  format: pickle"),
        settings("Incremental saves in the format torch", "persistence:\n  format: torch\n  incremental: true"),
        settings("A time with a unit", "workers:\n  task_timeout_secs: 30 min"),
        settings("A time of nothing", "ranks:\n  timeout_secs: 0"),
        settings("Niceness out of range", "workers:\n  nice: 20"),
        settings("Auto where there is none", "arena:\n  buffers: auto"),
        settings("A rule that keeps nothing", "retention:\n  keep_latest: 0"),
        settings("One class instead of a list", "loading:\n  safe_globals: my_project.Config"),
        settings("A list instead of a mapping", "arena:\n  - buffers: 3"),
        settings("A key given twice", "arena:\n  buffers: 3\n  buffers: 4"),
        settings("A section given twice", "arena:\n  buffers: 3\narena:\n  pin: true"),
        settings("A tab for indentation", "arena:\n\tbuffers: 3"),
        settings("A bracket that is not closed", "arena: {buffers: 3"),
        settings("A missing space", "arena:\n  buffers:3"),
        settings("Two partners", "replication:\n  partners: 2"),
        settings("A segment that is too small", "persistence:\n  segment_bytes: 4KiB"),
    ),
)
